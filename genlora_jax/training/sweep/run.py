"""Sweeps: many adapters trained at once over one copy of the base."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genlora_jax.adapter import Adapter, init_adapter
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.step import TrainState, init_state
from genlora_jax.training.sweep.members import Member, SweepResult
from genlora_jax.training.sweep.program import (
    Numbers,
    SweepProgram,
    evaluate_members,
    train_members,
)


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
    members_per_pass: int | None = None,
    steps_per_call: int = 16,
    mesh: Mesh | None = None,
    make_adapter: Callable[[AdapterConfig, int], Adapter] | None = None,
    report: Callable[[int, np.ndarray], None] | None = None,
    stop: Callable[[int], bool] | None = None,
) -> SweepResult:
    """Trains adapters that share a base and its batches, and differ in their members' numbers.

    Every member is what a run of its own would make it, to float32 rounding. Sweeps of the same
    settings and number of members share their compiled programs.

    Args:
        model: The base's model.
        params: Its parameters; on a mesh, laid out there.
        cfg: The adapters' config.
        members: What each has of its own.
        batches: As `train_batches` makes them, `[rows, length]`; `steps` are taken. The mesh's
            `fsdp` divides their rows.
        held_out: Batches to evaluate on, of one shape: they select the best.
        optim: The optimizer's settings; members have their own rates.
        steps: Length of the run.
        eval_every: Steps between evaluations; None for one at the end only.
        accumulate: Parts into which a batch is cut to save memory.
        chunk: Tokens of a chunk of the loss, of all members of a pass together.
        packed: Whether a row may hold several segments.
        members_per_pass: Members whose activations exist at a time; divides their number, and
            is divided by the mesh's `data`. None, or as many as there are, for all at once.
        steps_per_call: Most steps in one call of the device; the number taken divides `steps` and
            `eval_every`.
        mesh: Members are cut over its axis `data`; the base may be cut over `fsdp`.
        make_adapter: Config, seed -> initial adapter; by default that of `init_adapter`.
        report: Called with step and losses after each evaluation.
        stop: Asked after each call, by its last step, whether to evaluate and end here.

    Returns:
        The members' losses and adapters, up to where it ended.

    Raises:
        ValueError: If there are no members or no batches to evaluate on, or the mesh or
            `members_per_pass` does not divide them.
    """
    if not members:
        raise ValueError("a sweep needs at least one member")
    if not held_out:
        raise ValueError("a sweep needs batches to evaluate on: they tell which member is best")
    if steps < 1 or steps_per_call < 1 or (eval_every is not None and eval_every < 1):
        raise ValueError("steps, eval_every and steps_per_call must be at least 1")
    check_passes(members_per_pass, len(members), 1 if mesh is None else mesh.shape["data"])
    program = SweepProgram(
        model=for_members(model),
        cfg=cfg,
        optim=optim,
        steps=steps,
        accumulate=accumulate,
        chunk=chunk,
        packed=packed,
        members_per_pass=members_per_pass,
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
        return  # without passes, or refused where members are shared out
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
        ValueError: If the mesh's `data` does not divide their number.
    """
    cfg = program.cfg

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
