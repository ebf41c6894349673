"""What a step needs on a mesh, from shapes alone.

Arguments are exact but for padding. Temporaries and bytes between chips are those of the largest
terms, for attention whose scores exist for one layer at a time.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh

from genlora_jax.adapter import generate_factors, init_adapter
from genlora_jax.factors import by_module
from genlora_jax.mesh import AXES, MeshConfig
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes
from genlora_jax.plan.chips import Chip, Topology
from genlora_jax.plan.program import model_shape
from genlora_jax.sharding import check_params, factor_specs, param_specs, state_specs
from genlora_jax.training.recipe import Recipe

# Passes over the layers: forward, backward, and forward again where nothing was kept.
PASSES = {"none": 2, "dots": 2, "full": 3}
# Estimates of memory were found to be this near to the compiler's figures, or nearer
# (train/benchmarks/results: plan.json, two_gpus.json).
MARGIN = 0.15


@dataclass(frozen=True)
class Estimate:
    """A step on one mesh; bytes, FLOP and seconds a chip.

    Attributes:
        mesh: Its sizes.
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


def candidates(recipe: Recipe, topology: Topology) -> Iterator[MeshConfig]:
    """Every mesh of so many chips that divides the recipe's model and batch."""
    shapes = _trees(recipe)[0]
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


