"""What a step needs on a mesh, from shapes alone: its memory, traffic and compute."""

from collections.abc import Iterator
from dataclasses import dataclass

from jax.sharding import AbstractMesh

from genlora_jax.mesh import AXES, MeshConfig
from genlora_jax.plan.chips import Chip, Topology
from genlora_jax.plan.compute import step_flops, step_seconds
from genlora_jax.plan.memory import argument_bytes, temporary_bytes
from genlora_jax.plan.sizes import Step, shapes_of
from genlora_jax.plan.traffic import received_bytes
from genlora_jax.sharding import check_params
from genlora_jax.training.recipe import Recipe

# Measured: estimates of memory are this near to the compilers' figures, or nearer
# (train/benchmarks/results: plan.json, two_gpus.json).
MARGIN = 0.15


@dataclass(frozen=True)
class Estimate:
    """A step on one mesh; bytes, FLOP and seconds a chip.

    Attributes:
        mesh: Sizes of the mesh.
        arguments: Bytes of base, adapter, optimizer and batch.
        temporaries: Bytes of all else that is alive at once.
        flops: FLOP of a step.
        moved: Bytes that a chip receives from others, by what for.
        seconds: Roofline: the longest of computing, of reading memory, and of receiving.
        fits: Whether it fits the chip's memory, with a margin for the error of an estimate.
    """

    mesh: MeshConfig
    arguments: int
    temporaries: int
    flops: float
    moved: dict[str, float]
    seconds: float
    fits: bool


def estimate(recipe: Recipe, chip: Chip, mesh: MeshConfig) -> Estimate:
    """A recipe's step on one mesh."""
    step = Step(recipe, chip, mesh, shapes_of(recipe))
    arguments, temporaries = argument_bytes(step), temporary_bytes(step)
    flops, moved = step_flops(step), received_bytes(step)
    return Estimate(
        mesh=mesh,
        arguments=arguments,
        temporaries=temporaries,
        flops=flops,
        moved=moved,
        seconds=step_seconds(step, flops, sum(moved.values())),
        fits=arguments + temporaries < (1 - MARGIN) * chip.memory,
    )


def candidates(recipe: Recipe, topology: Topology) -> Iterator[MeshConfig]:
    """Every mesh of so many chips that divides the recipe's model and batch."""
    shapes = shapes_of(recipe).params
    sizes = [n for n in range(1, topology.count + 1) if topology.count % n == 0]
    for data in sizes:
        for fsdp in (n for n in sizes if topology.count % (data * n) == 0):
            mesh = MeshConfig(data=data, fsdp=fsdp, tensor=topology.count // (data * fsdp))
            if recipe.data.batch_size % (data * fsdp * recipe.train.accumulate):
                continue
            try:
                check_params(_abstract(mesh), shapes)
            except ValueError:
                continue
            yield mesh


def rank_meshes(recipe: Recipe, topology: Topology) -> list[Estimate]:
    """Estimates of all candidates: those that fit first, then by bytes received.

    Raises:
        ValueError: If no mesh of so many chips divides the model and the batch.
    """
    found = [estimate(recipe, topology.chip, mesh) for mesh in candidates(recipe, topology)]
    if not found:
        raise ValueError(
            f"no mesh of {topology.count} chips divides data.batch_size "
            f"({recipe.data.batch_size}) and the model's shapes"
        )
    return sorted(found, key=lambda e: (not e.fits, sum(e.moved.values())))


def _abstract(mesh: MeshConfig) -> AbstractMesh:
    return AbstractMesh(tuple(getattr(mesh, axis) for axis in AXES), AXES)
