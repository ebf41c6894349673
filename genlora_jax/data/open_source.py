"""Which source the rows of a recipe are read from."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genlora_jax.data.cache import find_cache
from genlora_jax.data.config import DataConfig, MixedSource, paths_and_weights
from genlora_jax.data.encode import load_examples
from genlora_jax.data.files import compression
from genlora_jax.data.lazy import LazySource, LineFile, Table
from genlora_jax.data.rows import is_hub_id
from genlora_jax.data.sources import MemorySource, Source, source_parts
from genlora_jax.data.streaming import Stream
from genlora_jax.storage import is_remote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGE = 256 << 20  # bytes of files that are not read into memory


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
    if tables := lazy_tables(names, cfg):
        lazy = LazySource(tables, names, tokenizer, cfg, weights)
        return lazy, lazy.report
    examples, report = load_examples(names, tokenizer, cfg)
    rows = [part.examples for part in report.parts or [report]]
    return MemorySource(examples, source_parts(rows, weights)), report


def lazy_tables(names: Sequence[str], cfg: DataConfig) -> Sequence[Table]:
    """Sources that are streamed or too large for memory; none if they are to be read at once.

    Raises:
        ValueError: If what is to be streamed is no data set of the hub.
    """
    if cfg.streaming:
        for name in names:
            if not is_hub_id(name):
                raise ValueError(f"data.streaming: {name} is no data set of the hub: leave it out")
        return [Stream(name) for name in names]
    if not all(name.lower().endswith((".jsonl", ".ndjson")) for name in names):
        return []
    if not all(not is_remote(name) and Path(name).is_file() for name in names):
        return []
    paths = [Path(name) for name in names]
    if sum(path.stat().st_size for path in paths) <= LARGE or any(map(compression, paths)):
        return []
    return [LineFile(path) for path in paths]
