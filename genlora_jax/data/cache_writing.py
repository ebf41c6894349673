"""Writes the cache of a source's examples that `cache` reads."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from tqdm import tqdm

from genlora_jax.atomic_files import new_directory
from genlora_jax.data.cache import (
    FORMAT,
    INDEX,
    LENGTHS,
    CacheSource,
    cache_name,
    index_digest,
    shard_name,
)
from genlora_jax.data.config import DataConfig, MixedSource, paths_and_weights
from genlora_jax.data.examples import Encoded, Fingerprint
from genlora_jax.data.report import Tally, joined
from genlora_jax.data.workers import Workers, source_pieces
from genlora_jax.storage import WRITTEN, storage_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARD = 1 << 28  # bytes of tokens, or a little more


def write_cache(
    sources: str | Sequence[str | MixedSource],
    tokenizer: "PreTrainedTokenizerFast",
    cfg: DataConfig,
    print_line: Callable[[object], None] = print,
) -> str:
    """Tokenises sources to a cache in `cfg.cache`, unless it is there; prints what became of rows.

    Returns:
        The cache's directory, which appears whole.

    Raises:
        FileNotFoundError: If a source is not there.
        ValueError: If a row is bad, as when a run reads it.
        OSError: If the cache cannot be written.
    """
    names, _ = paths_and_weights(sources)
    directory = f"{cfg.cache}/{cache_name(names, tokenizer, cfg)}"
    if (storage_path(directory) / WRITTEN).is_file():
        there = CacheSource(directory)
        print_line(f"{there.report}\n{directory} is there already")
        return directory
    with new_directory(directory) as new, Workers(tokenizer, cfg) as workers:
        shards, reports, rows = Shards(Path(new)), [], []
        for name in names:
            tally = Tally()
            for encoded, counted in progress(workers.encode(source_pieces(name))):
                shards.write(encoded)
                tally.add(counted)
            reports.append(tally.report(name, cfg))
            rows.append(reports[-1].examples)
        shards.close()
        report = str(joined(reports))
        index = {
            "format": FORMAT,
            "sources": names,
            "rows": rows,
            "shards": shards.tokens,
            "fingerprint": shards.fingerprint.hexdigest(),
            "report": report,
        }
        index["digest"] = index_digest(index, (Path(new) / LENGTHS).read_bytes())
        (Path(new) / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    print_line(f"{report}\n{directory}: {len(shards.tokens)} shards")
    return directory


class Shards:
    """The files of a cache's tokens and lengths, while they are written."""

    def __init__(self, directory: Path) -> None:
        """Begins with none."""
        self.directory = directory
        self.tokens: list[int] = []  # of each shard
        self.fingerprint = Fingerprint()
        self._lengths: list[np.ndarray] = [np.zeros(0, np.int32)]
        self._file: BinaryIO | None = None

    def write(self, examples: Encoded) -> None:
        """Adds examples, all to one shard."""
        if self._file is None or self.tokens[-1] * 4 >= SHARD:
            self._end_shard()
            self._file = (self.directory / shard_name(len(self.tokens))).open("wb")
            self.tokens.append(0)
        self._file.write(examples.tokens.astype("<u4").data)
        self.tokens[-1] += len(examples.tokens)
        self._lengths.append(examples.lengths)
        self.fingerprint.add(examples)

    def close(self) -> None:
        """Writes the lengths."""
        self._end_shard()
        np.save(self.directory / LENGTHS, np.concatenate(self._lengths))

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.close()


def progress(parts: Iterable[tuple[Encoded, Tally]]) -> Iterator[tuple[Encoded, Tally]]:
    """Shows on a terminal how many rows are done."""
    with tqdm(unit=" rows", unit_scale=True, disable=None, file=sys.stderr) as bar:
        for part in parts:
            yield part
            bar.update(part[1].counts["rows"])
