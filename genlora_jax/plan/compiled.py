"""A recipe's step as a program, and what the compiler says of it: memory, and bytes moved.

The program is made from shapes alone: nothing is allocated.
"""

import math
import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genlora_jax.adapter import init_adapter
from genlora_jax.hf.load import sharded_shapes
from genlora_jax.mesh import BATCH, MeshConfig, make_mesh
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes
from genlora_jax.plan.chips import Topology
from genlora_jax.plan.sizes import base_shapes, model_shape
from genlora_jax.sharding import state_shardings
from genlora_jax.training.optim import make_optimizer
from genlora_jax.training.recipe import Recipe
from genlora_jax.training.step import init_state, make_train_step

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}


@dataclass(frozen=True)
class Program:
    """A step's function and its arguments."""

    step: Any
    state: Any
    params: Any
    batch: Any


@dataclass(frozen=True)
class Compiled:
    """A compiled step, in bytes a chip.

    Attributes:
        arguments: Base, adapter, optimizer and batch.
        temporaries: All else that is alive at its peak.
        collectives: Results of each kind of collective over a whole step, loops counted.
    """

    arguments: int
    temporaries: int
    collectives: dict[str, int]


def build(recipe: Recipe, mesh: Mesh) -> Program:
    """The step of a recipe on a mesh, whose devices need not be there.

    Raises:
        ValueError: If the mesh does not divide the model or the batch.
    """
    platform = mesh.devices.flat[0].platform
    dtype, param_dtype = recipe.model.dtypes(platform)
    model = LlamaForCausalLM(
        model_shape(recipe),
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        scan=recipe.model.scans(platform),
        remat=recipe.model.policies(platform)[0],
        attention=recipe.model.attention,
        mesh=mesh,
    )
    shapes = base_shapes(recipe, parameter_shapes(model.clone(mesh=None)))
    params = sharded_shapes(mesh, shapes)
    optimizer = make_optimizer(recipe.optim, recipe.train.steps or 1)
    adapter = jax.eval_shape(lambda p: init_adapter(recipe.adapter, jax.random.key(0), p), shapes)
    state = jax.eval_shape(lambda adapter: init_state(adapter, optimizer), adapter)
    where = state_shardings(mesh, state)
    state = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), state, where)
    size = (recipe.data.batch_size, recipe.data.length)
    tokens = jax.ShapeDtypeStruct(size, jnp.int32, sharding=NamedSharding(mesh, P(BATCH)))
    return Program(
        step=make_train_step(model, recipe.adapter, optimizer, recipe.step_options, mesh=mesh),
        state=state,
        params=params,
        batch={
            **dict.fromkeys(("input_ids", "segment_ids", "positions"), tokens),
            "loss_mask": tokens.update(dtype=jnp.bool_),
        },
    )


def topology_devices(topology: Topology) -> Any:
    """Descriptions of a TPU topology's devices, which need not be there.

    Raises:
        ValueError: If libtpu is not installed or does not know the topology.
    """
    # libtpu would ask the cloud which machine this is, and wait for an answer.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    # A v4's two cores are one device only when asked to be.
    options = {"chip_config_name": "megacore"} if topology.name.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        ).devices
    except Exception as error:  # the plugin raises what it likes
        raise ValueError(f"cannot compile for {topology.name}: {error}") from error


def compile_step(recipe: Recipe, topology: Topology, mesh: MeshConfig) -> Compiled:
    """Compiles a recipe's step for a TPU topology; takes a minute or two.

    Raises:
        ValueError: If it cannot be compiled, for want of libtpu or of memory.
    """
    program = build(recipe, make_mesh(mesh, topology_devices(topology)))
    lowered = program.step.lower(program.state, program.params, program.batch)
    try:
        with warnings.catch_warnings():
            # JAX keeps compiled programs, but cannot read those of devices that are not there.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            compiled = lowered.compile()
    except Exception as error:
        raise ValueError(f"{topology.name}: the compiler gives up: {error}") from error
    memory = compiled.memory_analysis()
    # The compiler compares the memory that it reserves with the chip's. The peak is within 4 % of
    # that. For TPUs `temp_size_in_bytes` is a third to a half more.
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        collectives=collective_bytes(compiled.as_text()),
    )


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of the results of the collectives, by kind, of a program as XLA prints it.

    A collective in a loop counts as often as the loop runs. One that the compiler has split, to
    overlap it with other work, appears several times under one channel and counts once.
    """
    computations = _computations(text)
    found: Counter[tuple[str, str]] = Counter()
    times: Counter[str] = Counter()
    (entry,) = [name for name in computations if name.startswith("ENTRY ")]
    pending = [(entry, 1)]
    while pending:
        name, count = pending.pop()
        if times[name] >= count:
            continue
        times[name] = count
        for line in computations[name]:
            if (collective := _collective(line)) is not None:
                kind, channel, size = collective
                found[kind, channel] = max(found[kind, channel], size * count)
            pending += [(called, count * runs) for called, runs in _calls(line, computations)]
    totals: Counter[str] = Counter()
    for (kind, _), size in found.items():
        totals[kind] += size
    return dict(totals)


def _collective(line: str) -> tuple[str, str, int] | None:
    """Kind, channel and bytes of the result of the collective in a line; None if it has none."""
    operation = re.search(r"= (.*?) ([a-z-]+?)(-start)?\(", line)
    channel = re.search(r"channel_id=(\d+)", line)
    if operation is None or channel is None or operation[2] not in COLLECTIVES:
        return None
    sizes = [_size(shape) for shape in re.findall(r"(\w+)\[([\d,]*)\]", operation[1])]
    # An asynchronous start yields its operand, its result and some flags.
    return operation[2], channel[1], max(sizes) if operation[3] else sum(sizes)


def _calls(line: str, computations: dict[str, list[str]]) -> list[tuple[str, int]]:
    """The computations that a line calls, and how often."""
    calls = [(called, 1) for called in re.findall(r"(?:calls|to_apply)=%([\w.-]+)", line)]
    if loop := re.search(r"condition=%([\w.-]+), body=%([\w.-]+)", line):
        # A loop runs as often as the number says that its condition compares with.
        numbers = re.findall(r"constant\((\d+)\)", "\n".join(computations[loop[1]]))
        calls.append((loop[2], max(map(int, numbers), default=1)))
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
        calls += [(branch.strip(" %"), 1) for branch in branches.split(",")]
    return calls


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation, by its name; the entry's begins with `ENTRY `."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.-]+) \(", line)):
            lines = computations.setdefault((head[1] or "") + head[2], [])
        else:
            lines.append(line)
    return computations


def _size(shape: tuple[str, str]) -> int:
    """Bytes of an array, from its dtype and its dimensions as XLA prints them."""
    kind, dimensions = shape
    return BYTES.get(kind, 4) * math.prod(int(n or 1) for n in dimensions.split(","))
