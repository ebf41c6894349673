"""Examples, one by one and many in one array."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Example = dict[str, np.ndarray]  # "input_ids": int32 [n], "loss_mask": bool [n]
ROWS = 1000  # whose digest is taken at once


class Encoded(NamedTuple):
    """Examples one after the other.

    Attributes:
        tokens: Twice the id, and 1 more if the token is trained: uint32 `[n]`.
        lengths: Of each example: int32.
        examples: How many each row has: int32.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    examples: np.ndarray


def joined_examples(rows: Sequence[Sequence[Mapping[str, np.ndarray]]]) -> Encoded:
    """Examples of rows as `Encoded`."""
    every = [*itertools.chain.from_iterable(rows)]
    ids = np.concatenate([e["input_ids"] for e in every] or [np.zeros(0, np.int32)])
    mask = np.concatenate([e["loss_mask"] for e in every] or [np.zeros(0, bool)])
    return Encoded(
        ids.astype(np.uint32) << 1 | mask,
        np.array([len(e["input_ids"]) for e in every], np.int32),
        np.array([*map(len, rows)], np.int32),
    )


def split_examples(tokens: np.ndarray, lengths: np.ndarray) -> list[Example]:
    """Examples of the fields of `Encoded`."""
    ends = np.cumsum(lengths)[:-1]
    ids, masks = np.split((tokens >> 1).astype(np.int32), ends), np.split(tokens & 1 != 0, ends)
    return [
        {"input_ids": i, "loss_mask": mask} for i, mask in zip(ids, masks, strict=True) if len(i)
    ]


class Fingerprint:
    """A digest of examples and their order, however many are added at a time."""

    def __init__(self) -> None:
        """Of none so far."""
        self._tokens, self._lengths = hashlib.sha256(), hashlib.sha256()

    def add(self, examples: Encoded) -> None:
        """Adds examples behind those before."""
        self._tokens.update(examples.tokens.astype("<u4").data)
        self._lengths.update(examples.lengths.astype("<i4").data)

    def hexdigest(self) -> str:
        """The digest, 16 characters."""
        both = self._tokens.digest() + self._lengths.digest()
        return hashlib.sha256(both).hexdigest()[:16]


def examples_fingerprint(examples: Iterable[Mapping[str, np.ndarray]]) -> str:
    """A digest of examples and their order."""
    found = Fingerprint()
    examples = iter(examples)
    while some := [*itertools.islice(examples, ROWS)]:
        found.add(joined_examples([some]))
    return found.hexdigest()
