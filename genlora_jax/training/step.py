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
from genlora_jax.training.losses import Batch, Loss, cross_entropy
from genlora_jax.training.step_options import StepOptions
from genlora_jax.validation import all_finite

Metrics = dict[str, jax.Array]
DEFAULTS = StepOptions()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["adapter", "opt_state", "step", "key"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that changes in training.

    Attributes:
        adapter: The adapter, float32.
        opt_state: The optimizer's state over `adapter.trainable`.
        step: Steps taken, int32.
        key: Raw PRNG key of the dropout; each step folds its number into it.
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
    loss: Loss,
    options: StepOptions,
    dropout: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One step of one adapter; pure, and `vmap` over states trains several at once.

    The arguments are those of `make_train_step` and of the step that it returns, but for
    `generate` (adapter -> factors), and `options`, whose `chunk` counts the tokens of all shards.
    """
    key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    key = jax.random.fold_in(key, state.step)

    def factors_of(trainable: Any) -> Any:
        return generate(replace(state.adapter, trainable=trainable))

    # Factors are generated once a step, and the sum of the micro-batches' gradients is pulled back
    # through the generators once.
    factors, pull_back = jax.vjp(factors_of, state.adapter.trainable)

    def micro_loss(factors: Any, rows: Batch, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        micro_key = jax.random.fold_in(key, index) if dropout else None
        return loss(model, params, factors, rows, options, dropout=dropout, key=micro_key)

    compute = jax.value_and_grad(micro_loss, has_aux=True)

    def add_micro_batch(carry: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, compute(factors, part[1], part[0])), None

    count = options.accumulate
    if count == 1:
        (total, weight), gradient = compute(factors, batch, jnp.int32(0))
    else:
        # A micro-batch takes every count-th row, so that it is sharded as the batch is.
        rows = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
        zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, factors))
        sums, _ = jax.lax.scan(add_micro_batch, zero, (jnp.arange(count), rows))
        (total, weight), gradient = sums
    (gradient,) = pull_back(jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), gradient))
    trainable = state.adapter.trainable
    with jax.numpy_dtype_promotion("standard"):  # optax takes floats to an integer power
        updates, opt_state = optimizer.update(gradient, state.opt_state, trainable)
    adapter = replace(state.adapter, trainable=optax.apply_updates(trainable, updates))
    finite = jax.tree.map(all_finite, adapter.trainable)
    metrics = {
        "loss": total / jnp.maximum(weight, 1.0),
        "grad_norm": optax.global_norm(gradient),
        "adapter_finite": jnp.stack(jax.tree.leaves(finite)).all(),
        "trained_tokens": weight.astype(jnp.int32),
        "tokens": (batch["segment_ids"] != 0).sum(),
    }
    return replace(state, adapter=adapter, opt_state=opt_state, step=state.step + 1), metrics


def make_train_step(
    model: nn.Module,
    cfg: AdapterConfig,
    optimizer: optax.GradientTransformation,
    options: StepOptions = DEFAULTS,
    *,
    loss: Loss = cross_entropy,
    mesh: Mesh | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[TrainState, Mapping[str, Any], Batch], tuple[TrainState, Metrics]]:
    """A jitted step `(state, params, batch) -> (state, metrics)`; it is traced once.

    The state's buffers are donated. The base's parameters are an argument, not a constant, and
    no gradient of them is formed.

    Args:
        model: The base's model.
        cfg: The adapter's config, with the dropout of this run.
        optimizer: From `make_optimizer`.
        options: How the batch is computed.
        loss: What is minimised.
        mesh: Devices over which base and batch are sharded. The state is sharded as
            `sharding.state_specs` says, and metrics are replicated.
        compiler_options: XLA's, as `quantise.compiler_options` knows them for the base.

    Returns:
        The step. Its metrics are `loss` (mean over what the loss counts), `grad_norm`,
        `adapter_finite` (after the update), `trained_tokens` (what the loss counts) and `tokens`.
    """

    def generate(adapter: Adapter) -> Any:
        return sharding.constrain_tree(mesh, generate_factors(cfg, adapter), sharding.factor_specs)

    compute = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        generate=generate,
        loss=loss,
        options=options.over(mesh),
        dropout=cfg.dropout,
    )

    def step(
        state: TrainState, params: Mapping[str, Any], batch: Batch
    ) -> tuple[TrainState, Metrics]:
        return sharding.constrain_tree(mesh, compute(state, params, batch), sharding.state_specs)

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options)


def make_eval_step(
    model: nn.Module,
    options: StepOptions = DEFAULTS,
    *,
    loss: Loss = cross_entropy,
    mesh: Mesh | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[Mapping[str, Any], Mapping[str, Any], Batch], tuple[jax.Array, jax.Array]]:
    """A jitted `(params, factors, batch) -> (summed loss, what it counts)`; traced once."""

    def step(
        params: Mapping[str, Any], factors: Mapping[str, Any], batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        return loss(model, params, factors, batch, options.over(mesh))

    where = None if mesh is None else sharding.replicated(mesh)
    return jax.jit(step, out_shardings=where, compiler_options=compiler_options)


def evaluate(
    eval_step: Callable[..., tuple[jax.Array, jax.Array]],
    params: Mapping[str, Any],
    factors: Mapping[str, Any],
    batches: list[Any],
) -> float:
    """Mean loss (nats) over the trained tokens of all batches."""
    sums = [eval_step(params, factors, batch) for batch in batches]
    return sum(float(loss) for loss, _ in sums) / sum(float(weight) for _, weight in sums)
