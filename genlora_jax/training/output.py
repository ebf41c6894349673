"""A run's directory, new or of the run to resume, and the recipe that is kept there."""

import contextlib
import dataclasses
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from genlora_jax.atomic_files import (
    locked,
    refuse_existing,
    refuse_inside,
    refuse_unwritable,
    write_whole,
)
from genlora_jax.settings import dump, parse
from genlora_jax.storage import is_remote, listed, storage_path
from genlora_jax.training.claims import CLAIM, held
from genlora_jax.training.processes import LOGS
from genlora_jax.training.provenance import provenance
from genlora_jax.training.recipe import Recipe

RECIPE = "recipe.yaml"
# Fields of `train` that change nothing of a run's result.
WITHOUT_EFFECT = {"output", "resume", "progress", "wandb", "distributed", "heartbeat"}


@contextlib.contextmanager
def claimed(recipe: Recipe) -> Iterator[Callable[[], object]]:
    """Holds the run's directory, if it is there, against other runs, and checks it.

    Yields:
        A check, for the moment before something is written, that it is held still.

    Raises:
        OSError: If another run is under way in it, if it is not empty, or if there is no run in it
            to resume.
    """
    output = storage_path(recipe.train.output)
    with contextlib.ExitStack() as stack:
        check: Callable[[], object] = dict  # a lock is held while the process lives
        try:
            if is_remote(output):
                check = stack.enter_context(held(str(output)))
            elif output.is_dir():
                stack.enter_context(locked(output))
        except BlockingIOError:
            raise FileExistsError(
                f"{output}: another run is under way in it: wait for its end, or give another "
                "train.output"
            ) from None
        _check_output(recipe, output)
        yield check


def _check_output(recipe: Recipe, output: Any) -> None:
    settings = recipe.train
    refuse_inside(output, (recipe.model.path, settings.init_from))
    # A run that was killed before its first checkpoint can be resumed as well: it begins anew.
    holds_run = any((output / name).exists() for name in (RECIPE, "checkpoints"))
    if settings.resume is True and not holds_run:
        raise FileNotFoundError(f"nothing to resume in {output}: it holds no run")
    resumes = settings.resume and holds_run
    if is_remote(output):
        names = {name.partition("/")[0] for name in listed(output)}
    else:
        names = {path.name for path in output.iterdir()} if output.exists() else set()
    # Logs may be there before, of processes that could not begin the run.
    if not resumes and names - {LOGS, CLAIM}:
        advice = ", or go on there with --train.resume true" if holds_run else ""
        raise FileExistsError(f"{output} is not empty: give another train.output{advice}")
    if resumes:
        for name in ("adapter", "adapter-best"):
            refuse_existing(output / name, overwrite=True)
    if not is_remote(output) and not output.exists():  # a bucket has taken the claim already
        refuse_unwritable(output)
    if settings.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError('train.wandb needs Weights & Biases: pip install "genlora_jax[wandb]"')


def keep_recipe(recipe: Recipe, step: int = 0) -> None:
    """Writes the recipe, and prints where a resumed run differs from what it was started with.

    Args:
        recipe: The run's.
        step: The step from which it runs: each start adds a line of versions, commit and machine.
    """
    file = storage_path(recipe.train.output) / RECIPE
    comments = []
    if recipe.train.resume and file.is_file():
        text = file.read_text("utf-8")
        comments = [line for line in text.splitlines() if line.startswith("#")]
        try:
            stored = _settings(_parse(text))
        except ValueError as error:  # of another version: no reason not to go on
            print(f"{file} cannot be compared with this run's: {error}")
        else:
            for name, value in sorted(_settings(recipe).items()):
                if value != (before := stored.get(name)):
                    print(f"resumed with {name} {value!r}, which was {before!r}")
    write_recipe(file, recipe, [*comments, f"# from step {step}: {json.dumps(provenance())}"])


def _parse(text: str) -> Recipe:
    """The recipe of a file's text, which may come from a bucket; the parser reads files."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".yaml") as copy:
        copy.write(text)
        copy.flush()
        return parse(Recipe, ["--config", copy.name])


def write_recipe(file: Any, recipe: Recipe, comments: Sequence[str]) -> None:
    """Writes a recipe as YAML from which another run can be started, below some comments."""
    train = dataclasses.replace(recipe.train, resume=False)
    write_whole(file, "\n".join([*comments, dump(dataclasses.replace(recipe, train=train))]))


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What decides on a run's result, by its name in the recipe."""
    flat = flatten_dict(dataclasses.asdict(recipe), sep=".")
    without_effect = {"show", *(f"train.{name}" for name in WITHOUT_EFFECT)}
    return {name: flat[name] for name in flat.keys() - without_effect}
