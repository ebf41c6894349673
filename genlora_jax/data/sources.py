"""Sources: rows of examples that are read by their numbers, from memory or from elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from genlora_jax.data.examples import Example, examples_fingerprint


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a source that are shuffled among themselves.

    Attributes:
        rows: How many.
        weight: Their share of what is read, relative to other parts; None if the source is no
            mixture, and every row is read once in an epoch.
        window: Rows that lie near one another and may be read in any order; the windows come one
            after the other, the last perhaps with fewer rows. None if any row may be read at any
            time.
    """

    rows: int
    weight: float | None = None
    window: int | None = None


class Source(Protocol):
    """Rows that are read by their numbers."""

    @property
    def parts(self) -> Sequence[Part]:
        """The rows' ranges in order; one, unless it is a mixture or some have windows."""

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each row's example, int32 `[rows]`, if known; then every row has one."""

    @property
    def mean_length(self) -> float:
        """Mean tokens of an example; of a sample where not all are known."""

    @property
    def fingerprint(self) -> str:
        """A digest of the rows' content and of how they are encoded."""

    def __len__(self) -> int:
        """How many rows there are."""

    def read(self, rows: Sequence[int]) -> list[list[Example]]:
        """The examples of each row: one, none of a row left out, or several of a split one.

        Raises:
            ValueError: If a row is bad and not to be skipped; names its place.
        """


class MemorySource:
    """Examples in memory."""

    def __init__(self, examples: Sequence[Example], parts: Sequence[Part] = ()) -> None:
        """Takes examples, of which each is a row, and their parts, by default one."""
        self.examples = examples
        self.lengths = np.array([len(e["input_ids"]) for e in examples], np.int32)
        self.parts = parts or [Part(len(examples))]

    @property
    def mean_length(self) -> float:
        """Mean tokens of an example."""
        return float(self.lengths.mean())

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the examples and their order."""
        return examples_fingerprint(self.examples)

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.examples)

    def read(self, rows: Sequence[int]) -> list[list[Example]]:
        """The example of each row."""
        return [[self.examples[row]] for row in rows]


def source_parts(rows: Sequence[int], weights: Sequence[float] | None) -> list[Part]:
    """The parts of sources of so many rows: one, unless they are a mixture.

    Raises:
        ValueError: If one of a mixture has none.
    """
    if weights is None:
        return [Part(sum(rows))]
    if 0 in rows:
        raise ValueError(f"source {rows.index(0) + 1} of the mixture has no rows: leave it out")
    return [Part(count, weight) for count, weight in zip(rows, weights, strict=True)]