def estimate(recipe: Recipe, chip: Chip, mesh: MeshConfig) -> Estimate:
    """A recipe's step on one mesh."""
    cfg = model_shape(recipe)
    model, train = recipe.model, recipe.train
    width = jnp.dtype(model.dtype).itemsize
    shapes, adapter, factors = _trees(recipe)
    trained = _own_values(mesh, adapter.trainable, state_specs(adapter.trainable))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(adapter.frozen))
    sides = sum(leaf.size for leaf in jax.tree.leaves(factors))
    multiplied = _multiplied_values(factors)
    deltas = _whole_values(factors)

    rows = recipe.data.batch_size // (mesh.data * mesh.fsdp * train.accumulate)  # of a part
    length, hidden, tensor = recipe.data.length, cfg.hidden_size, mesh.tensor
    tokens = rows * length
    layers, passes = cfg.num_hidden_layers, PASSES[model.remat]
    heads, groups = cfg.num_attention_heads, cfg.num_key_value_heads
    layer_values = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["model"]["layers"]))
    head_values = cfg.vocab_size * hidden
    layer_bytes = layer_values // layers * width // tensor  # of a layer put together

    # Of one layer, for its backward pass: what goes in and out of every product, and the scores.
    inner = 6 * hidden + (2 * heads + 2 * groups) * cfg.head_dim // tensor
    inner += 4 * cfg.intermediate_size // tensor
    scores = rows * heads // tensor * length * length * (4 + width + 4)  # and their gradient
    working = tokens * inner * width + (0 if _keeps_no_scores(recipe, chip) else scores)
    between = tokens * hidden * width // tensor  # what passes from layer to layer
    # Without remat also the parts of SwiGLU, and what the two norms compute in float32.
    parts = tokens * (2 * cfg.intermediate_size * width + 4 * hidden * 4) // tensor
    kept = layers * {"full": between, "dots": working, "none": working + parts}[model.remat]
    chunk = max(1, -(-train.chunk // rows)) * rows
    # Of factors a copy, and in the layers' backward pass their gradients, in the model's dtype.
    own_factors = _own_values(mesh, factors, factor_specs(factors))
    copies = _copies_gathered(chip, mesh)
    gathered = copies * layer_bytes, copies * head_values * width // tensor
    in_a_layer = gathered[0] + (working if model.remat == "full" else 0) + own_factors * width
    in_a_layer += (multiplied + deltas) // layers * width // tensor  # a layer's, put together
    # Of a chunk's logits, in the backward pass, TPUs keep none in float32.
    logits = chunk * cfg.vocab_size * (width if chip.tpu else 4 + width) // tensor
    in_the_head = gathered[1] + logits
    temporaries = kept + own_factors * width + max(in_a_layer, in_the_head)
    temporaries += 4 * own_factors if train.accumulate > 1 else 0  # the sum of the parts' gradients
    stored = jnp.dtype(model.param_dtype).itemsize
    temporaries += _transposed_values(recipe, chip, mesh, shapes) * stored
    params = _own_values(mesh, shapes, param_specs(shapes)) * stored
    arguments = params + 4 * (3 * trained + frozen) + 13 * rows * train.accumulate * length

    steps = train.accumulate
    cut = (mesh.fsdp - 1) / mesh.fsdp
    ring = 2 * (tensor - 1) / tensor
    # Whole deltas are put together like kernels. One that depends on its kernel is beside it, and
    # so is its gradient.
    products = (passes + 1) * multiplied
    others = 2 * head_values + passes * deltas + products
    # A chip sums up what the others have of every factor's gradient, and of the deltas it keeps.
    summed = 2 * (sides - deltas) * (1 - 1 / (mesh.data * mesh.fsdp))
    summed += deltas * (cut + 2 * (1 - 1 / mesh.data) / mesh.fsdp)
    moved = {
        "base": steps * cut * (passes * layers * layer_bytes + others * width / tensor),
        "activations": steps * ring * 2 * passes * layers * tokens * hidden * width,
        "gradients": steps * 4 * summed / tensor,
    }
    values = layer_values + head_values
    attention = 2 * layers * length * heads * cfg.head_dim  # per token and pass, causal
    per_token = passes * 2 * (layer_values + attention) + 3 * 2 * head_values
    per_token += (passes + 1) * 2 * sides + 2 * products
    flops = steps * tokens * per_token / tensor
    read = passes * (values + deltas) * width / tensor + 30 * layers * tokens * hidden * width
    seconds = max(
        flops / chip.flops, steps * read / chip.bandwidth, sum(moved.values()) / chip.link
    )
    fits = arguments + temporaries < (1 - MARGIN) * chip.memory
    return Estimate(mesh, arguments, temporaries, flops, moved, seconds, fits)


def _multiplied_values(factors: Any) -> int:
    """Values of the kernels that factors multiply, each of which has a delta as large."""
    return sum(kind.formed_values(leaves) for kind, leaves in by_module(factors).values())


def _whole_values(factors: Any) -> int:
    """Values of the deltas that are no product of factors."""
    return sum(kind.stored_values(leaves) for kind, leaves in by_module(factors).values())


def _keeps_no_scores(recipe: Recipe, chip: Chip) -> bool:
    """Whether attention's scores stay within the chip."""
    attention = recipe.model.attention
    return attention in ("cudnn", "splash") or (attention == "auto" and chip.tpu)


def _copies_gathered(chip: Chip, mesh: MeshConfig) -> int:
    """Copies of a layer put together, or of the head's kernel, that there are at once.

    Over 64 chips of a 3D torus or more the compiler gathers by an all-reduce of zeros with a
    chip's own part among them: what goes in is as large as what comes out.
    """
    if mesh.fsdp == 1:
        return 0
    return 2 if chip.dimensions == 3 and mesh.fsdp >= 64 else 1


def _transposed_values(recipe: Recipe, chip: Chip, mesh: MeshConfig, shapes: Any) -> int:
    """Values of kernels that the compiler keeps a second time, transposed.

    While it loops over the layers: on TPUs those whose products attention takes, on GPUs those
    that `fsdp` cuts by their last axis, since NCCL puts together by the first.
    """
    if not recipe.model.scan or (mesh.fsdp == 1 and not chip.tpu):
        return 0
    pattern = "(q|k|v|qkv)_proj" if chip.tpu else "(o|down)_proj"
    flat = flatten_dict(shapes["model"]["layers"])
    named = re.compile(rf"{pattern}\.kernel")
    kernels = {path: leaf for path, leaf in flat.items() if named.fullmatch(".".join(path[-2:]))}
    return _own_values(mesh, kernels, flatten_dict(param_specs(unflatten_dict(kernels))))


def _abstract(mesh: MeshConfig) -> Any:
    return AbstractMesh(tuple(getattr(mesh, axis) for axis in AXES), AXES)


@functools.cache
def _trees(recipe: Recipe) -> tuple[Any, Any, Any]:
    """Shapes of base, adapter and factors: the same on every mesh."""
    shapes = parameter_shapes(LlamaForCausalLM(model_shape(recipe)))
    init = functools.partial(init_adapter, recipe.adapter, jax.random.key(0))
    adapter = jax.eval_shape(init, shapes)
    return (
        shapes,
        adapter,
        jax.eval_shape(functools.partial(generate_factors, recipe.adapter), adapter),
    )


def _own_values(mesh: MeshConfig, tree: Any, specs: Any) -> int:
    """Values of a chip's share of a tree."""

    def own(leaf: Any, spec: Any) -> int:
        return leaf.size // math.prod(getattr(mesh, axis) for axis in spec if axis is not None)

    return sum(jax.tree.leaves(jax.tree.map(own, tree, specs)))
