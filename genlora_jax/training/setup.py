"""What finetune, sweep and evaluate begin with: processes, mesh, data, base and adapter."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from genlora_jax.adapter import Adapter, init_adapter
from genlora_jax.adapter_files import load_adapter, load_config
from genlora_jax.compression import lora_from_factors
from genlora_jax.data.encode import Example
from genlora_jax.factors import by_module
from genlora_jax.hf.base import Base, find_base, load_base
from genlora_jax.hf.peft_import import import_peft, is_peft
from genlora_jax.mesh import MeshConfig, batch_shards, make_mesh, one_device
from genlora_jax.methods import config_to_json
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.training.checkpoint import adapter_difference
from genlora_jax.training.objectives import Objective, find_objective
from genlora_jax.training.recipe import Recipe

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """What a recipe's run works on.

    Attributes:
        mesh: Its devices; of size 1 on one device.
        base: The frozen base, sharded over them.
        objective: What is trained for.
        examples: The encoded rows of `data.train`.
        held_out: Batches of `data.eval`, on the host; empty if there is none.
        steps: Length of the run.
    """

    mesh: Mesh
    base: Base
    objective: Objective
    examples: list[Example]
    held_out: list[Batch]
    steps: int


def prepare(recipe: Recipe, mesh: Mesh, say: Callable[[object], None] = print) -> Run:
    """Reads a recipe's data and loads its base; what can be refused is refused before the base.

    Args:
        recipe: The recipe.
        mesh: Its devices.
        say: Prints a report of each source.

    Raises:
        FileNotFoundError: If data or base are not there.
        ValueError: If the objective is unknown, a row is bad, or the base is not supported or not
            the recipe's.
    """
    objective = find_objective(recipe.train.objective)
    found = find_base(recipe.model)
    tokenizer = found[1]
    examples, report = objective.load(recipe.data.train, tokenizer, recipe.data)
    say(report)
    held_out: list[Batch] = []
    if recipe.data.eval:
        eval_examples, report = objective.load(recipe.data.eval, tokenizer, recipe.data)
        say(report)
        held_out = objective.eval_batches(eval_examples, recipe.data)
    steps = recipe.train.steps
    if steps is None:
        batches = objective.train_batches(examples, recipe.data, epochs=recipe.train.epochs)
        steps = sum(1 for _ in batches)
    base = load_base(recipe.model, found, mesh)
    return Run(mesh, base, objective, examples, held_out, steps)


def recipe_mesh(recipe: Recipe) -> Mesh:
    """The mesh of a fine-tuning run.

    Raises:
        ValueError: If the devices or the batch cannot be sharded as the recipe says.
    """
    mesh = make_mesh(recipe.mesh)
    parts = batch_shards(mesh) * recipe.train.accumulate
    if recipe.data.batch_size % parts:
        raise ValueError(
            f"data.batch_size ({recipe.data.batch_size}) is no multiple of mesh.data x mesh.fsdp x "
            f"train.accumulate ({parts})"
        )
    return mesh


def evaluation_mesh(cfg: MeshConfig | None) -> Mesh:
    """The mesh of an evaluation: one device unless it is given."""
    return one_device() if cfg is None else make_mesh(cfg)


def check_start(cfg: AdapterConfig, source: str | None) -> None:
    """Raises if an adapter of the config cannot start from `train.init_from`.

    It is asked before the base is loaded.

    Raises:
        FileNotFoundError: If no adapter is there.
        ValueError: If it was made with other settings, or is PEFT's and the config is not LoRA's.
    """
    if source is None:
        return
    if not is_peft(source):
        if difference := adapter_difference(cfg, config_to_json(load_config(source))):
            raise ValueError(f"train.init_from: {source} was made {difference}")
    elif not cfg.starts_from_peft:
        raise ValueError(
            f"train.init_from: {source} is a PEFT adapter, which goes on as LoRA alone: give "
            "adapter.class_path genlora_jax.LoRAConfig"
        )


def initial_adapter(recipe: Recipe, run: Run, *, mesh: Mesh | None = None) -> Adapter:
    """A new adapter, or the one to start from, which `check_start` let pass.

    Args:
        recipe: The recipe.
        run: From `prepare`.
        mesh: Devices over which the adapter is sharded, as in training on them.

    Raises:
        ValueError: If the one to start from was made for another base, or the recipe's adapter has
            no room for a PEFT adapter.
    """
    key, source, params = jax.random.key(recipe.train.seed), recipe.train.init_from, run.base.params
    if source is None:
        return init_adapter(recipe.adapter, key, params, mesh=mesh)
    if not is_peft(source):
        _, adapter = load_adapter(source, params, model=run.base.model, mesh=mesh)
        return adapter.with_config(recipe.adapter)  # its dropout may be another
    cfg: Any = recipe.adapter
    factors = import_peft(source, params)
    rank = max(kind.rank(leaves) or 0 for kind, leaves in by_module(factors).values())
    if rank > cfg.rank:
        raise ValueError(
            f"train.init_from: {source} has rank {rank}, more than adapter.rank ({cfg.rank})"
        )
    try:
        return lora_from_factors(cfg, factors, params=params, key=key)[0]
    except ValueError as error:
        raise ValueError(f"train.init_from: {source}: {error}") from error


def member_recipe(recipe: Recipe, cfg: AdapterConfig, seed: int) -> Recipe:
    """The recipe of a sweep's member: another seed, and perhaps another alpha."""
    train = dataclasses.replace(recipe.train, seed=seed)
    return dataclasses.replace(recipe, train=train, adapter=cfg)
