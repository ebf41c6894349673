"""What a step needs on a mesh, from shapes alone: its memory, traffic and compute."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jax.sharding import AbstractMesh

from genlora_jax.mesh import AXES, MeshConfig
from genlora_jax.plan.chips import Chip, Topology
from genlora_jax.plan.memory import argument_bytes, temporary_bytes
from genlora_jax.plan.sizes import FLOAT32, Step, shapes_of
from genlora_jax.sharding import check_params
from genlora_jax.training.recipe import Recipe

# Measured: estimates of memory are this near to the compilers' figures, or nearer
# (train/benchmarks/results: plan.json, two_gpus.json, several_gpus.json, with exceptions).
MARGIN = 0.15
FLOP_PER_PRODUCT = 2  # derived: a multiplication and an addition
# Derived: those of a query with all keys, and of its weights with all values. The masked half
# counts, though some implementations skip it: this is an upper bound.
ATTENTION_PRODUCTS = 2
# Derived: forward, and the gradient of the hidden states.
PASSES_OVER_HEAD = 2
# Assumed, not measured: arrays of the hidden size that a layer reads and writes over all passes.
ACTIVATIONS_READ_PER_LAYER = 30
# Derived: an all-reduce is a reduce-scatter and an all-gather, and over n chips each of them
# receives (n - 1) / n of the array.
ALL_REDUCE = 2
# Derived: attention and the feed-forward network each end in one.
ALL_REDUCES_PER_LAYER = 2
# Derived: a micro-batch computes the head's gradient with its loss.
GATHERS_OF_HEAD = 1


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
    shapes, count = shapes_of(recipe).params, topology.count
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for data, fsdp in itertools.product(divisors, repeat=2):
        shards, tensor = data * fsdp, count // (data * fsdp)
        if count % shards or recipe.data.batch_size % (shards * recipe.train.accumulate):
            continue
        try:
            check_params(AbstractMesh((data, fsdp, tensor), AXES), shapes)
        except ValueError:
            continue
        yield MeshConfig(data=data, fsdp=fsdp, tensor=tensor)


def rank_meshes(recipe: Recipe, topology: Topology) -> list[Estimate]:
    """Estimates of all candidates: those that fit first, then by bytes received.

    Raises:
        ValueError: If no mesh of so many chips divides the model and the batch, or they cannot
            multiply by the base in its form.
    """
    recipe.model.check_remat(topology.chip.platform)
    if topology.chip.tpu:
        recipe.model.quantisation.check_device("tpu", None, topology.name)
    found = [estimate(recipe, topology.chip, mesh) for mesh in candidates(recipe, topology)]
    if not found:
        raise ValueError(
            f"no mesh of {topology.count} chips divides data.batch_size "
            f"({recipe.data.batch_size}) and the model's shapes"
        )
    return sorted(found, key=lambda e: (not e.fits, sum(e.moved.values())))


def fastest_that_fits(recipe: Recipe, topology: Topology) -> tuple[Recipe, list[Estimate]]:
    """The recipe with the first of its policies that fits on a mesh, and its meshes.

    If none fits, it is the policy that takes the least memory, on whichever mesh.

    Raises:
        ValueError: As `rank_meshes` does.
    """
    tried = []
    for policy in recipe.model.policies(topology.chip.platform):
        with_policy = replace(recipe, model=replace(recipe.model, remat=policy))
        ranked = rank_meshes(with_policy, topology)
        if ranked[0].fits:
            return with_policy, ranked
        tried.append((with_policy, ranked))
    return min(tried, key=lambda plan: min(e.arguments + e.temporaries for e in plan[1]))


def step_flops(step: Step) -> float:
    """FLOP of a step on a chip."""
    cfg, passes = step.config, step.passes
    attention = ATTENTION_PRODUCTS * step.recipe.data.length * cfg.num_attention_heads
    attention *= cfg.num_hidden_layers * cfg.head_dim
    products = passes * (step.layers_values + attention) + PASSES_OVER_HEAD * step.head_values
    # Factors take one product more than the base: that of their gradient.
    products += (passes + 1) * (step.factor_values + step.formed_values)
    tokens = step.recipe.train.accumulate * step.tokens
    return tokens * (FLOP_PER_PRODUCT * products) / step.mesh.tensor


def step_seconds(step: Step, flops: float, received: float) -> float:
    """Seconds of a step by the roofline: the longest of computing, reading and receiving.

    A chip computes `flops` FLOP and receives `received` bytes.
    """
    cfg, chip = step.config, step.chip
    base = step.passes * (step.layers_values + step.head_values + step.stored_values)
    layers = cfg.num_hidden_layers * step.tokens * cfg.hidden_size * step.width
    read = base * step.width / step.mesh.tensor + ACTIVATIONS_READ_PER_LAYER * layers
    read *= step.recipe.train.accumulate
    return max(flops / chip.flops, read / chip.bandwidth, received / chip.link)


def received_bytes(step: Step) -> dict[str, float]:
    """Bytes received, by what for: `base`, `activations`, `gradients`."""
    mesh, cfg = step.mesh, step.config
    micro_batches = step.recipe.train.accumulate
    gathered = (mesh.fsdp - 1) / mesh.fsdp
    reduced = ALL_REDUCE * (mesh.tensor - 1) / mesh.tensor
    # Kernel-sized factors are all-gathered like kernels. What a step forms out of factors and a
    # kernel takes that kernel once more, for its gradient.
    others = (
        GATHERS_OF_HEAD * step.head_values
        + step.passes * step.stored_values
        + (step.passes + 1) * step.formed_values
    )
    layers = step.passes * cfg.num_hidden_layers * step.layer_bytes
    hidden = cfg.num_hidden_layers * step.tokens * cfg.hidden_size * step.width
    return {
        "base": micro_batches * gathered * (layers + others * step.width / mesh.tensor),
        "activations": micro_batches * reduced * ALL_REDUCES_PER_LAYER * step.passes * hidden,
        "gradients": micro_batches * FLOAT32 * _gradient_values(step) / mesh.tensor,
    }


def _gradient_values(step: Step) -> float:
    """Values of gradients received, for one micro-batch and with `tensor` still to divide."""
    mesh = step.mesh
    # Replicated factors: an all-reduce over all shards of the batch.
    replicated = step.factor_values - step.stored_values
    values = ALL_REDUCE * replicated * (1 - 1 / (mesh.data * mesh.fsdp))
    # Sharded ones: a reduce-scatter over `fsdp`, and an all-reduce of each shard over `data`.
    scattered = (mesh.fsdp - 1) / mesh.fsdp
    return values + step.stored_values * (scattered + ALL_REDUCE * (1 - 1 / mesh.data) / mesh.fsdp)
