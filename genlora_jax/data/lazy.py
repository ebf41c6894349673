"""Files of JSON lines too large for memory: rows are read and tokenised when they are asked for."""

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genlora_jax.data.cache import cache_name
from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import PlacedRow
from genlora_jax.data.examples import Example, split_examples
from genlora_jax.data.files import json_lines
from genlora_jax.data.report import Tally
from genlora_jax.data.rows import checked
from genlora_jax.data.sources import source_parts
from genlora_jax.data.workers import Workers
from genlora_jax.storage import is_remote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGE = 256 << 20  # bytes of files that are not read into memory at the start
BLOCK = 16 << 20  # bytes of a file that are searched for ends of lines at a time
SAMPLE = 1000  # rows that are read at the start
SHORT = 8  # bytes of a line that may be empty
BLANKS = b"\xef\xbb\xbf \t\r\n"
PROCESSES = 4  # which tokenise faster than the devices of a host train
Line = tuple[Path, int, bytes]


def is_large(names: Sequence[str]) -> bool:
    """Whether sources are files of JSON lines, not compressed, and too large for memory."""
    lines = all(
        name.lower().endswith((".jsonl", ".ndjson")) and not is_remote(name) for name in names
    )
    return lines and sum(Path(n).stat().st_size for n in names if Path(n).is_file()) > LARGE


class LazySource:
    """The rows of files of JSON lines, encoded when they are asked for. See `sources.Source`."""

    lengths = None

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: "PreTrainedTokenizerFast",
        cfg: DataConfig,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Finds the lines, and reads a sample of rows.

        Raises:
            FileNotFoundError: If a file is not there.
            ValueError: If a row of the sample is bad.
        """
        self.fingerprint = cache_name(names, tokenizer, cfg)
        self._paths = [Path(name) for name in names]
        self._found = [find_lines(path) for path in self._paths]
        counts = [len(numbers) for _, numbers in self._found]
        self._first = np.cumsum([0, *counts])
        self.parts = source_parts(counts, weights)
        self._cfg, self._tally = cfg, Tally()
        cores = len(os.sched_getaffinity(0))
        self._workers = Workers(tokenizer, cfg, min(PROCESSES, cores))
        sample = np.linspace(0, len(self) - 1, min(SAMPLE, len(self)), dtype=np.int64)
        found = [*itertools.chain.from_iterable(self.read(sample.tolist()))]
        report = self._tally.report(f"{len(sample):,} rows of {', '.join(names)}", cfg)
        self.mean_length = float(np.mean([len(example["input_ids"]) for example in found]))
        self.report = (
            f"{report}\n  a sample: all {len(self):,} are read as the run goes; genlora tokenize "
            "reads them once, before it"
        )

    def __len__(self) -> int:
        """How many rows there are."""
        return int(self._first[-1])

    def read(self, rows: Sequence[int]) -> list[list[Example]]:
        """The examples of each row.

        Raises:
            ValueError: If a row is bad and not to be skipped, or too many are.
        """
        lines = [*self._lines(rows)]
        share = -(-len(lines) // self._workers.processes) or 1
        pieces = (partial(line_rows, lines[i : i + share]) for i in range(0, len(lines), share))
        found: list[list[Example]] = []
        for encoded, counted in self._workers.encode(pieces):
            examples = iter(split_examples(encoded.tokens, encoded.lengths))
            found += [[*itertools.islice(examples, count)] for count in encoded.examples]
            self._tally.add(counted)
        if self._tally.counts["rows"] >= SAMPLE:
            self._tally.check(", ".join(map(str, self._paths)), self._cfg)
        return found

    def _lines(self, rows: Sequence[int]) -> Iterator[Line]:
        """Lines with their files and numbers."""
        files = np.searchsorted(self._first, rows, side="right") - 1
        opened: dict[int, int] = {}
        try:
            for file in {*files.tolist()}:
                opened[file] = os.open(self._paths[file], os.O_RDONLY)
            for row, file in zip(rows, files.tolist(), strict=True):
                line = int(row - self._first[file])
                starts, numbers = self._found[file]
                start, stop = starts[line : line + 2].tolist()
                text = os.pread(opened[file], stop - start, start)
                yield self._paths[file], int(numbers[line]), text
        finally:
            for descriptor in opened.values():
                os.close(descriptor)


def line_rows(lines: Iterable[Line]) -> Iterator[PlacedRow]:
    """The row of each line."""
    for path, number, text in lines:
        blank = f"{path}:{number}", ValueError(f"{path}:{number}: a line of blanks: remove it")
        yield next(checked(json_lines(path, io.BytesIO(text), number)), blank)


def find_lines(path: Path) -> tuple[np.ndarray, np.ndarray | range]:
    """The lines of a file that are not empty.

    Returns:
        Where each begins, and where the file ends: int64 `[lines + 1]`; and their numbers.
    """
    starts, at = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            starts.append(ends + (at + 1))
            at += len(block)
        found = np.concatenate(starts)
        found = found if found[-1] == at else np.append(found, at)
        blank = []
        for line in np.flatnonzero(np.diff(found) <= SHORT).tolist():
            file.seek(found[line])
            if not file.read(found[line + 1] - found[line]).strip(BLANKS):
                blank.append(line)
    if not blank:
        return found, range(1, len(found))
    # What is read from a row's begin to the next one's has them still, and they are passed over.
    return np.delete(found, blank), np.delete(np.arange(1, len(found)), blank)
