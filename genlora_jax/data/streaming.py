"""Data sets of the Hugging Face hub, read as a run goes, without a download before it."""

import contextlib
import json
import zlib
from collections.abc import Sequence
from typing import Any

from genlora_jax.data.encode import PlacedRow
from genlora_jax.data.rows import checked, hugging_face_data, placed_rows

WINDOW = 10_000  # rows that are shuffled among themselves
# Slots take rows at their own pace: after as many rows as a large data set has, they are some
# hundred thousand apart.
KEPT = 50 * WINDOW  # rows that may be asked for again, or late
WALKS = 4


class Stream:
    """A data set of the hub by its rows' numbers. See `lazy.Table`.

    Rows are to be asked for in order, but for those of some windows. Some walks through the data
    set go on side by side: some rows of a batch may have begun the next epoch.
    """

    def __init__(self, name: str) -> None:
        """Asks for its length.

        Raises:
            FileNotFoundError: If there is no such data set.
            ValueError: If its length is not known.
        """
        data = hugging_face_data(name, streaming=True)
        split = (data.info.splits or {}).get(str(data.split))
        if split is None or not split.num_examples:
            raise ValueError(
                f"{name}: the hub does not say how many rows it has: leave out data.streaming, or "
                "run genlora tokenize"
            )
        self._rows = int(split.num_examples)
        self.name, self.window = name, min(WINDOW, self._rows)
        self._walks = [_Walk(name, data)]

    def __len__(self) -> int:
        """How many rows it has."""
        return self._rows

    def read(self, rows: Sequence[int]) -> list[PlacedRow]:
        """Rows with their places."""
        found: dict[int, PlacedRow] = {}
        for row in sorted({*rows}):
            able = [walk for walk in self._walks if walk.gives(row)]
            if not able:
                if row >= self.window:  # else an epoch begins
                    print(f"{self.name}: reads it from its begin again, for row {row + 1:,}")
                able = [_Walk(self.name, hugging_face_data(self.name, streaming=True))]
                self._walks = [able[0], *self._walks][:WALKS]
            walk = max(able, key=lambda walk: walk.passed)
            # The last of them may go.
            self._walks = [walk, *(other for other in self._walks if other is not walk)]
            found[row] = walk.row(row)
        return [found[row] for row in rows]


class _Walk:
    """A walk through a data set in its order, which remembers the last rows."""

    def __init__(self, name: str, data: Any) -> None:
        self.name, self.passed = name, 0
        self._rows = checked(placed_rows(name, data))
        self._kept: dict[int, PlacedRow] = {}
        self._error: Exception | None = None

    def gives(self, row: int) -> bool:
        """Whether a row lies ahead, or is remembered."""
        return row >= self.passed or row in self._kept

    def row(self, row: int) -> PlacedRow:
        """A row, up to which the walk goes on."""
        while self.passed <= row:
            found = self._next()
            if found is None:
                raise ValueError(f"{self.name}: ends after {self.passed} rows, fewer than stated")
            self._kept[self.passed] = (found[0], _packed(found[1]))
            self._kept.pop(self.passed - KEPT, None)
            self.passed += 1
        place, kept = self._kept[row]
        return place, json.loads(zlib.decompress(kept)) if isinstance(kept, bytes) else kept

    def _next(self) -> PlacedRow | None:
        """The next row; None at the end, and after an error that error again."""
        if self._error is not None:
            raise self._error
        try:
            return next(self._rows, None)
        except Exception as error:  # after which a generator has ended
            self._error = error
            raise


def _packed(row: Any) -> Any:
    """A row in little memory; what is no JSON, such as an error, as it is."""
    with contextlib.suppress(TypeError):
        return zlib.compress(json.dumps(row).encode(), 1)
    return row
