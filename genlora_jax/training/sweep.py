"""Sweeps: many adapters trained at once over one copy of the base.

The members of a sweep differ in numbers only: rates, seed, alpha. So one program trains them all,
by `vmap` over adapters and optimizer states; the base's products take all rows as one batch.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genlora_jax.adapter import Adapter, generate_factors, init_adapter
from genlora_jax.config import AdapterConfig, LowRankConfig
from genlora_jax.factors import SCALED
from genlora_jax.training.losses import Batch, next_token_targets, summed_loss
from genlora_jax.training.members import Member, SweepResult
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.step import TrainState, init_state, train_step

Numbers = dict[str, jax.Array]  # rates, and scales over the config's, float32 [members]


@dataclass(frozen=True, kw_only=True)
class SweepProgram:
    """What a sweep's compiled programs depend on, beside shapes: one compilation each.

    Attributes:
        model: The base's model, without a mesh of its own.
        cfg: The adapter's config; members' scales are relative to its own.
        optim: The optimizer's settings but for what members have of their own.
        steps: Length of the run.
        accumulate: Parts into which a batch is cut.
        chunk: Tokens of a chunk of the loss, of all members together.
        packed: Whether a row may hold several segments.
        mesh: Members lie over its axis `data`, rows of the batch over `fsdp`.
    """

    model: nn.Module
    cfg: AdapterConfig
    optim: OptimConfig
    steps: int
    accumulate: int = 1
    chunk: int = 1024
    packed: bool = True
    mesh: Mesh | None = None

    def factors(self, adapter: Adapter, scale: jax.Array) -> dict[str, Any]:
        """One member's factors, with its scale."""
        flat = flatten_dict(generate_factors(self.cfg, adapter))
        return unflatten_dict({k: x * scale if k[-1] in SCALED else x for k, x in flat.items()})

    def optimizer(self, numbers: Numbers) -> Any:
        """One member's optimizer."""
        own = {name: numbers[name] for name in ("learning_rate", "generator_ratio")}
        return make_optimizer(self.optim, self.steps, **own)

    def own_chunk(self, numbers: Numbers) -> int:
        """Tokens of a chunk of one member's loss."""
        return max(self.chunk // len(numbers["scale"]), 1)

    def spread(self, tree: Any, *axes: str) -> Any:
        """Lays leaves `[members, ...]` out over the mesh's `data`, further dimensions over axes."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, P("data", *axes)))

    def everyone(self, batch: Batch, numbers: Numbers) -> Batch:
        """A batch for each member: attention takes masks and tokens of the same leading size."""
        count = len(numbers["scale"])
        copies = {k: jnp.broadcast_to(x, (count, *x.shape)) for k, x in batch.items()}
        return self.spread(copies, "fsdp")


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
        numbers: What the members have of their own, `[members]`.
        params: The base's parameters.
        batches: `[steps, rows, length]`, the same for all members.
        program: The static part.

    Returns:
        The next states, and `loss` and `grad_norm` `[steps, members]`.
    """

    def member_step(state: TrainState, own: Numbers, batch: Batch) -> Any:
        return train_step(
            state,
            params,
            batch,
            model=program.model,
            optimizer=program.optimizer(own),
            generate=lambda adapter: program.factors(adapter, own["scale"]),
            dropout=program.cfg.dropout,
            accumulate=program.accumulate,
            chunk=program.own_chunk(numbers),
            packed=program.packed,
        )

    def step(states: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        copies = program.everyone(batch, numbers)
        states, metrics = jax.vmap(member_step)(states, numbers, copies)
        return program.spread(states), {name: metrics[name] for name in ("loss", "grad_norm")}

    return jax.lax.scan(step, program.spread(states), batches)


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
        numbers: What the members have of their own, `[members]`.
        params: The base's parameters.
        batches: `[batches, rows, length]`.
        program: The static part.

    Returns:
        Mean losses (nats) over trained tokens, `[members]`, and `best` brought up to date.
    """
    factors = jax.vmap(program.factors)(adapters, numbers["scale"])

    def member_loss(factors: Any, batch: Batch) -> jax.Array:
        return summed_loss(
            program.model,
            params,
            factors,
            batch,
            chunk=program.own_chunk(numbers),
            packed=program.packed,
        )

    def add(totals: jax.Array, batch: Batch) -> tuple[jax.Array, None]:
        return totals + jax.vmap(member_loss)(factors, program.everyone(batch, numbers)), None

    totals, _ = jax.lax.scan(add, jnp.zeros_like(numbers["scale"]), batches)
    losses = totals / next_token_targets(batches)[1].sum()
    better = losses < best[1]  # never so of NaN

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    kept = jax.tree.map(keep, adapters, best[0])
    return losses, (program.spread(kept), jnp.where(better, losses, best[1]))


def run_sweep(
    model: nn.Module,
    params: Mapping[str, Any],
    cfg: AdapterConfig,
    members: Sequence[Member],
    batches: Iterator[Mapping[str, np.ndarray]],
    held_out: Sequence[Mapping[str, np.ndarray]],
    *,
    optim: OptimConfig,
    steps: int,
    eval_every: int | None = None,
    accumulate: int = 1,
    chunk: int = 1024,
    packed: bool = True,
    steps_per_call: int = 16,
    mesh: Mesh | None = None,
    make_adapter: Callable[[AdapterConfig, int], Adapter] | None = None,
    report: Callable[[int, np.ndarray], None] | None = None,
) -> SweepResult:
    """Trains adapters that share a base and its batches, and differ in their members' numbers.

    Every member is what a run of its own would make it, to float32 rounding. Sweeps of the same
    settings and number of members share their compiled programs.

    Args:
        model: The base's model.
        params: Its parameters; on a mesh, laid out there.
        cfg: The adapters' config.
        members: What each has of its own.
        batches: As `train_batches` makes them; `steps` are taken.
        held_out: Batches to evaluate on, of one shape: they select the best.
        optim: The optimizer's settings; members have their own rates.
        steps: Length of the run.
        eval_every: Steps between evaluations; None for one at the end only.
        accumulate: Parts into which a batch is cut to save memory.
        chunk: Tokens of a chunk of the loss, of all members together.
        packed: Whether a row may hold several segments.
        steps_per_call: Most steps in one call of the device; the number taken divides `steps` and
            `eval_every`.
        mesh: Members are cut over its axis `data`; the base may be cut over `fsdp`.
        make_adapter: Config, seed -> initial adapter; by default that of `init_adapter`.
        report: Called with step and losses after each evaluation.

    Returns:
        The members' losses and adapters.

    Raises:
        ValueError: If there are no members or no batches to evaluate on, or the mesh does not
            divide them.
    """
    if not members:
        raise ValueError("a sweep needs at least one member")
    if not held_out:
        raise ValueError("a sweep needs batches to evaluate on: they tell which member is best")
    if steps < 1 or steps_per_call < 1 or (eval_every is not None and eval_every < 1):
        raise ValueError("steps, eval_every and steps_per_call must be at least 1")
    program = SweepProgram(
        model=for_members(model),
        cfg=cfg,
        optim=optim,
        steps=steps,
        accumulate=accumulate,
        chunk=chunk,
        packed=packed,
        mesh=mesh,
    )
    states, numbers = initial_states(program, members, params, make_adapter)
    evaluation = _stack(held_out)
    best = (jax.tree.map(jnp.copy, states.adapter), jnp.full_like(numbers["scale"], jnp.inf))
    due = min(eval_every or steps, steps)
    common = math.gcd(steps, due)
    per_call = max(n for n in range(1, min(steps_per_call, common) + 1) if common % n == 0)

    metrics, eval_steps, eval_losses = [], [], []
    for step in range(per_call, steps + 1, per_call):
        taken = list(itertools.islice(batches, per_call))
        if len(taken) < per_call:
            raise ValueError(f"the batches ended before step {step}; a sweep of {steps} needs more")
        stacked = _stack(taken)
        states, new = train_members(states, numbers, params, stacked, program=program)
        metrics.append(new)  # on the device: nobody waits for them before the next evaluation
        if step % due == 0 or step == steps:
            losses, best = evaluate_members(
                states.adapter, best, numbers, params, evaluation, program=program
            )
            eval_steps.append(step)
            eval_losses.append(np.asarray(losses))
            if report is not None:
                report(step, eval_losses[-1])
    curves = jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(metrics))
    return SweepResult(
        members=tuple(members),
        loss=curves["loss"],
        grad_norm=curves["grad_norm"],
        eval_steps=np.array(eval_steps),
        eval_loss=np.stack(eval_losses),
        best=best[0],
        final=states.adapter,
    )


def initial_states(
    program: SweepProgram,
    members: Sequence[Member],
    params: Mapping[str, Any],
    make_adapter: Callable[[AdapterConfig, int], Adapter] | None = None,
) -> tuple[TrainState, Numbers]:
    """The members' states before the first step, `[members, ...]`, and their numbers `[members]`.

    Raises:
        ValueError: If the mesh's `data` does not divide their number.
    """
    cfg = program.cfg

    def draw(cfg: AdapterConfig, seed: int) -> Adapter:
        return init_adapter(cfg, jax.random.key(seed), params)

    configs = [member.config(cfg) for member in members]
    # What is drawn is the same whatever alpha is; what is read from the base is divided by it.
    starts = configs if cfg.reads_base else [cfg] * len(members)
    optimizer = make_optimizer(program.optim, program.steps)
    singles = [
        init_state((make_adapter or draw)(start, member.seed), optimizer, member.seed)
        for start, member in zip(starts, members, strict=True)
    ]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    scales = [_scale(own) / _scale(cfg) for own in configs]
    numbers = {
        "learning_rate": jnp.array([member.learning_rate for member in members], jnp.float32),
        "generator_ratio": jnp.array([member.generator_ratio for member in members], jnp.float32),
        "scale": jnp.array(scales, jnp.float32),
    }
    if program.mesh is None:
        return states, numbers
    data = program.mesh.shape["data"]
    if len(members) % data:
        raise ValueError(f"{len(members)} members cannot be shared out over mesh.data = {data}")
    return jax.device_put((states, numbers), NamedSharding(program.mesh, P("data")))


def _scale(cfg: AdapterConfig) -> float:
    return cfg.scale if isinstance(cfg, LowRankConfig) else 1.0


def for_members(model: nn.Module) -> nn.Module:
    """The model without a mesh of its own: it would cut each member's rows over `data`."""
    if getattr(model, "mesh", None) is not None:
        model = model.clone(mesh=None)
    if getattr(model, "attention", None) == "cudnn":
        model = model.clone(attention="cudnn_vmap")
    return model


def _stack(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
