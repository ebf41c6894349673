"""The training step of a recipe on a mesh, from shapes alone: nothing is allocated."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genlora_jax.adapter import init_adapter
from genlora_jax.hf.checkpoint import CONFIG, locate, model_config
from genlora_jax.hf.load import sharded_shapes
from genlora_jax.mesh import BATCH
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes
from genlora_jax.sharding import state_shardings
from genlora_jax.training.optim import make_optimizer
from genlora_jax.training.recipe import Recipe
from genlora_jax.training.step import init_state, make_train_step


@dataclass(frozen=True)
class Program:
    """A step's function and its arguments."""

    step: Any
    state: Any
    params: Any
    batch: Any


def model_shape(recipe: Recipe) -> LlamaConfig:
    """The shape of a recipe's model: its `model.shape`, or else the checkpoint's."""
    model = recipe.model
    return model.shape or model_config(locate(model.path, revision=model.revision, files=[CONFIG]))


def build(recipe: Recipe, mesh: Mesh) -> Program:
    """The step of a recipe on a mesh, whose devices need not be there.

    Raises:
        ValueError: If the mesh does not divide the model or the batch.
    """
    model = LlamaForCausalLM(
        model_shape(recipe),
        dtype=jnp.dtype(recipe.model.dtype),
        param_dtype=jnp.dtype(recipe.model.param_dtype),
        scan=recipe.model.scan,
        remat=recipe.model.remat,
        attention=recipe.model.attention,
        mesh=mesh,
    )
    shapes = parameter_shapes(model.clone(mesh=None))
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
