"""Losses that a step can minimise. Logits are computed in chunks and never exist whole."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from genlora_jax.factors import in_dtype
from genlora_jax.inject import apply
from genlora_jax.training.step_options import StepOptions

HEAD = "lm_head"
Batch = Mapping[str, jax.Array]


def next_token_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Targets and their weights, aligned with the positions that predict them.

    A token is a target if it is in `loss_mask` and follows another one of its segment.

    Args:
        batch: As `train_batches` makes it, `[..., length]`.

    Returns:
        Targets int32 and weights float32, `[..., length]`; the last position has weight 0.
    """
    ids, segments = batch["input_ids"], batch["segment_ids"]

    def following(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)

    trained = following(batch["loss_mask"]) & (following(segments) == segments) & (segments != 0)
    return following(ids), trained.astype(jnp.float32)


def split_head(factors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The factors of the model's `hidden_states`, and those of its `head`."""
    body = {name: value for name, value in factors.items() if name != HEAD}
    return body, {name: value for name, value in factors.items() if name == HEAD}


def split_columns(x: jax.Array, width: int) -> jax.Array:
    """`[rows, length, ...]` -> `[chunks, rows, width, ...]`, the last chunk filled with zeros.

    A chunk has columns of all rows, so that a sharded batch stays sharded.
    """
    rows, length = x.shape[:2]
    chunks = -(-length // width)
    x = jnp.pad(x, [(0, 0), (0, chunks * width - length)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(rows, chunks, width, *x.shape[2:]).swapaxes(0, 1)


class Loss(Protocol):
    """What a step minimises: a function of a batch, summed so that micro-batches add up.

    `cross_entropy` is one. A preference loss is another; its batches have other fields. A loss may
    apply the model several times, with `{}` instead of the factors for the base alone.
    """

    def __call__(
        self,
        model: nn.Module,
        params: Mapping[str, Any],
        factors: Mapping[str, Any],
        batch: Batch,
        options: StepOptions,
        *,
        dropout: float = 0.0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the loss of a batch or of a micro-batch.

        Args:
            model: The base's model.
            params: The base's parameters.
            factors: The adapter's factors.
            batch: Arrays `[rows, ...]`.
            options: The step's, with a `chunk` that counts the tokens of all shards of the batch.
            dropout: Rate on the adapter's inputs.
            key: PRNG key of the dropout.

        Returns:
            The loss summed over what it counts, and how much that is: float32 scalars. The mean
            over a batch is the sum of the first over that of the second.
        """
        ...


def cross_entropy(
    model: nn.Module,
    params: Mapping[str, Any],
    factors: Mapping[str, Any],
    batch: Batch,
    options: StepOptions,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy (nats) of a batch's trained tokens, as a `Loss`, which has the arguments.

    The model has methods `hidden_states` and `head`, and its layers compute in its `dtype`. The
    batch has `input_ids`, `loss_mask`, `segment_ids` and `positions`, `[rows, length]`.

    The hidden states are computed whole. The head is computed a chunk of tokens at a time, and
    again in the backward pass: the logits of a chunk are all that ever exists. `options.chunk` is
    rounded up to the same number of tokens in every row.

    Returns:
        The sum, and the number of trained tokens: float32 scalars.
    """
    body, head = split_head(factors)
    # The layers would round the factors anyway. Rounding the whole stack here means that no float32
    # copy of the factors or of their gradients lives as long as the layers' pass.
    body = in_dtype(body, model.dtype)
    body_key, head_key = (None, None) if key is None else jax.random.split(key)
    hidden = apply(
        model,
        params,
        body,
        batch["input_ids"],
        method="hidden_states",
        positions=batch["positions"],
        segment_ids=batch["segment_ids"] if options.packed else None,
        dropout=dropout,
        rngs=None if body_key is None else {"dropout": body_key},
    )
    targets, weights = next_token_targets(batch)
    rows, length = weights.shape
    width = min(-(-options.chunk // rows), length)

    @jax.checkpoint
    def chunk_loss(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        index, states, target, weight = part
        rngs = None if head_key is None else {"dropout": jax.random.fold_in(head_key, index)}
        logits = apply(model, params, head, states, method="head", dropout=dropout, rngs=rngs)
        logits = logits.astype(jnp.float32)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - picked
        return total + jnp.vdot(losses, weight), None

    columns = [split_columns(x, width) for x in (hidden, targets, weights)]
    parts = (jnp.arange(len(columns[0])), *columns)
    total, _ = jax.lax.scan(chunk_loss, jnp.zeros(()), parts)
    return total, weights.sum()
