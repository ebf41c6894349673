"""Sweeps: many adapters trained at once over one copy of the base."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genlora_jax.adapter import Adapter, init_adapter
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.training.optim import make_optimizer
from genlora_jax.training.step import TrainState, init_state
from genlora_jax.training.sweep.members import Member
from genlora_jax.training.sweep.program import (
    Numbers,
    SweepProgram,
    evaluate_members,
    train_members,
)


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
        # The update of the last step shows in the evaluation alone.
        late = (first == 0) & ~np.isfinite(self.eval_loss[-1])
        return np.where(late, len(self.loss), first)

    @property
    def _finite_eval_loss(self) -> np.ndarray:
        return np.where(np.isfinite(self.eval_loss), self.eval_loss, np.inf)

    @property
    def best_loss(self) -> np.ndarray:
        """Lowest evaluation losses, `[members]`; infinite if none was finite."""
        return self._finite_eval_loss.min(axis=0)

    @property
    def best_step(self) -> np.ndarray:
        """Steps of the lowest evaluation losses, `[members]`; 0 if none was finite."""
        steps = self.eval_steps[self._finite_eval_loss.argmin(axis=0)]
        return np.where(np.isfinite(self.best_loss), steps, 0)

    @property
    def ranking(self) -> list[int]:
        """Indices of members by lowest evaluation loss, `best_loss`.

        A member that diverged later keeps its place: its best adapter is from before.
        """
        return [int(i) for i in np.argsort(self.best_loss, kind="stable")]

    def adapter(self, index: int) -> Adapter:
        """One member's best adapter, with the config that the member's alpha makes."""
        adapter = jax.tree.map(lambda leaf: leaf[index], self.best)
        return adapter.with_config(self.members[index].config(adapter.config))


def run_sweep(
    program: SweepProgram,
    params: Mapping[str, Any],
    members: Sequence[Member],
    batches: Iterator[Mapping[str, np.ndarray]],
    held_out: Sequence[Mapping[str, np.ndarray]],
    *,
    eval_every: int | None = None,
    steps_per_call: int = 16,
    make_adapter: Callable[[AdapterConfig, int], Adapter] | None = None,
    report: Callable[[int, np.ndarray], None] | None = None,
    stop: Callable[[int], bool] | None = None,
) -> SweepResult:
    """Trains adapters that share a base and its batches, and differ in their members' numbers.

    Every member becomes what a run of it alone would make, to float32 rounding. Sweeps of the same
    program and number of members share what is compiled.

    Args:
        program: Model, config, optimizer, steps, options and mesh.
        params: The base's parameters, sharded over the program's mesh.
        members: The numbers in which the members differ.
        batches: As `train_batches` makes them, `[rows, length]`; `program.steps` are taken. The
            mesh's `fsdp` divides their rows.
        held_out: Batches to evaluate on, of one shape: they select the best.
        eval_every: Steps between evaluations; None for one at the end only.
        steps_per_call: Most steps in one call of the device; the number taken divides the steps
            and `eval_every`.
        make_adapter: Config, seed -> initial adapter; by default that of `init_adapter`.
        report: Called with step and losses after each evaluation.
        stop: Called with the last step of each call; True to evaluate and end there.

    Returns:
        The members' losses and adapters, up to where it ended.

    Raises:
        ValueError: If there are no members or no batches to evaluate on, or the mesh or
            `members_per_pass` does not divide them.
    """
    steps = program.steps
    if not held_out:
        raise ValueError("a sweep needs batches to evaluate on: they tell which member is best")
    if steps < 1 or steps_per_call < 1 or (eval_every is not None and eval_every < 1):
        raise ValueError("steps, eval_every and steps_per_call must be at least 1")
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
        states, new = train_members(states, numbers, params, _stack(taken), program=program)
        metrics.append(new)
        # Two calls are under way at most, or else a stop would wait for all of them.
        jax.block_until_ready(metrics[-2:-1])
        stopped = stop is not None and stop(step)
        if step % due == 0 or step == steps or stopped:
            losses, best = evaluate_members(
                states.adapter, best, numbers, params, evaluation, program=program
            )
            eval_steps.append(step)
            eval_losses.append(np.asarray(losses))
            if report is not None:
                report(step, eval_losses[-1])
        if stopped:
            break
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


def check_members(count: int, mesh: Mesh, members_per_pass: int | None) -> None:
    """Checks that so many members can be sharded over the mesh's `data`, in passes of one size.

    Raises:
        ValueError: If there are none, or `data` or `members_per_pass` does not divide them.
    """
    data = mesh.shape["data"]
    if not count:
        raise ValueError("a sweep needs at least one member")
    if count % data:
        raise ValueError(f"{count} members cannot be sharded over mesh.data = {data}")
    if members_per_pass is None or members_per_pass >= count:
        return
    sizes = [n for n in range(data, count + 1, data) if count % n == 0]
    if members_per_pass not in sizes:
        raise ValueError(
            f"members_per_pass ({members_per_pass}) must divide the number of members ({count}) "
            f"and be a multiple of mesh.data ({data}): one of {', '.join(map(str, sizes))}"
        )


def initial_states(
    program: SweepProgram,
    members: Sequence[Member],
    params: Mapping[str, Any],
    make_adapter: Callable[[AdapterConfig, int], Adapter] | None = None,
) -> tuple[TrainState, Numbers]:
    """The members' states before the first step, `[members, ...]`, and their numbers `[members]`.

    Raises:
        ValueError: As `check_members` does.
    """
    check_members(len(members), program.mesh, program.members_per_pass)
    cfg = program.cfg
    optimizer = make_optimizer(program.optim, program.steps)

    def initial_state(member: Member) -> TrainState:
        if make_adapter is None:
            adapter = init_adapter(member.config(cfg), jax.random.key(member.seed), params)
        else:
            adapter = make_adapter(member.config(cfg), member.seed)
        # Members differ in numbers alone, so that all have one static part.
        return init_state(adapter.with_config(cfg), optimizer, member.seed)

    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(initial_state, members))
    numbers = {
        "learning_rate": jnp.array([member.learning_rate for member in members], jnp.float32),
        "generator_ratio": jnp.array([member.generator_ratio for member in members], jnp.float32),
        "scale": jnp.array([m.config(cfg).scale / cfg.scale for m in members], jnp.float32),
    }
    # As the compiler writes the next states' sharding, so that the next call is not traced again.
    spec = P("data") if program.mesh.shape["data"] > 1 else P()
    return jax.device_put((states, numbers), NamedSharding(program.mesh, spec))


def _stack(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
