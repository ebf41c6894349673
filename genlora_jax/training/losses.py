"""Losses that a step can minimise. Logits are computed in chunks and never exist whole."""

import functools
from collections.abc import Callable, Mapping
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

    The hidden states are computed whole, the head a chunk of tokens at a time, so that the logits
    of a chunk are all that ever exists. Its gradient is computed with its loss, so that they are
    computed once. `options.chunk` is rounded up to the same number of tokens in every row.

    Returns:
        The sum, and the number of trained tokens: float32 scalars.
    """
    body, head = split_head(factors)
    # The layers would round the factors anyway. Rounding the whole stack here means that no float32
    # copy of the factors or of their gradients lives as long as the layers' pass.
    body = in_dtype(body, model.dtype)
    body_key, head_key = (None, None) if key is None else jax.random.split(key)
    # Another model's `hidden_states` need not know of it.
    known: dict[str, Any] = {}
    if options.max_segments is not None:
        known["max_segments"] = options.max_segments
    hidden = apply(
        model,
        params,
        body,
        batch["input_ids"],
        method="hidden_states",
        positions=batch["positions"],
        segment_ids=batch["segment_ids"] if options.packed else None,
        **known,
        dropout=dropout,
        rngs=None if body_key is None else {"dropout": body_key},
    )
    targets, weights = next_token_targets(batch)
    rows, length = weights.shape
    width = min(-(-options.chunk // rows), length)

    def chunk_loss(states: jax.Array, shared: Any, columns: Any) -> jax.Array:
        head, params, key = shared
        index, target, weight = columns
        rngs = None if key is None else {"dropout": jax.random.fold_in(key, index)}
        logits = apply(model, params, head, states, method="head", dropout=dropout, rngs=rngs)
        logits = logits.astype(jnp.float32)
        # A comparison fuses with what else reads the logits, in both directions. A gather does not.
        tokens = jax.lax.broadcasted_iota(target.dtype, logits.shape, logits.ndim - 1)
        picked = jnp.where(tokens == target[..., None], logits, 0).sum(axis=-1)
        return jnp.vdot(jax.nn.logsumexp(logits, axis=-1) - picked, weight)

    states, *columns = [split_columns(x, width) for x in (hidden, targets, weights)]
    columns = [jnp.arange(len(states)), *columns]
    return _sum_over_chunks(chunk_loss, states, (head, params, head_key), columns), weights.sum()


ChunkLoss = Callable[[jax.Array, Any, Any], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_chunks(loss: ChunkLoss, states: jax.Array, shared: Any, columns: Any) -> jax.Array:
    """Sum over i of `loss(states[i], shared, columns[i])`; its gradient is computed with it."""

    def add(total: jax.Array, part: tuple[Any, Any]) -> tuple[jax.Array, None]:
        return total + loss(part[0], shared, part[1]), None

    return jax.lax.scan(add, jnp.zeros(()), (states, columns))[0]


def _sum_forward(loss: ChunkLoss, states: Any, shared: Any, columns: Any) -> tuple[jax.Array, Any]:
    """The sum, and its gradients in `states` and in what of `shared` is differentiated."""
    tree: Any
    leaves, tree = jax.tree.flatten(shared, is_leaf=lambda x: hasattr(x, "perturbed"))
    states, columns = jax.tree.map(lambda x: x.value, (states, columns))

    def loss_of(states: jax.Array, moved: list[Any], columns: Any) -> jax.Array:
        values = iter(moved)
        whole = [next(values) if x.perturbed else x.value for x in leaves]
        return loss(states, tree.unflatten(whole), columns)

    compute = jax.value_and_grad(loss_of, argnums=(0, 1))
    moved = [x.value for x in leaves if x.perturbed]

    def add(carry: Any, part: tuple[Any, Any]) -> tuple[Any, jax.Array]:
        value, (d_states, d_moved) = compute(part[0], moved, part[1])
        return jax.tree.map(jnp.add, carry, (value, d_moved)), d_states

    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, moved)
    (total, d_moved), d_states = jax.lax.scan(add, zero, (states, columns))
    gradients = iter(d_moved)
    return total, (
        d_states,
        tree.unflatten([next(gradients) if x.perturbed else None for x in leaves]),
    )


def _sum_backward(loss: ChunkLoss, gradients: Any, scale: jax.Array) -> Any:
    scaled = jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), gradients)
    return (*scaled, None)


_sum_over_chunks.defvjp(_sum_forward, _sum_backward, symbolic_zeros=True)
