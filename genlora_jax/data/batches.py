"""Training batches: packed rows in shuffled order, of which a process makes its own.

A source is read in streams. Where lengths are known there is one, which is packed in every process,
and of which each reads the examples of its rows. Elsewhere each row of a batch, a slot, has a
stream of its own, so that a process tokenises nothing but what its slots take.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from genlora_jax.data.config import DataConfig
from genlora_jax.data.examples import Example
from genlora_jax.data.order import rows_at
from genlora_jax.data.packing import Batch, filled, group_size, max_in_row, pack, packed_rows
from genlora_jax.data.sources import Source

GROUPS = 128  # of a window where lengths are known: packed at once, which is faster
SAMPLE = 2000  # rows from which an epoch's length is estimated

Place = list[int]  # the window that a stream is in, and the rows taken of it


@dataclass(frozen=True)
class Plan:
    """How long a run is.

    Attributes:
        steps: Its steps.
        padding: The share of its tokens that are padding.
        exact: Whether they are counted, and not estimated from a sample.
    """

    steps: int
    padding: float
    exact: bool


def train_batches(
    source: Source,
    cfg: DataConfig,
    *,
    epochs: int | None = None,
    slots: Sequence[int] | None = None,
) -> "Batches":
    """Shuffled batches; see `Batches`."""
    return Batches(source, cfg, epochs=epochs, slots=slots)


class Batches:
    """An iterator over batches, whose place can be saved and restored.

    A batch has the arrays of `packing.filled`. They do not depend on which slots are asked for.

    Args:
        source: The rows.
        cfg: Shape, packing and seed.
        epochs: How often each row is seen; None for ever. Every epoch has another order.
        slots: The rows of a batch to make; None for all.

    Raises:
        ValueError: If rows whose lengths are not known are too few for the slots.
    """

    def __init__(
        self,
        source: Source,
        cfg: DataConfig,
        *,
        epochs: int | None = None,
        slots: Sequence[int] | None = None,
    ):
        self._source, self._cfg, self._epochs = source, cfg, epochs
        self._slots = range(cfg.batch_size) if slots is None else slots
        self._most = max_in_row(source, cfg)
        self._known = source.lengths is not None
        self._group = group_size(source, cfg)
        self._window = self._group * GROUPS if self._known else self._group
        self._count = 1 if self._known else cfg.batch_size
        if len(source) < self._count and not self._known:
            raise ValueError(
                f"data.train: its {len(source):,} rows are fewer than data.batch_size "
                f"{cfg.batch_size}: lower data.batch_size, or use a cache"
            )
        self._places: list[Place | None] = [None] * self._count
        for stream in self._own_streams():
            self._places[stream] = [0, 0]
        self._packed: dict[int, tuple[int, list[Any]]] = {}  # by stream: a window and its rows
        self._ahead: dict[tuple[int, int], Future[list[list[Example]]]] = {}
        self._reader = ThreadPoolExecutor(1)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        each = self._cfg.batch_size // self._count  # rows of a batch from each stream
        taken = {stream: self._take(stream, each) for stream in self._own_streams()}
        # Without an end, other processes may have rows still where this one's slots have none.
        if not any(taken.values()) and (self._epochs is not None or len(taken) == self._count):
            raise StopIteration
        rows = [dict(enumerate(taken[s // each])).get(s % each, []) for s in self._slots]
        if self._known:
            found = iter(self._source.read([int(i) for row in rows for i in row]))
            rows = [[next(found)[0] for _ in row] for row in rows]
        return filled(rows, self._cfg.length)

    def get_state(self) -> dict[str, Any]:
        """The place in the data: of each stream, None for one of which no slot is made."""
        return {"order": self._settings(), "places": [p and [*p] for p in self._places]}

    def set_state(self, state: Any) -> None:
        """Goes to a place, which has that of all streams.

        Raises:
            ValueError: If it is of an older version, or of another order of the rows.
        """
        if not isinstance(state, dict) or "places" not in state:
            raise ValueError(
                "has its place in the data as an older version counted it. End the run with that "
                "version, or start a new one from its adapter, with train.init_from"
            )
        one = len(self._source.parts) == 1  # older versions did not save the parts
        for name, value in self._settings().items():
            if (saved := state["order"].get(name, value if one else "not known")) != value:
                raise ValueError(
                    f"has its place in an order of the data with {name} {saved}, which is now "
                    f"{value}; resume with the data settings that the run was started with"
                )
        for stream in self._own_streams():
            self._places[stream] = list(state["places"][stream])
        self._packed.clear()
        self._ahead.clear()

    def plan(self, epochs: int, *, exact: bool = True) -> Plan:
        """The length of so many epochs, from all lengths; or from a sample of the rows.

        Args:
            epochs: How often each row is seen.
            exact: Whether all lengths are to be used where they are known.

        Raises:
            ValueError: If no row of the sample has an example.
        """
        exact, whole = exact and self._known, epochs * len(self._source)
        rows, tokens, seen = 0, 0, 0
        windows = range(epochs * self._windows(0))
        for window, stream in itertools.product(windows, range(self._count)):
            of_window = self._source_rows(stream, window)
            if seen >= (whole if exact else SAMPLE) or of_window is None:
                break
            lengths = self._lengths(of_window)
            seen, tokens = seen + len(of_window), tokens + int(lengths.sum())
            rows += packed_rows(lengths, self._cfg, self._most, self._group)[1]
        if not rows:
            raise ValueError(f"data.train: none of {seen:,} rows has an example to train on")
        # In whole numbers: all rows that were seen are all rows there are, if exact.
        steps = -(-rows * whole // (seen * self._cfg.batch_size))
        return Plan(steps, 1 - tokens / (rows * self._cfg.length), exact)

    def close(self) -> None:
        """Ends reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def _settings(self) -> dict[str, Any]:
        """What decides which rows a place stands for."""
        return {
            "data.seed": self._cfg.seed,
            "data.length": self._cfg.length,
            "data.pack": self._cfg.pack,
            "rows": len(self._source),
            "streams": self._count,
            "rows of a window": self._window,
            "[rows, weight, window] of the sources": [
                [part.rows, part.weight, part.window] for part in self._source.parts
            ],
        }

    def _own_streams(self) -> list[int]:
        each = self._cfg.batch_size // self._count
        return sorted({slot // each for slot in self._slots})

    def _windows(self, stream: int) -> int:
        """Windows of a stream in an epoch."""
        return -(-len(range(stream, len(self._source), self._count)) // self._window)

    def _source_rows(self, stream: int, window: int) -> np.ndarray | None:
        """The rows that a window takes from the source; None after the last."""
        epoch, number = divmod(window, max(self._windows(stream), 1))
        if self._windows(stream) == 0 or epoch == self._epochs:
            return None
        first = stream + number * self._window * self._count
        last = min(first + self._window * self._count, len(self._source))
        positions = epoch * len(self._source) + np.arange(first, last, self._count)
        return rows_at(self._source.parts, self._cfg.seed, positions)

    def _lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the rows' examples."""
        if self._source.lengths is not None:
            return self._source.lengths[rows]
        found = self._source.read(rows.tolist())
        return np.array([len(e["input_ids"]) for row in found for e in row], np.int32)

    def _take(self, stream: int, count: int) -> list[Any]:
        """The next rows of a stream, as `_rows` has them; fewer at the end."""
        taken: list[Any] = []
        place, barren = self._places[stream], 0
        assert place is not None
        while len(taken) < count:
            rows = self._rows(stream, place[0])
            if rows is None or barren > self._windows(stream):  # an epoch of rows without examples
                break
            barren = 0 if rows else barren + 1
            new = rows[place[1] : place[1] + count - len(taken)]
            taken += new
            place[1] += len(new)
            if place[1] == len(rows):
                place[:] = place[0] + 1, 0
        return taken

    def _rows(self, stream: int, window: int) -> list[Any] | None:
        """The packed rows of a window: their rows of the source if lengths are known, or examples.

        None after the last.
        """
        held, rows = self._packed.get(stream, (None, None))
        if held == window:
            return rows
        source_rows = self._source_rows(stream, window)
        if source_rows is None:
            return None
        items: Any = source_rows
        if self._known:
            lengths = self._lengths(source_rows)
        else:
            items = [example for row in self._read(stream, window) for example in row]
            lengths = np.array([len(example["input_ids"]) for example in items], np.int32)
        packed = pack(lengths, self._cfg, self._most, self._group)
        self._packed[stream] = window, [[items[i] for i in row] for row in packed]
        return self._packed[stream][1]

    def _read(self, stream: int, window: int) -> list[list[Example]]:
        """A window's examples. The next window is read while this one is used."""
        for number in (window, window + 1):
            rows = self._source_rows(stream, number)
            if rows is not None and (stream, number) not in self._ahead:
                self._ahead[stream, number] = self._reader.submit(self._source.read, rows.tolist())
        return self._ahead.pop((stream, window)).result()
