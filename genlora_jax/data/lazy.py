"""Data too large for memory: its rows are read and tokenised when they are asked for."""

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from genlora_jax.data.cache import source_fingerprint
from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import PlacedRow
from genlora_jax.data.examples import Example, split_examples
from genlora_jax.data.files import json_lines
from genlora_jax.data.report import Tally
from genlora_jax.data.rows import checked
from genlora_jax.data.rows_digest import WHOLE, whole_digest
from genlora_jax.data.sources import Part
from genlora_jax.data.workers import Workers
from genlora_jax.threads import processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BLOCK = 16 << 20  # bytes of a file that are searched for ends of lines at a time
SAMPLE = 1000  # rows that are read at the start
SHORT = 8  # bytes of a line that may be empty
BLANKS = b"\xef\xbb\xbf \t\r\n"
PROCESSES = 4  # which tokenise faster than the devices of a host train


class Table(Protocol):
    """Rows by their numbers, as they are stored."""

    @property
    def window(self) -> int | None:
        """See `sources.Part`."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, rows: Sequence[int]) -> list[PlacedRow]:
        """Rows, perhaps as `Unparsed`, with their places."""


class LazySource:
    """Rows of tables, encoded when they are asked for. See `sources.Source`."""

    lengths = None

    def __init__(
        self,
        tables: Sequence[Table],
        names: Sequence[str],
        tokenizer: "PreTrainedTokenizerFast",
        cfg: DataConfig,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Reads a sample of rows.

        Args:
            tables: Where the rows are.
            names: Of the tables.
            tokenizer: The tokenizer.
            cfg: Lengths, and what becomes of bad rows.
            weights: Of the tables, if they are a mixture.

        Raises:
            ValueError: If a row of the sample is bad, or a table has none.
        """
        self._tables, self._name = tables, ", ".join(names)
        named = zip(names, tables, strict=True)
        known = {name: found for name, table in named if (found := getattr(table, "digest", None))}
        self.fingerprint = source_fingerprint(names, tokenizer, cfg, known)
        counts = [len(table) for table in tables]
        for name, count in zip(names, counts, strict=True):
            if not count:
                raise ValueError(f"{name} has no rows: leave it out")
        self._first = np.cumsum([0, *counts])
        windows = [table.window for table in tables]
        if weights is None and not any(windows):
            self.parts = [Part(sum(counts))]
        else:  # windows of several tables are read side by side
            self.parts = [*map(Part, counts, weights or itertools.repeat(None), windows)]
        self._cfg, self._tally = cfg, Tally()
        self._workers = Workers(tokenizer, cfg, min(PROCESSES, processors()))
        found = [*itertools.chain.from_iterable(self.read(self._sample()))]
        report = self._tally.report(f"{self._tally.counts['rows']:,} rows of {self._name}", cfg)
        self.mean_length = float(np.mean([len(example["input_ids"]) for example in found]))
        shuffled = (
            f", shuffled within windows of {max(map(int, filter(None, windows))):,}"
            if any(windows)
            else ""
        )
        self.report = (
            f"{report}\n  a sample: all {len(self):,} are read as the run goes{shuffled}; genlora "
            "tokenize reads them once, before it"
        )

    def _sample(self) -> list[int]:
        """Rows from all over a table, or its first ones if they come in order."""
        rows: list[int] = []
        for table, first in zip(self._tables, self._first.tolist(), strict=False):
            count = min(-(-SAMPLE // len(self._tables)), len(table))
            last = count - 1 if table.window else len(table) - 1
            rows += np.linspace(first, first + last, count, dtype=np.int64).tolist()
        return rows

    def __len__(self) -> int:
        """How many rows there are."""
        return int(self._first[-1])

    def read(self, rows: Sequence[int]) -> list[list[Example]]:
        """The examples of each row.

        Raises:
            ValueError: If a row is bad and not to be skipped, or too many are.
        """
        numbers = np.asarray(rows, np.int64)
        of_table = np.searchsorted(self._first, numbers, side="right") - 1
        read: list[PlacedRow] = [("", None)] * len(numbers)
        for table in np.unique(of_table).tolist():
            (places,) = np.nonzero(of_table == table)
            own = (numbers[places] - self._first[table]).tolist()
            for place, row in zip(places.tolist(), self._tables[table].read(own), strict=True):
                read[place] = row
        share = -(-len(read) // self._workers.processes) or 1
        pieces = (partial(parsed, read[i : i + share]) for i in range(0, len(read), share))
        found: list[list[Example]] = []
        for encoded, counted in self._workers.encode(pieces):
            examples = iter(split_examples(encoded.tokens, encoded.lengths))
            found += [[*itertools.islice(examples, count)] for count in encoded.examples]
            self._tally.add(counted)
        if self._tally.counts["rows"] >= SAMPLE:
            self._tally.check(self._name, self._cfg)
        return found


class Unparsed(NamedTuple):
    """A line of a file."""

    path: Path
    number: int
    text: bytes


def parsed(rows: Iterable[PlacedRow]) -> Iterator[PlacedRow]:
    """Rows, of which some may be lines still."""
    for place, row in rows:
        if isinstance(row, Unparsed):
            blank = place, ValueError(f"{place}: a line of blanks: remove it")
            yield next(checked(json_lines(row.path, io.BytesIO(row.text), row.number)), blank)
        else:
            yield place, row


class LineFile:
    """A file of JSON lines, not compressed."""

    window = None

    def __init__(self, path: Path) -> None:
        """Finds its lines; OSError if it cannot be read."""
        self.path = path
        digest = whole_digest() if path.stat().st_size <= WHOLE else None
        self._starts, self._numbers = find_lines(path, digest)
        # Made on the way, as the file may take long to read.
        self.digest = None if digest is None else str(digest.hexdigest())

    def __len__(self) -> int:
        """How many lines are not empty."""
        return len(self._numbers)

    def read(self, rows: Sequence[int]) -> list[PlacedRow]:
        """Lines, as they are in the file."""
        file, found = os.open(self.path, os.O_RDONLY), []
        try:
            for row in rows:
                start, stop = self._starts[row : row + 2].tolist()
                line = Unparsed(
                    self.path, int(self._numbers[row]), os.pread(file, stop - start, start)
                )
                found.append((f"{self.path}:{line.number}", line))
        finally:
            os.close(file)
        return found


def find_lines(path: Path, digest: Any = None) -> tuple[np.ndarray, np.ndarray | range]:
    """The lines of a file that are not empty.

    Args:
        path: The file.
        digest: Is updated with all of it.

    Returns:
        Where each begins, and where the file ends: int64 `[lines + 1]`; and their numbers.
    """
    starts, at = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            starts.append(ends + (at + 1))
            at += len(block)
            if digest is not None:
                digest.update(block)
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
