"""Sweeps: many adapters trained at once over one copy of the base.

The members of a sweep differ in numbers only: rates, seed, alpha. So one program trains them all,
by `vmap` over adapters and optimizer states; the base's products take all rows as one batch.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genlora_jax.adapter import Adapter, generate_factors, init_adapter
from genlora_jax.config import AdapterConfig
from genlora_jax.training.losses import Batch, next_token_targets, summed_loss
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.step import TrainState, init_state, train_step

Numbers = dict[str, jax.Array]  # by a Member's field, float32 [members]


@dataclass(frozen=True, kw_only=True)
class Member:
    """What one member of a sweep has of its own; all else is the recipe's.

    Attributes:
        learning_rate: As `optim.learning_rate`.
        generator_ratio: As `optim.generator_ratio`.
        seed: As `train.seed`: of the adapter's initial values and of dropout.
        alpha: As `adapter.alpha`.
    """

    learning_rate: float
    generator_ratio: float
    seed: int
    alpha: float

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        for name in ("learning_rate", "generator_ratio", "alpha"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not whole or self.seed < 0:
            raise ValueError(f"seed must be a whole number >= 0, got {self.seed!r}")


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a sweep's compiled programs depend on, beside shapes: one compilation each.

    Attributes:
        model: The base's model, without a mesh of its own.
        cfg: The adapter's config; its alpha is what the members' are relative to.
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

    def factors(self, adapter: Adapter, alpha: jax.Array) -> dict[str, Any]:
        """One member's factors; `b` carries the scale."""
        flat = flatten_dict(generate_factors(self.cfg, adapter))
        ratio = alpha / self.cfg.alpha
        return unflatten_dict({k: x * ratio if k[-1] == "b" else x for k, x in flat.items()})

    def optimizer(self, numbers: Numbers) -> Any:
        """One member's optimizer."""
        own = {name: numbers[name] for name in ("learning_rate", "generator_ratio")}
        return make_optimizer(self.optim, self.steps, **own)

    def own_chunk(self, numbers: Numbers) -> int:
        """Tokens of a chunk of one member's loss."""
        return max(self.chunk // len(numbers["alpha"]), 1)

    def spread(self, tree: Any, *axes: str) -> Any:
        """Lays leaves `[members, ...]` out over the mesh's `data`, further dimensions over axes."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, P("data", *axes)))

    def everyone(self, batch: Batch, numbers: Numbers) -> Batch:
        """A batch for each member: attention takes masks and tokens of the same leading size."""
        count = len(numbers["alpha"])
        copies = {k: jnp.broadcast_to(x, (count, *x.shape)) for k, x in batch.items()}
        return self.spread(copies, "fsdp")


@functools.partial(jax.jit, static_argnames="program", donate_argnames="states")
def train_members(
    states: TrainState,
    numbers: Numbers,
    params: Mapping[str, Any],
    batches: Batch,
    *,
    program: Program,
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
            generate=lambda adapter: program.factors(adapter, own["alpha"]),
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
    program: Program,
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
    factors = jax.vmap(program.factors)(adapters, numbers["alpha"])

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

    totals, _ = jax.lax.scan(add, jnp.zeros_like(numbers["alpha"]), batches)
    losses = totals / next_token_targets(batches)[1].sum()
    better = losses < best[1]  # never so of NaN

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    kept = jax.tree.map(keep, adapters, best[0])
    return losses, (program.spread(kept), jnp.where(better, losses, best[1]))


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What became of a sweep's members.

    Attributes:
        members: As they were given.
        loss: Training losses (nats), `[steps, members]`.
        grad_norm: Norms of the gradients before clipping, `[steps, members]`.
        eval_steps: Steps after which all were evaluated, `[evaluations]`.
        eval_loss: Their losses (nats), `[evaluations, members]`; NaN or infinite if diverged.
        best: Each member's adapter at its lowest evaluation loss, leaves `[members, ...]`;
            its initial one if no evaluation was finite.
        final: Their adapters after the last step.
    """

    members: tuple[Member, ...]
    loss: np.ndarray
    grad_norm: np.ndarray
    eval_steps: np.ndarray
    eval_loss: np.ndarray
    best: Adapter
    final: Adapter

    @property
    def diverged(self) -> np.ndarray:
        """First step at which a member's loss or gradient was not finite, `[members]`; 0: none."""
        bad = ~(np.isfinite(self.loss) & np.isfinite(self.grad_norm))
        first = np.where(bad.any(axis=0), bad.argmax(axis=0) + 1, 0)
        late = (first == 0) & ~np.isfinite(self.eval_loss[-1])  # the last step itself
        return np.where(late, len(self.loss), first)

    @property
    def best_loss(self) -> np.ndarray:
        """Lowest evaluation losses, `[members]`; infinite if none was finite."""
        return np.where(np.isfinite(self.eval_loss), self.eval_loss, np.inf).min(axis=0)

    @property
    def best_step(self) -> np.ndarray:
        """Steps of the lowest evaluation losses, `[members]`; 0 if none was finite."""
        finite = np.where(np.isfinite(self.eval_loss), self.eval_loss, np.inf)
        steps = self.eval_steps[finite.argmin(axis=0)]
        return np.where(np.isfinite(self.best_loss), steps, 0)

    @property
    def ranking(self) -> list[int]:
        """Indices of members by lowest evaluation loss; those that diverged come last."""
        return [int(i) for i in np.lexsort((self.best_loss, self.diverged > 0))]

    def adapter(self, index: int) -> Adapter:
        """One member's best adapter; its config is the sweep's with the member's alpha."""
        return jax.tree.map(lambda leaf: leaf[index], self.best)


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
    make_adapter: Callable[[int], Adapter] | None = None,
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
        make_adapter: Seed -> initial adapter; by default that of `init_adapter`.
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
    program = Program(
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
    best = (jax.tree.map(jnp.copy, states.adapter), jnp.full_like(numbers["alpha"], jnp.inf))
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
    program: Program,
    members: Sequence[Member],
    params: Mapping[str, Any],
    make_adapter: Callable[[int], Adapter] | None = None,
) -> tuple[TrainState, Numbers]:
    """The members' states before the first step, `[members, ...]`, and their numbers `[members]`.

    Raises:
        ValueError: If the mesh's `data` does not divide their number.
    """
    make = make_adapter or (lambda seed: init_adapter(program.cfg, jax.random.key(seed), params))
    own = [
        {field.name: getattr(member, field.name) for field in fields(Member)} for member in members
    ]
    optimizer = make_optimizer(program.optim, program.steps)
    singles = [init_state(make(member.seed), optimizer, member.seed) for member in members]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    numbers = {
        name: jnp.array([values[name] for values in own], jnp.float32)
        for name in ("learning_rate", "generator_ratio", "alpha")
    }
    if program.mesh is None:
        return states, numbers
    data = program.mesh.shape["data"]
    if len(members) % data:
        raise ValueError(f"{len(members)} members cannot be shared out over mesh.data = {data}")
    return jax.device_put((states, numbers), NamedSharding(program.mesh, P("data")))


def for_members(model: nn.Module) -> nn.Module:
    """The model without a mesh of its own: it would cut each member's rows over `data`."""
    if getattr(model, "mesh", None) is not None:
        model = model.clone(mesh=None)
    if getattr(model, "attention", None) == "cudnn":
        model = model.clone(attention="cudnn_vmap")
    return model


def _stack(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
