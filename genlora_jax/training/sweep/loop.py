"""Sweeps: many adapters trained at once over one copy of the base."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from genlora_jax.adapter import Adapter, init_adapter
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.training.optim import make_optimizer
from genlora_jax.training.step import TrainState, init_state
from genlora_jax.training.sweep.members import Member, SweepResult
from genlora_jax.training.sweep.program import (
    Numbers,
    SweepProgram,
    evaluate_members,
    train_members,
)


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

    Every member is what a run of its own would make it, to float32 rounding. Sweeps of the same
    program and number of members share what is compiled.

    Args:
        program: Model, config, optimizer, steps, options and mesh.
        params: The base's parameters; on a mesh, sharded there.
        members: What each has of its own.
        batches: As `train_batches` makes them, `[rows, length]`; `program.steps` are taken. The
            mesh's `fsdp` divides their rows.
        held_out: Batches to evaluate on, of one shape: they select the best.
        eval_every: Steps between evaluations; None for one at the end only.
        steps_per_call: Most steps in one call of the device; the number taken divides the steps
            and `eval_every`.
        make_adapter: Config, seed -> initial adapter; by default that of `init_adapter`.
        report: Called with step and losses after each evaluation.
        stop: Asked after each call, by its last step, whether to evaluate and end here.

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
        # On the device, and two calls under way at most: else a stop would wait for all of them.
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


def check_passes(members_per_pass: int | None, members: int, data: int = 1) -> None:
    """Raises ValueError if passes would not be of one size, over all of the mesh's `data`."""
    if members_per_pass is None or members_per_pass >= members or members % data:
        return  # without passes, or refused where members are sharded
    sizes = [n for n in range(data, members + 1, data) if members % n == 0]
    if members_per_pass not in sizes:
        raise ValueError(
            f"members_per_pass ({members_per_pass}) must divide the number of members ({members}) "
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
        ValueError: If there are no members, or `members_per_pass` or the mesh's `data` does not
            divide their number.
    """
    if not members:
        raise ValueError("a sweep needs at least one member")
    cfg, mesh = program.cfg, program.mesh
    data = 1 if mesh is None else mesh.shape["data"]
    check_passes(program.members_per_pass, len(members), data)

    def draw(cfg: AdapterConfig, seed: int) -> Adapter:
        return init_adapter(cfg, jax.random.key(seed), params)

    configs = [member.config(cfg) for member in members]
    optimizer = make_optimizer(program.optim, program.steps)
    singles = [
        # One static part for all: members differ in numbers alone.
        init_state(
            (make_adapter or draw)(member_cfg, member.seed).with_config(cfg),
            optimizer,
            member.seed,
        )
        for member_cfg, member in zip(configs, members, strict=True)
    ]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    scales = [member_cfg.scale / cfg.scale for member_cfg in configs]
    numbers = {
        "learning_rate": jnp.array([member.learning_rate for member in members], jnp.float32),
        "generator_ratio": jnp.array([member.generator_ratio for member in members], jnp.float32),
        "scale": jnp.array(scales, jnp.float32),
    }
    if mesh is None:
        return states, numbers
    if len(members) % data:
        raise ValueError(f"{len(members)} members cannot be sharded over mesh.data = {data}")
    return jax.device_put((states, numbers), NamedSharding(mesh, P("data")))


def _stack(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
