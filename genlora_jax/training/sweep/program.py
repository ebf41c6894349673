"""The programs of a sweep: steps and evaluations of all members, over one base.

The members of a sweep differ in numbers only: rates, seed, alpha. So one program trains them all,
by `vmap` over adapters and optimizer states. The base's products take all rows as one batch.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genlora_jax.adapter import Adapter, generate_factors
from genlora_jax.factors import SCALED
from genlora_jax.mesh import one_device
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.training.losses import Batch, Loss, cross_entropy
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.step import DEFAULTS, TrainState, train_step
from genlora_jax.training.step_options import StepOptions

# "learning_rate", "generator_ratio" and "scale" (over the config's): float32 [members].
Numbers = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class SweepProgram:
    """What a sweep's compiled programs depend on, beside shapes: one compilation each.

    Attributes:
        model: The base's model. Its mesh is not used: that would shard each member's rows over
            `data`.
        cfg: The adapters' config; members' scales are relative to its scale.
        optim: The optimizer's settings, but for the rates, which are the members'.
        steps: Length of the run.
        options: The options of a step, whose `chunk` is divided among the members of a pass.
        loss: What is minimised, and what tells which member is best.
        members_per_pass: Members whose activations exist at a time; divides their number, and
            is divided by the mesh's `data`. None, or as many as there are, for all at once.
        mesh: Members are sharded over its axis `data`, rows of the batch over `fsdp`. By default
            it has this process's first device alone.
    """

    model: nn.Module
    cfg: AdapterConfig
    optim: OptimConfig
    steps: int
    options: StepOptions = DEFAULTS
    loss: Loss = cross_entropy
    members_per_pass: int | None = None
    mesh: Mesh = field(default_factory=one_device)

    def __post_init__(self) -> None:
        """Removes the model's mesh, and gives the model an attention that `vmap` can batch."""
        model = self.model
        if getattr(model, "mesh", None) is not None:
            model = model.clone(mesh=None)
        if getattr(model, "attention", None) in ("auto", "cudnn"):
            model = model.clone(attention="vmap")
        object.__setattr__(self, "model", model)

    def factors(self, adapter: Adapter, scale: jax.Array) -> dict[str, Any]:
        """One member's factors, as `generate_factors` makes them, times its scale (a scalar)."""
        flat = flatten_dict(generate_factors(self.cfg, adapter))
        return unflatten_dict({k: x * scale if k[-1] in SCALED else x for k, x in flat.items()})

    def optimizer(self, numbers: Numbers) -> Any:
        """One member's optimizer; its numbers are scalars."""
        rates = {name: numbers[name] for name in ("learning_rate", "generator_ratio")}
        return make_optimizer(self.optim, self.steps, **rates)

    def member_options(self, numbers: Numbers) -> StepOptions:
        """The options of one member's step: its share of a pass's chunk."""
        options = self.options.over(self.mesh)
        if self.mesh.size > 1:  # without a mesh of the model's, JAX would not shard the segments
            options = replace(options, max_segments=None)
        return replace(options, chunk=max(options.chunk // self.pass_size(numbers), 1))

    def pass_size(self, numbers: Numbers) -> int:
        """Members of a pass."""
        count = len(numbers["scale"])
        return count if self.members_per_pass is None else min(self.members_per_pass, count)

    def shard_members(self, tree: Any, *axes: str) -> Any:
        """Shards leaves `[members, ...]` over the mesh's `data`, further dimensions over axes."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, P("data", *axes)))

    def in_passes(self, compute: Callable[..., Any], tree: Any, numbers: Numbers) -> Any:
        """`compute(tree, numbers)` of leaves `[members, ...]`, a pass of members at a time.

        `compute` returns leaves `[members of the pass, ...]`; they are joined to `[members, ...]`.
        """
        count, size = len(numbers["scale"]), self.pass_size(numbers)
        if size == count:
            return compute(tree, numbers)
        # A pass takes a share of every device's members, so that none of them moves.
        devices = self.mesh.shape["data"]

        def split(x: jax.Array) -> jax.Array:
            shares = x.reshape(devices, count // size, size // devices, *x.shape[1:])
            return shares.swapaxes(0, 1).reshape(count // size, size, *x.shape[1:])

        def join(x: jax.Array) -> jax.Array:
            shares = x.reshape(count // size, devices, size // devices, *x.shape[2:])
            return shares.swapaxes(0, 1).reshape(count, *x.shape[2:])

        parts = jax.tree.map(split, (tree, numbers))
        return jax.tree.map(join, jax.lax.map(lambda part: compute(*part), parts))

    def copy_batch(self, batch: Batch, numbers: Numbers) -> Batch:
        """A batch for each member: attention takes masks and tokens of the same leading size."""
        count = len(numbers["scale"])
        copies = {k: jnp.broadcast_to(x, (count, *x.shape)) for k, x in batch.items()}
        return self.shard_members(copies, "fsdp")


@functools.partial(jax.jit, static_argnames="program", donate_argnames="states")
def train_members(
    states: TrainState,
    numbers: Numbers,
    params: Mapping[str, Any],
    batches: Batch,
    *,
    program: SweepProgram,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Some steps of all members, in one call.

    Args:
        states: The members' states, leaves `[members, ...]`; donated.
        numbers: The numbers in which the members differ, `[members]`.
        params: The base's parameters.
        batches: `[steps, rows, length]`, the same for all members.
        program: The static part.

    Returns:
        The next states, and `loss` and `grad_norm` `[steps, members]`.
    """

    def member_step(state: TrainState, member: Numbers, batch: Batch) -> Any:
        return train_step(
            state,
            params,
            batch,
            model=program.model,
            optimizer=program.optimizer(member),
            generate=lambda adapter: program.factors(adapter, member["scale"]),
            loss=program.loss,
            options=program.member_options(numbers),
            dropout=program.cfg.dropout,
        )

    def step(states: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        def one_pass(states: TrainState, members: Numbers) -> Any:
            copies = program.copy_batch(batch, members)
            return jax.vmap(member_step)(program.shard_members(states), members, copies)

        states, metrics = program.in_passes(one_pass, states, numbers)
        curves = {name: metrics[name] for name in ("loss", "grad_norm")}
        return program.shard_members(states), curves

    return jax.lax.scan(step, program.shard_members(states), batches)


@functools.partial(jax.jit, static_argnames="program")
def evaluate_members(
    adapters: Adapter,
    best: tuple[Adapter, jax.Array],
    numbers: Numbers,
    params: Mapping[str, Any],
    batches: Batch,
    *,
    program: SweepProgram,
) -> tuple[jax.Array, tuple[Adapter, jax.Array]]:
    """All members' evaluation losses, and their best adapters so far.

    Args:
        adapters: The members' adapters, leaves `[members, ...]`.
        best: Their best adapters before, and those adapters' losses `[members]`.
        numbers: The numbers in which the members differ, `[members]`.
        params: The base's parameters.
        batches: `[batches, rows, length]`.
        program: The static part.

    Returns:
        Mean losses over what the loss counts, `[members]`, and `best` brought up to date.
    """
    options = program.member_options(numbers)

    def member_loss(factors: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return program.loss(program.model, params, factors, batch, options)

    def one_pass(adapters: Adapter, members: Numbers) -> Any:
        factors = jax.vmap(program.factors)(program.shard_members(adapters), members["scale"])
        zeros = jnp.zeros_like(members["scale"])

        def add(totals: Any, batch: Batch) -> tuple[Any, None]:
            sums = jax.vmap(member_loss)(factors, program.copy_batch(batch, members))
            return jax.tree.map(jnp.add, totals, sums), None

        return jax.lax.scan(add, (zeros, zeros), batches)[0]

    totals, weights = program.in_passes(one_pass, adapters, numbers)
    losses = totals / weights
    better = losses < best[1]  # False for NaN

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    kept = jax.tree.map(keep, adapters, best[0])
    return losses, (program.shard_members(kept), jnp.where(better, losses, best[1]))
