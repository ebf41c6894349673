"""Hugging Face: names, loading, export."""
