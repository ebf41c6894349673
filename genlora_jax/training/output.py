"""A run's directory, new or of the run to resume, and the recipe that is kept there."""

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from genlora_jax.atomic_files import refuse_unwritable, write_whole
from genlora_jax.settings import dump, parse
from genlora_jax.training.provenance import provenance
from genlora_jax.training.recipe import Recipe

RECIPE = "recipe.yaml"
# Fields of `train` that change nothing of a run's result.
WITHOUT_EFFECT = {"output", "resume", "progress", "wandb", "distributed", "heartbeat"}


def check_output(recipe: Recipe) -> None:
    """Raises OSError unless the run's directory is a new one or that of the run to resume."""
    output = Path(recipe.train.output)
    if recipe.train.resume and not (output / "checkpoints").is_dir():
        raise FileNotFoundError(f"nothing to resume in {output}: it has no checkpoints")
    if not recipe.train.resume and output.exists() and any(output.iterdir()):
        raise FileExistsError(
            f"{output} is not empty: give another train.output, or train.resume to go on there"
        )
    if not output.exists():
        refuse_unwritable(output)
    if recipe.train.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError('train.wandb needs Weights & Biases: pip install "genlora_jax[wandb]"')


def keep_recipe(recipe: Recipe, step: int = 0) -> None:
    """Writes the recipe, and prints where a resumed run differs from what it was started with.

    Args:
        recipe: The run's.
        step: The step from which it runs: each start adds a line of versions, commit and machine.
    """
    file = Path(recipe.train.output) / RECIPE
    comments = []
    if recipe.train.resume and file.is_file():
        comments = [line for line in file.read_text("utf-8").splitlines() if line.startswith("#")]
        try:
            stored = _settings(parse(Recipe, ["--config", str(file)]))
        except ValueError as error:  # of another version: no reason not to go on
            print(f"{file} cannot be compared with this run's: {error}")
        else:
            for name, value in sorted(_settings(recipe).items()):
                if value != (before := stored.get(name)):
                    print(f"resumed with {name} {value!r}, which was {before!r}")
    write_recipe(file, recipe, [*comments, f"# from step {step}: {json.dumps(provenance())}"])


def write_recipe(file: Path, recipe: Recipe, comments: Sequence[str]) -> None:
    """Writes a recipe as YAML from which another run can be started, below some comments."""
    train = dataclasses.replace(recipe.train, resume=False)
    write_whole(file, "\n".join([*comments, dump(dataclasses.replace(recipe, train=train))]))


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What decides on a run's result, by its name in the recipe."""
    flat = flatten_dict(dataclasses.asdict(recipe), sep=".")
    without_effect = {"show", *(f"train.{name}" for name in WITHOUT_EFFECT)}
    return {name: flat[name] for name in flat.keys() - without_effect}
