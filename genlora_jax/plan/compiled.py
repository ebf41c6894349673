"""What the compiler says of a step: memory, and bytes that its collectives move."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from genlora_jax.mesh import MeshConfig, make_mesh
from genlora_jax.plan.chips import Topology
from genlora_jax.plan.program import build
from genlora_jax.training.recipe import Recipe

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}


@dataclass(frozen=True)
class Compiled:
    """A compiled step, in bytes a chip.

    Attributes:
        arguments: Base, adapter, optimizer and batch.
        temporaries: All else that is alive at once.
        collectives: Results of each kind of collective over a whole step, loops counted.
    """

    arguments: int
    temporaries: int
    collectives: dict[str, int]


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
        compiled = lowered.compile()
    except Exception as error:
        raise ValueError(f"{topology.name}: the compiler gives up: {error}") from error
    memory = compiled.memory_analysis()
    # The peak is, within 4 %, what the compiler sets aside and holds against the chip's memory. For
    # TPUs `temp_size_in_bytes` is a third to a half more than that.
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        collectives=collective_bytes(compiled.as_text()),
    )


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of the results of a program's collectives, by kind.

    A collective in a loop counts as often as the loop runs. One that the compiler has taken apart,
    to overlap it with other work, is there several times under one channel and counts once.

    Args:
        text: The program, as XLA prints it.
    """
    computations = _computations(text)
    found: dict[tuple[str, str], int] = {}
    times: dict[str, int] = defaultdict(int)
    (entry,) = [name for name in computations if name.startswith("ENTRY ")]
    pending = [(entry, 1)]
    while pending:
        name, count = pending.pop()
        if times[name] >= count:
            continue
        times[name] = count
        for line in computations[name]:
            if match := re.search(r"= (.*?) ([a-z-]+?)(-start)?\(", line):
                kind, result = match[2], match[1]
                channel = re.search(r"channel_id=(\d+)", line)
                if kind in COLLECTIVES and channel:
                    parts = re.findall(r"(\w+)\[([\d,]*)\]", result)
                    # What is started yields its operand, its result and some flags.
                    size = max(map(_size, parts)) if match[3] else sum(map(_size, parts))
                    key = (kind, channel[1])
                    found[key] = max(found.get(key, 0), size * count)
            loop = re.search(r"condition=%([\w.-]+), body=%([\w.-]+)", line)
            if loop:
                pending.append((loop[2], count * _trips(computations[loop[1]])))
            for called in re.findall(r"(?:calls|to_apply)=%([\w.-]+)", line):
                pending.append((called, count))
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                pending += [(b.strip(" %"), count) for b in branches.split(",")]
    totals: dict[str, int] = defaultdict(int)
    for (kind, _), size in found.items():
        totals[kind] += size
    return dict(totals)


def _computations(text: str) -> dict[str, list[str]]:
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.-]+) \(", line)):
            lines = computations.setdefault((head[1] or "") + head[2], [])
        else:
            lines.append(line)
    return computations


def _trips(condition: list[str]) -> int:
    """How often a loop runs: the number that its condition compares with."""
    numbers = [int(n) for n in re.findall(r"constant\((\d+)\)", "\n".join(condition))]
    return max(numbers, default=1)


def _size(shape: tuple[str, str]) -> int:
    kind, dimensions = shape
    size = BYTES.get(kind, 4)
    for n in dimensions.split(","):
        size *= int(n or 1)
    return size
