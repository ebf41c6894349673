"""What a run is trained for: a loss, and how rows become the batches that it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from genlora_jax.data.batches import train_batches
from genlora_jax.data.open_source import load_source
from genlora_jax.data.packing import eval_batches, max_segments
from genlora_jax.training.losses import Loss, cross_entropy
from genlora_jax.validation import require_choice


@dataclass(frozen=True)
class Objective:
    """A loss and its data.

    Attributes:
        loss: What a step minimises, and what an evaluation reports.
        load: `(paths, tokenizer, DataConfig) -> (source, report)`.
        train_batches: `(source, DataConfig, epochs=None, slots=None)` -> shuffled batches, as
            `data.batches.Batches`.
        eval_batches: `(source, DataConfig)` -> a list of batches, every example once.
        max_segments: `(source, DataConfig)` -> the most segments of a row of either,
            padding counted as one; None for no bound.
    """

    loss: Loss
    load: Callable[..., Any]
    train_batches: Callable[..., Any]
    eval_batches: Callable[..., Any]
    max_segments: Callable[..., int | None]


# The values of `train.objective`. A new one is a line here.
OBJECTIVES = {
    "sft": Objective(cross_entropy, load_source, train_batches, eval_batches, max_segments)
}


def find_objective(name: str) -> Objective:
    """The objective of a recipe; ValueError if there is none of that name."""
    require_choice("train.objective", name, OBJECTIVES)
    return OBJECTIVES[name]
