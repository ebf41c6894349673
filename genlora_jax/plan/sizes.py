"""The sizes of a recipe's step on one mesh, from which memory, traffic and compute follow."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from genlora_jax.adapter import Adapter, generate_factors, init_adapter
from genlora_jax.base.stored import StoredKernel
from genlora_jax.factors import by_module
from genlora_jax.hf.checkpoint import CONFIG, locate, model_config, read_json
from genlora_jax.hf.load import quantised_shapes
from genlora_jax.hf.ready_made import stated_quantisation, with_plain_scales
from genlora_jax.mesh import MeshConfig
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes
from genlora_jax.plan.chips import Chip
from genlora_jax.training.recipe import Recipe

# Derived, by `model.remat`: a forward and a backward pass over the layers, and a second forward
# pass where nothing was kept.
PASSES = {"none": 2, "dots": 2, "full": 3}
FLOAT32 = 4  # bytes


def model_shape(recipe: Recipe) -> LlamaConfig:
    """The shape of a recipe's model: its `model.shape`, or else the checkpoint's."""
    return recipe.model.shape or model_config(_directory(recipe))


def base_shapes(recipe: Recipe, shapes: Any) -> Any:
    """The shapes of parameters that are stored as `model.base_dtype` says, else the checkpoint.

    Raises:
        ValueError: If the checkpoint is quantised in a way that is not read.
    """
    if recipe.model.base_dtype is None and recipe.model.shape is None:
        file = _directory(recipe) / CONFIG
        if settings := read_json(file).get("quantization_config"):
            shapes = quantised_shapes(shapes, stated_quantisation(file, settings))
            if settings.get("bnb_4bit_use_double_quant"):
                return shapes
            return jax.tree.map(
                with_plain_scales, shapes, is_leaf=lambda leaf: isinstance(leaf, StoredKernel)
            )
    return quantised_shapes(shapes, recipe.model.quantisation)


def _directory(recipe: Recipe) -> Path:
    return locate(recipe.model.path, revision=recipe.model.revision, files=[CONFIG])


@dataclass(frozen=True)
class Shapes:
    """Trees of shapes, which are the same on every mesh."""

    config: LlamaConfig
    params: Any
    adapter: Adapter
    factors: Any


@functools.cache
def shapes_of(recipe: Recipe) -> Shapes:
    """The shapes of a recipe's base, adapter and factors."""
    config = model_shape(recipe)
    model = LlamaForCausalLM(config, param_dtype=jnp.dtype(recipe.model.dtypes("tpu")[1]))
    params = base_shapes(recipe, parameter_shapes(model))
    adapter = jax.eval_shape(lambda p: init_adapter(recipe.adapter, jax.random.key(0), p), params)
    factors = jax.eval_shape(lambda a: generate_factors(recipe.adapter, a), adapter)
    return Shapes(config, params, adapter, factors)


def shard_values(mesh: MeshConfig, tree: Any, specs: Any) -> int:
    """Values that one chip holds of a tree that is sharded as its specs say."""
    return sum(shards(mesh, tree, specs, lambda _: 1))


def shard_bytes(mesh: MeshConfig, tree: Any, specs: Any) -> int:
    """Bytes that one chip holds of such a tree."""
    return sum(shards(mesh, tree, specs, lambda leaf: leaf.dtype.itemsize))


def shards(mesh: MeshConfig, tree: Any, specs: Any, size: Callable[[Any], int]) -> list[int]:
    """What one chip holds of each array, where `size` is that of a value."""

    def held(leaf: Any, spec: Any) -> int:
        parts = math.prod(getattr(mesh, axis) for axis in spec if axis is not None)
        return leaf.size * size(leaf) // parts

    return jax.tree.leaves(jax.tree.map(held, tree, specs))


@dataclass(frozen=True)
class Step:
    """A recipe's step on one mesh of one kind of chip.

    Counts of values are those of whole arrays, before any sharding, unless their name says shard.
    """

    recipe: Recipe
    chip: Chip
    mesh: MeshConfig
    shapes: Shapes

    @property
    def config(self) -> LlamaConfig:
        """The model's shape."""
        return self.shapes.config

    @property
    def platform(self) -> str:
        """What JAX calls the chips."""
        return self.chip.platform

    @property
    def rows(self) -> int:
        """Rows of a micro-batch in one shard of the batch."""
        shards = self.mesh.data * self.mesh.fsdp * self.recipe.train.accumulate
        return self.recipe.data.batch_size // shards

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch in one shard of the batch."""
        return self.rows * self.recipe.data.length

    @property
    def width(self) -> int:
        """Bytes of a value in the dtype of the computation."""
        return jnp.dtype(self.recipe.model.dtypes(self.platform)[0]).itemsize

    @property
    def remat(self) -> str:
        """What the backward pass recomputes."""
        return self.recipe.model.policies(self.platform)[0]

    @property
    def passes(self) -> int:
        """Passes over the layers."""
        return PASSES[self.remat]

    @property
    def layers_values(self) -> int:
        """Parameters of all layers."""
        layers: dict[Any, Any] = flatten_dict(self.shapes.params["model"]["layers"])
        return sum(leaf.size for leaf in layers.values())

    @property
    def dequantised_values(self) -> int:
        """Values of those kernels of one layer that are dequantised to be multiplied."""
        layers: dict[Any, Any] = flatten_dict(self.shapes.params["model"]["layers"])
        stored = [leaf for leaf in layers.values() if isinstance(leaf, StoredKernel)]
        return (
            sum(leaf.size for leaf in stored if leaf.dequantises) // self.config.num_hidden_layers
        )

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's parameters once `fsdp` has all-gathered them."""
        of_layer = self.layers_values // self.config.num_hidden_layers
        return of_layer * self.width // self.mesh.tensor

    @property
    def head_values(self) -> int:
        """Parameters of the head, or of the embedding that it is tied to."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def factor_values(self) -> int:
        """Values of all factors."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes.factors))

    @property
    def formed_values(self) -> int:
        """Values of the kernel-sized arrays that a step forms out of factors."""
        modules = by_module(self.shapes.factors).values()
        return sum(kind.formed_values(leaves) for kind, leaves in modules)

    @property
    def stored_values(self) -> int:
        """Values of kernel-sized factors, which are sharded and all-gathered as kernels are."""
        modules = by_module(self.shapes.factors).values()
        return sum(kind.stored_values(leaves) for kind, leaves in modules)
