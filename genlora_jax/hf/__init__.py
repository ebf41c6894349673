"""Hugging Face: names, loading, export."""

import logging

# Without PyTorch, `transformers` says at import that it has no models. Ours are here.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)
