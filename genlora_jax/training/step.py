"""One training step: factors once, gradients of the adapter alone, accumulation by tokens."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from genlora_jax import sharding
from genlora_jax.adapter import Adapter, generate_factors
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.training.losses import Batch, next_token_targets, summed_loss

Metrics = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["adapter", "opt_state", "step", "key"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that changes in training.

    Attributes:
        adapter: The adapter, float32.
        opt_state: The optimizer's state over `adapter.trainable`.
        step: Steps taken, int32.
        key: Raw PRNG key of the dropout; the step's own key is folded from it.
    """

    adapter: Adapter
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array


def init_state(
    adapter: Adapter, optimizer: optax.GradientTransformation, seed: int = 0
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        adapter=adapter,
        opt_state=optimizer.init(adapter.trainable),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
    )


def train_step(
    state: TrainState,
    params: Mapping[str, Any],
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    generate: Callable[[Adapter], Any],
    dropout: float = 0.0,
    accumulate: int = 1,
    chunk: int = 1024,
    packed: bool = True,
) -> tuple[TrainState, Metrics]:
    """One step of one adapter; pure, and `vmap` over states trains several at once.

    Args:
        state: What the step changes.
        params: The base's parameters.
        batch: As `train_batches` makes it.
        model: The base's model.
        optimizer: From `make_optimizer`.
        generate: Adapter -> factors.
        dropout: Rate on the adapter's inputs.
        accumulate: As for `make_train_step`.
        chunk: Tokens a chunk of the loss.
        packed: Whether a row may hold several segments.

    Returns:
        The next state, and the metrics that `make_train_step` names.
    """
    key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    key = jax.random.fold_in(key, state.step)

    def factors_of(trainable: Any) -> Any:
        return generate(replace(state.adapter, trainable=trainable))

    # Once a step; the parts' gradients meet at the factors and go back through here once.
    factors, pull_back = jax.vjp(factors_of, state.adapter.trainable)

    def part_loss(factors: Any, part: Batch, index: jax.Array) -> jax.Array:
        return summed_loss(
            model,
            params,
            factors,
            part,
            chunk=chunk,
            packed=packed,
            dropout=dropout,
            key=jax.random.fold_in(key, index) if dropout else None,
        )

    def accumulate_part(carry: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        value, gradient = jax.value_and_grad(part_loss)(factors, part[1], part[0])
        return jax.tree.map(jnp.add, carry, (value, gradient)), None

    if accumulate == 1:
        total, gradient = jax.value_and_grad(part_loss)(factors, batch, jnp.int32(0))
    else:
        # Every accumulate-th row, so that devices have their share of every part.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, factors))
        (total, gradient), _ = jax.lax.scan(accumulate_part, zero, (jnp.arange(accumulate), parts))
    weight = next_token_targets(batch)[1].sum()
    (gradient,) = pull_back(jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), gradient))
    trainable = state.adapter.trainable
    updates, opt_state = optimizer.update(gradient, state.opt_state, trainable)
    adapter = replace(state.adapter, trainable=optax.apply_updates(trainable, updates))
    metrics = {
        "loss": total / jnp.maximum(weight, 1.0),
        "grad_norm": optax.global_norm(gradient),
        "trained_tokens": weight.astype(jnp.int32),
        "tokens": (batch["segment_ids"] != 0).sum(),
    }
    return replace(state, adapter=adapter, opt_state=opt_state, step=state.step + 1), metrics


def make_train_step(
    model: nn.Module,
    cfg: AdapterConfig,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    chunk: int = 1024,
    packed: bool = True,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Mapping[str, Any], Batch], tuple[TrainState, Metrics]]:
    """A jitted step `(state, params, batch) -> (state, metrics)`; it is traced once.

    The state's buffers are donated. The base's parameters are an argument, not a constant, and
    no gradient of them is ever formed.

    Args:
        model: The base's model.
        cfg: The adapter's config.
        optimizer: From `make_optimizer`.
        accumulate: Parts into which a batch's rows are cut; a token weighs the same in each.
        chunk: Tokens a chunk of the loss.
        packed: Whether a row may hold several segments.
        mesh: Devices over which base and batch lie; the state lies as `sharding.state_specs`
            says, and metrics are on all of them.

    Returns:
        The step. Its metrics are `loss` (mean over trained tokens, nats), `grad_norm`,
        `trained_tokens` and `tokens`.
    """

    def generate(adapter: Adapter) -> Any:
        return sharding.lay_out(mesh, generate_factors(cfg, adapter), sharding.factor_specs)

    compute = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        generate=generate,
        dropout=cfg.dropout,
        accumulate=accumulate,
        chunk=chunk,
        packed=packed,
    )

    def step(
        state: TrainState, params: Mapping[str, Any], batch: Batch
    ) -> tuple[TrainState, Metrics]:
        return sharding.lay_out(mesh, compute(state, params, batch), sharding.state_specs)

    return jax.jit(step, donate_argnums=0)


def make_eval_step(
    model: nn.Module, *, chunk: int = 1024, packed: bool = True, mesh: Mesh | None = None
) -> Callable[[Mapping[str, Any], Mapping[str, Any], Batch], tuple[jax.Array, jax.Array]]:
    """A jitted `(params, factors, batch) -> (summed loss, number of tokens)`; traced once."""

    def step(
        params: Mapping[str, Any], factors: Mapping[str, Any], batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        loss = summed_loss(model, params, factors, batch, chunk=chunk, packed=packed)
        return loss, next_token_targets(batch)[1].sum()

    everywhere = None if mesh is None else sharding.replicated(mesh)
    return jax.jit(step, out_shardings=everywhere)


def evaluate(
    eval_step: Callable[..., tuple[jax.Array, jax.Array]],
    params: Mapping[str, Any],
    factors: Mapping[str, Any],
    batches: list[Any],
) -> float:
    """Mean loss (nats) over the trained tokens of all batches."""
    sums = [eval_step(params, factors, batch) for batch in batches]
    return sum(float(loss) for loss, _ in sums) / sum(float(weight) for _, weight in sums)
