"""Packing: examples to batches of rows of one length."""

import math
from collections.abc import Sequence

import numpy as np

from genlora_jax.data.config import DataConfig
from genlora_jax.data.examples import Example
from genlora_jax.data.sources import Source

Batch = dict[str, np.ndarray]
# Measured on an H100 (`train.benchmarks.attention`): with fewer tokens than this for each segment
# that a row may have, attention is faster under a mask.
SHORT = 32
ROWS, SLOT_ROWS = 64, 32  # of a group of examples that are packed together


def pack(lengths: np.ndarray, cfg: DataConfig, most: int | None, group: int) -> list[np.ndarray]:
    """Which examples share a row: best fit, of a group the longest first or as they come.

    Each group takes the way that makes fewer rows. A row comes in the place of the example that it
    began with, so that long and short examples come in no other order than before.

    Args:
        lengths: Tokens of the examples, `[n]`.
        cfg: The length of a row, and whether it takes several.
        most: The most examples of a row; None for no bound.
        group: How many successive examples are packed together.

    Returns:
        Each row's examples as indices, in rising order.
    """
    row, count = packed_rows(lengths, cfg, most, group)
    by_row = np.argsort(row, kind="stable")
    ends = np.cumsum(np.bincount(row, minlength=count))
    return np.split(by_row, ends[:-1]) if count else []


def packed_rows(
    lengths: np.ndarray, cfg: DataConfig, most: int | None, group: int
) -> tuple[np.ndarray, int]:
    """The number of each example's row, and how many rows there are; arguments as of `pack`."""
    if not cfg.pack or not len(lengths):
        return np.arange(len(lengths)), len(lengths)
    group = min(group, len(lengths))
    sizes = np.zeros((-(-len(lengths) // group), group), np.int32)
    sizes.reshape(-1)[: len(lengths)] = lengths
    longest_first = np.argsort(-sizes, axis=1, kind="stable")
    as_they_come = np.broadcast_to(np.arange(group), sizes.shape)
    ways = [_best_fit(sizes, order, cfg.length, most) for order in (longest_first, as_they_come)]
    better = ways[0][1] <= ways[1][1]
    row = np.where(better[:, None], ways[0][0], ways[1][0])
    count = np.where(better, ways[0][1], ways[1][1])
    row += (np.cumsum(count) - count)[:, None]
    return row.reshape(-1)[: len(lengths)], int(count.sum())


def _best_fit(
    sizes: np.ndarray, order: np.ndarray, length: int, most: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """All groups at once: each puts its examples, in an order, where they leave least room.

    Args:
        sizes: Tokens of the examples, `[groups, examples]`; 0 for none.
        order: The examples of each group in that order.
        length: Tokens of a row.
        most: The most examples of a row; None for no bound.

    Returns:
        The number of each example's row in its group, and how many rows each group has.
    """
    groups, group = sizes.shape
    every, begun = np.arange(groups), np.zeros(groups, np.int32)
    room, held = np.full(sizes.shape, length, np.int32), np.zeros(sizes.shape, np.int32)
    row, first = np.zeros(sizes.shape, np.int64), np.full(sizes.shape, group)
    for example in order.T:
        size = sizes[every, example]
        candidates = min(begun.max() + 1, group)  # the last is a row that no group has begun
        left = room[:, :candidates] - size[:, None]
        left[(left < 0) | (held[:, :candidates] == (most or group))] = length + 1
        chosen = left.argmin(axis=1)
        new = (chosen == begun) & (size > 0)
        first[every[new], chosen[new]] = example[new]
        begun += new
        room[every, chosen] -= size
        held[every, chosen] += size > 0
        row[every, example] = chosen
    place = np.argsort(np.argsort(first, axis=1), axis=1)
    return np.take_along_axis(place, row, axis=1), begun


def group_size(source: Source, cfg: DataConfig) -> int:
    """How many examples are packed together: what fills so many rows, and at least 16.

    More leave less padding (`train.benchmarks.input_pipeline`). Where lengths are not known, a slot
    has to tokenise a group before its first row.
    """
    rows = SLOT_ROWS if source.lengths is None else ROWS
    return max(round(rows * cfg.length / source.mean_length), 16)


def filled(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    """A batch of rows of these examples; an empty row is all padding.

    Returns:
        `input_ids`, `segment_ids` (0 at padding), `positions` int32 and `loss_mask` bool, all
        `[rows, length]`.
    """
    ids, segments, positions = np.zeros((3, len(rows), length), np.int32)
    mask, counting = np.zeros((len(rows), length), bool), np.arange(length, dtype=np.int32)
    for number, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, 1):
            stop = start + len(example["input_ids"])
            ids[number, start:stop] = example["input_ids"]
            mask[number, start:stop] = example["loss_mask"]
            segments[number, start:stop] = segment
            positions[number, start:stop] = counting[: stop - start]
            start = stop
    return {
        "input_ids": ids,
        "loss_mask": mask,
        "segment_ids": segments,
        "positions": positions,
    }


def eval_batches(source: Source, cfg: DataConfig) -> list[Batch]:
    """Every example once, in order but for packing; the last batch is filled with padding."""
    found = source.read(range(len(source)))
    examples = [example for row in found for example in row]
    lengths = np.array([len(example["input_ids"]) for example in examples])
    packed = pack(lengths, cfg, max_in_row(source, cfg), group_size(source, cfg))
    rows = [[examples[i] for i in row] for row in packed]
    size = cfg.batch_size
    rows += [[]] * (-len(rows) % size)
    return [filled(rows[i : i + size], cfg.length) for i in range(0, len(rows), size)]


def max_in_row(source: Source, cfg: DataConfig) -> int | None:
    """The most examples that a row takes; None for no bound."""
    most = max_segments(source, cfg)
    return None if most is None else most - 1  # the padding behind them is a segment as well


def max_segments(source: Source, cfg: DataConfig) -> int | None:
    """The most segments of a row, its padding counted as one; None for no bound.

    It is half as many again as fit on average. Attention on GPUs takes time and memory for as
    many, whether they are there or not. Short ones have no bound, and attention takes a mask.
    """
    if not cfg.pack or not len(source):
        return None
    most = 4 * math.ceil(1.5 * cfg.length / source.mean_length / 4)
    return most if most * SHORT <= cfg.length else None
