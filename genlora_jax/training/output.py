"""A run's directory: a new one, or that of the run to resume; the recipe is kept there."""

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from genlora_jax.files import write_whole
from genlora_jax.settings import dump, parse
from genlora_jax.training.provenance import provenance
from genlora_jax.training.recipe import Recipe

RECIPE = "recipe.yaml"
# What changes nothing of a run's result.
ASIDE = {"output", "resume", "progress", "wandb", "distributed", "heartbeat"}


def check_output(recipe: Recipe) -> None:
    """Raises OSError unless the run's directory is a new one or that of the run to resume."""
    output = Path(recipe.train.output)
    if recipe.train.resume and not (output / "checkpoints").is_dir():
        raise FileNotFoundError(f"nothing to resume in {output}: it has no checkpoints")
    if not recipe.train.resume and output.exists() and any(output.iterdir()):
        raise FileExistsError(
            f"{output} is not empty: give another train.output, or train.resume to go on there"
        )
    if recipe.train.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError('train.wandb needs Weights & Biases: pip install "genlora_jax[wandb]"')


def make_output(output: Path) -> None:
    """Makes the run's directory: last of all preparations, so that one that fails leaves none."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"cannot make train.output {output}: {error.strerror}") from error


def keep_recipe(recipe: Recipe, step: int = 0) -> None:
    """Writes the recipe; tells what a run that goes on does otherwise than before.

    Args:
        recipe: The run's.
        step: The step from which it runs: each start leaves a line of versions, commit and machine.
    """
    file = Path(recipe.train.output) / RECIPE
    starts = []
    if recipe.train.resume and file.is_file():
        starts = [line for line in file.read_text("utf-8").splitlines() if line.startswith("#")]
        try:
            before, now = _settings(parse(Recipe, ["--config", str(file)])), _settings(recipe)
        except ValueError as error:  # of another version: no reason not to go on
            print(f"{file} cannot be compared with this run's: {error}")
        else:
            for name in sorted(name for name in now if now[name] != before.get(name)):
                print(f"resumed with {name} {now[name]!r}, which was {before.get(name)!r}")
    write_recipe(file, recipe, [*starts, f"# from step {step}: {json.dumps(provenance())}"])


def write_recipe(file: Path, recipe: Recipe, comments: Sequence[str]) -> None:
    """Writes a recipe as YAML from which another run can be started, below some comments."""
    fresh = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, resume=False))
    write_whole(file, "\n".join([*comments, dump(fresh)]))


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What decides on a run's result, by its name in the recipe."""
    flat = flatten_dict(dataclasses.asdict(recipe), sep=".")
    return {name: flat[name] for name in flat.keys() - {f"train.{field}" for field in ASIDE}}
