"""Packing: examples to batches of rows of one length."""

from collections.abc import Sequence
from typing import Any

import grain
import grain.experimental
import numpy as np

from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import Example


def _pack(dataset: grain.IterDataset, cfg: DataConfig) -> grain.IterDataset:
    lengths = {"input_ids": cfg.length, "loss_mask": cfg.length}
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset,
        length_struct=lengths,
        num_packing_bins=cfg.batch_size,
        shuffle_bins=False,
        max_sequences_per_bin=None if cfg.pack else 1,
    )
    return packed.map(
        lambda row: {
            "input_ids": row["input_ids"],
            "loss_mask": row["loss_mask"],
            "segment_ids": row["input_ids_segment_ids"],
            "positions": row["input_ids_positions"],
        }
    )


def train_batches(
    examples: Sequence[Example], cfg: DataConfig, *, epochs: int | None = None
) -> grain.IterDataset:
    """Shuffled batches; the iterator's state can be saved and restored.

    Args:
        examples: From `load_examples`.
        cfg: Shape, packing and seed.
        epochs: How often each example is seen; None for ever. Every epoch has its own order.

    Returns:
        Batches of `input_ids`, `segment_ids` (0 at padding), `positions` int32 and `loss_mask`
        bool, all `[batch_size, length]`.
    """
    rows = grain.MapDataset.source(examples).seed(cfg.seed).shuffle().repeat(epochs)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
    return _pack(rows.to_iter_dataset(options), cfg).batch(cfg.batch_size, batch_fn=_stack(cfg))


def eval_batches(examples: Sequence[Example], cfg: DataConfig) -> list[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is filled with padding."""
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
    rows = grain.MapDataset.source(examples).to_iter_dataset(options)
    return list(_pack(rows, cfg).batch(cfg.batch_size, batch_fn=_stack(cfg)))


def _stack(cfg: DataConfig) -> Any:
    """Stacks rows to a batch of full size, the missing ones all padding."""

    def stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        missing = cfg.batch_size - len(rows)
        return {
            name: np.pad(np.stack([row[name] for row in rows]), ((0, missing), (0, 0)))
            for name in rows[0]
        }

    return stack
