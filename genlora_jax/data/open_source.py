"""Which source the rows of a recipe are read from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from genlora_jax.data.cache import find_cache
from genlora_jax.data.config import DataConfig, MixedSource, paths_and_weights
from genlora_jax.data.encode import load_examples
from genlora_jax.data.lazy import LazySource, is_large
from genlora_jax.data.sources import MemorySource, Source, source_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_source(
    sources: str | Sequence[str | MixedSource],
    tokenizer: "PreTrainedTokenizerFast",
    cfg: DataConfig,
) -> tuple[Source, object]:
    """The source of `data.train` or `data.eval`, and a report to print.

    Raises:
        FileNotFoundError: If one is not there.
        ValueError: If a row is bad, or a cache was made of other rows.
    """
    if cfg.cache is not None:
        cache = find_cache(sources, tokenizer, cfg)
        return cache, cache.report
    names, weights = paths_and_weights(sources)
    if is_large(names):
        lazy = LazySource(names, tokenizer, cfg, weights)
        return lazy, lazy.report
    examples, report = load_examples(names, tokenizer, cfg)
    rows = [part.examples for part in report.parts or [report]]
    return MemorySource(examples, source_parts(rows, weights)), report
