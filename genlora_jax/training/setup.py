"""What finetune and sweep begin with: mesh, data, base and adapter."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from genlora_jax.adapter import Adapter, init_adapter
from genlora_jax.adapter_files import config_fingerprint, load_adapter, load_spec, spec_to_json
from genlora_jax.compression import lora_from_factors
from genlora_jax.data.packing import Batch
from genlora_jax.data.sources import Source
from genlora_jax.factors import by_module
from genlora_jax.hf.base_model import Base, find_base, load_base
from genlora_jax.hf.peft_import import import_peft, is_peft
from genlora_jax.mesh import batch_shards, make_mesh
from genlora_jax.methods import config_to_json
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.storage import is_remote, storage_path
from genlora_jax.training.checkpoint import adapter_difference
from genlora_jax.training.find_adapter import find_adapter, remark_on_base
from genlora_jax.training.objectives import Objective, find_objective
from genlora_jax.training.processes import check_same, text_of_primary
from genlora_jax.training.provenance import checkpoint_digest
from genlora_jax.training.recipe import Recipe
from genlora_jax.training.show import shown
from genlora_jax.training.step_options import StepOptions


@dataclass(frozen=True)
class Run:
    """What a recipe's run works on.

    Attributes:
        mesh: The devices; of size 1 on one device.
        base: The frozen base, sharded over them.
        objective: What the run is trained for.
        source: The rows of `data.train`.
        held_out: Batches of `data.eval`, on the host; empty if there is none.
        steps: Length of the run.
        options: How a step computes its batch.
        origin: Fingerprints of the content of base and data, by the recipe's fields.
    """

    mesh: Mesh
    base: Base
    objective: Objective
    source: Source
    held_out: list[Batch]
    steps: int
    options: StepOptions
    origin: dict[str, str]

    def settings_of(self, adapter: Adapter) -> dict[str, Any]:
        """What is written with an adapter that the run trained; `remark_on_base` reads it."""
        settings = spec_to_json(adapter.spec, config_fingerprint(self.base.model))
        return settings | {"base": settings["base"] | {"tensors": self.origin["model.path"]}}


def prepare(recipe: Recipe, mesh: Mesh, print_line: Callable[[object], None] = print) -> Run:
    """Reads a recipe's data, and then loads its base, so that bad data is refused early.

    Args:
        recipe: The recipe.
        mesh: The devices.
        print_line: Prints a report of each source, and the examples to show.

    Raises:
        FileNotFoundError: If data or base are not there.
        ValueError: If the objective is unknown, `model.remat` is refused on these devices, a row is
            bad, or the base is not supported or not the recipe's.
    """
    recipe.model.check_remat(mesh.devices.flat[0].platform)
    objective = find_objective(recipe.train.objective)
    directory, tokenizer = find_base(recipe.model)

    origin = {"model.path": _base_digest(directory)}

    def load(field: str, paths: Any) -> Source:
        source, report = objective.load(paths, tokenizer, recipe.data)
        print_line(report)
        origin[field] = source.fingerprint
        return source

    source = load("data.train", recipe.data.train)
    first = itertools.chain(*source.read(range(min(recipe.show, len(source)))))
    for number, example in enumerate(first, 1):
        print_line(shown(number, example, tokenizer))
    most, held_out = [objective.max_segments(source, recipe.data)], []
    if recipe.data.eval:
        held_out_source = load("data.eval", recipe.data.eval)
        held_out = objective.eval_batches(held_out_source, recipe.data)
        most.append(objective.max_segments(held_out_source, recipe.data))
    steps = run_length(recipe, objective.train_batches(source, recipe.data), print_line)
    base = load_base(recipe.model, (directory, tokenizer), mesh)
    print_line(f"attention: {base.attention}")
    longest = 0 if source.lengths is None else int(source.lengths.max())  # 0: nobody knows
    if longest > (positions := base.model.config.max_position_embeddings):
        print_line(
            f"note: the longest example has {longest:,} tokens, but the model was made for "
            f"{positions:,} positions (max_position_embeddings): it knows none beyond them"
        )
    known = [count for count in most if count is not None]
    bound = max(known) if len(known) == len(most) else None
    options = replace(recipe.step_options, max_segments=bound)
    check_same(origin | {"the number of steps": steps})
    return Run(mesh, base, objective, source, held_out, steps, options, origin)


def run_length(recipe: Recipe, batches: Any, print_line: Callable[[object], None]) -> int:
    """The steps of a recipe's run; prints how well its batches are packed.

    Where lengths are not known the steps of `train.epochs` are estimated: the schedule and all
    processes need their number at the start, and the rows go on into a next epoch.
    """
    steps, epochs = recipe.train.steps, recipe.train.epochs
    plan = batches.plan(epochs, exact=steps is None)
    batches.close()
    line = f"packing: {plan.padding:.1%} of a batch's tokens are padding"
    if steps is None and not plan.exact:
        line += (
            f"; {plan.steps:,} steps for train.epochs = {epochs}, estimated from a sample: "
            "genlora tokenize counts them"
        )
    print_line(line)
    return plan.steps if steps is None else steps


def _base_digest(directory: Path) -> str:
    """`checkpoint_digest`; of a bucket one process alone asks for the thousand pieces it takes."""
    if not is_remote(directory):
        return checkpoint_digest(directory)
    return text_of_primary(lambda: checkpoint_digest(directory))


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


def check_start(cfg: AdapterConfig, source: str | None) -> str | None:
    """Checks, before the base is loaded, that an adapter can start from `train.init_from`.

    Returns:
        The directory of the adapter, which may be that of a run; see `find_adapter`.

    Raises:
        FileNotFoundError: If no adapter is there.
        ValueError: If it was made with other settings, or is PEFT's and the config is not LoRA's.
    """
    if source is None:
        return None
    if jax.process_count() == 1:  # several would write the adapter of a checkpoint at once
        source = find_adapter(source)
    elif (storage_path(source) / "checkpoints").is_dir():
        raise ValueError(
            f"train.init_from: {source} is a run: several processes need its adapter's directory"
        )
    if not is_peft(source):
        if difference := adapter_difference(cfg, config_to_json(load_spec(source).config)):
            raise ValueError(f"train.init_from: {source} was made {difference}")
    elif not cfg.starts_from_peft:
        raise ValueError(
            f"train.init_from: {source} is a PEFT adapter, which goes on as LoRA alone: give "
            "adapter.class_path genlora_jax.LoRAConfig"
        )
    return source


def initial_adapter(
    cfg: AdapterConfig, seed: int, source: str | None, base: Base, *, mesh: Mesh | None = None
) -> Adapter:
    """A new adapter, or the one at `train.init_from`, which `check_start` has let pass.

    Args:
        cfg: The adapter's config.
        seed: Seed of the initial values.
        source: The directory of the adapter to start from, or None.
        base: The base.
        mesh: Devices over which the adapter is sharded, as in training on them.

    Raises:
        ValueError: If the one to start from was made for another base, or has a higher rank than
            the config.
    """
    key, params = jax.random.key(seed), base.params
    if source is None:
        return init_adapter(cfg, key, params, mesh=mesh)
    remark_on_base(source, base.source)
    if not is_peft(source):
        _, adapter = load_adapter(source, params, model=base.model, mesh=mesh)
        return adapter.with_config(cfg)  # its dropout may be another
    lora: Any = cfg
    factors = import_peft(source, params)
    rank = max(kind.rank(leaves) or 0 for kind, leaves in by_module(factors).values())
    if rank > lora.rank:
        raise ValueError(
            f"train.init_from: {source} has rank {rank}, more than adapter.rank ({lora.rank})"
        )
    try:
        return lora_from_factors(lora, factors, params=params, key=key)[0]
    except ValueError as error:
        raise ValueError(f"train.init_from: {source}: {error}") from error
