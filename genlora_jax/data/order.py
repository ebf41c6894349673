"""The order of a source's rows: a function of seed and position alone, which takes no memory.

Grain has one too. It computes an index at a time, a minute for ten million; this one takes arrays.
"""

from collections.abc import Sequence

import numpy as np

from genlora_jax.data.sources import Part

BLOCK = 10_000  # positions of a mixture in which its parts' shares repeat
ROUNDS = 6


def rows_at(parts: Sequence[Part], seed: int, positions: np.ndarray) -> np.ndarray:
    """The rows at positions of the shuffled order, which goes on for ever; int64.

    A part is shuffled anew each time that it begins, as a whole or window by window. Several parts
    alternate evenly, as their weights say; without weights, so that an epoch has every row once.

    Raises:
        ValueError: If a part has no rows.
    """
    if not all(part.rows for part in parts):
        raise ValueError("a part without rows has no order")
    part, place = _shares(parts, positions)
    sizes = np.array([p.rows for p in parts])
    spans = np.array([p.window or p.rows for p in parts])[part]
    epoch, within = np.divmod(place, sizes[part])
    window, index = np.divmod(within, spans)
    size = np.minimum(spans, sizes[part] - window * spans)
    key = np.full(len(positions), seed % 2**64, np.uint64)
    for number in (part, epoch, window):
        key = _mixed(key + number.astype(np.uint64))
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])[part]
    return first + window * spans + _shuffled(index, size, key)


def _shares(parts: Sequence[Part], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which part each position takes from, and how often that part was taken from before."""
    if len(parts) == 1:
        return np.zeros_like(positions), positions
    if parts[0].weight is None:
        return _shares_of_epoch([part.rows for part in parts], positions)
    weights = np.array([part.weight for part in parts], float)
    ends = np.rint(np.cumsum(weights / weights.sum()) * BLOCK).astype(int)
    counts = np.maximum(np.diff(ends, prepend=0), 1)
    part = np.repeat(np.arange(len(parts)), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    evenly = np.argsort((rank + 0.5) / counts[part], kind="stable")
    block, index = np.divmod(positions, len(part))
    chosen = part[evenly][index]
    return chosen, block * counts[chosen] + rank[evenly][index]


def _shares_of_epoch(rows: list[int], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_shares`, where all of each part's rows come in an epoch.

    A part is taken evenly from the positions that those before it leave.
    """
    total = sum(rows)
    epoch, left = np.divmod(positions, total)
    left = left.astype(object)  # products may be too large for int64
    chosen, place = np.full(len(positions), -1), np.zeros(len(positions), np.int64)
    for part, count in enumerate(rows):
        before = left * count // total
        own = (chosen < 0) & ((left + 1) * count // total > before).astype(bool)
        chosen[own], place[own] = part, (epoch * count + before)[own]
        left, total = left - before, total - count
    return chosen, place


def _mixed(x: np.ndarray) -> np.ndarray:
    """64 bits of which each depends on all of x: the finalizer of SplitMix64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Each index's place in the permutation of `range(size)` that its key names.

    Every round is a permutation of the numbers of so many bits. What is not below the size goes
    through them again.
    """
    bits = np.maximum(np.frexp(size - 1)[1], 1).astype(np.uint64)
    mask, half = (np.uint64(1) << bits) - np.uint64(1), (bits + np.uint64(1)) // np.uint64(2)
    found, left = index.astype(np.uint64), np.arange(len(index))
    while len(left):
        x, m, h, k = found[left], mask[left], half[left], key[left]
        for _ in range(ROUNDS):
            k = _mixed(k)
            x = (x * (k | np.uint64(1)) + (k >> np.uint64(32))) & m
            x ^= x >> h
        found[left] = x
        left = left[x >= size[left].astype(np.uint64)]
    return found.astype(np.int64)
