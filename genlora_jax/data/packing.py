"""Packing: examples to batches of rows of one length."""

import math
from collections.abc import Sequence

import grain
import grain.experimental
import numpy as np

from genlora_jax.data.config import DataConfig
from genlora_jax.data.examples import Example

# Measured on an H100 (`train.benchmarks.attention`): with fewer tokens than this for each segment
# that a row may have, attention is faster under a mask.
SHORT = 32


def train_batches(
    examples: Sequence[Example], cfg: DataConfig, *, epochs: int | None = None
) -> grain.IterDataset:
    """Shuffled batches; the iterator's state can be saved and restored.

    Args:
        examples: From `load_examples`.
        cfg: Shape, packing and seed.
        epochs: How often each example is seen; None for ever. Every epoch has another order.

    Returns:
        Batches of `input_ids`, `segment_ids` (0 at padding), `positions` int32 and `loss_mask`
        bool, all `[batch_size, length]`.
    """
    shuffled = grain.MapDataset.source(examples).seed(cfg.seed).shuffle().repeat(epochs)
    return _pack(shuffled, cfg, max_segments(examples, cfg))


def eval_batches(examples: Sequence[Example], cfg: DataConfig) -> list[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is filled with padding."""
    most = max_segments(examples, cfg)
    return list(_pack(grain.MapDataset.source(examples), cfg, most))


def max_segments(examples: Sequence[Example], cfg: DataConfig) -> int | None:
    """The most segments of a row, its padding counted as one; None for no bound.

    It is half as many again as fit on average. Attention on GPUs takes time and memory for as
    many, whether they are there or not. Short ones have no bound, and attention takes a mask.
    """
    if not cfg.pack or not examples:
        return None
    mean = sum(len(example["input_ids"]) for example in examples) / len(examples)
    most = 4 * math.ceil(1.5 * cfg.length / mean / 4)
    return most if most * SHORT <= cfg.length else None


def _pack(examples: grain.MapDataset, cfg: DataConfig, most: int | None) -> grain.IterDataset:
    def name_fields(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            "input_ids": row["input_ids"],
            "loss_mask": row["loss_mask"],
            "segment_ids": row["input_ids_segment_ids"],
            "positions": row["input_ids_positions"],
        }

    def stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        # The rows that a last batch lacks are all padding.
        missing = cfg.batch_size - len(rows)
        return {
            name: np.pad(np.stack([row[name] for row in rows]), ((0, missing), (0, 0)))
            for name in rows[0]
        }

    # The padding behind a row's examples is a segment as well.
    bound = None if most is None else most - 1
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
    packed = grain.experimental.FirstFitPackIterDataset(
        examples.to_iter_dataset(options),
        length_struct={"input_ids": cfg.length, "loss_mask": cfg.length},
        num_packing_bins=cfg.batch_size,
        shuffle_bins=False,
        max_sequences_per_bin=bound if cfg.pack else 1,
    )
    return packed.map(name_fields).batch(cfg.batch_size, batch_fn=stack)
