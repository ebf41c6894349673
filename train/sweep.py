r"""Sweeps rates, seeds and alphas at once, over one base in memory.

    python train/sweep.py --config RECIPE.yaml --grid.learning_rate '[0.001, 0.002]' \
        --grid.seed '[0, 1, 2]'

The recipe is one of `train/finetune.py`; every member of the sweep is what a run of its own would
make it. `train.output` then holds `results.jsonl` (a line a member, best first), `metrics.jsonl`
and `best/`, the adapter with the lowest evaluation loss. There are no checkpoints (`save_every`,
`keep` and `keep_every` are the run's): Ctrl-C and SIGTERM wait for the calls under way, two of
`steps_per_call` steps at most, evaluate, write that and leave; a second one ends at once, with
nothing.
"""

import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import genlora_jax as gl
from genlora_jax.data.encode import load_examples
from genlora_jax.data.packing import eval_batches, train_batches
from genlora_jax.files import new_directory, refuse_existing
from genlora_jax.hf.checkpoint import load_tokenizer, locate
from genlora_jax.mesh import batch_shards, make_mesh
from genlora_jax.settings import parse, report_errors
from genlora_jax.training.interrupt import Interruption
from genlora_jax.training.output import RECIPE, write_recipe
from genlora_jax.training.provenance import provenance
from genlora_jax.training.recipe import Recipe
from genlora_jax.training.sweep.members import Member, SweepResult
from genlora_jax.training.sweep.run import check_passes, run_sweep
from train.finetune import check_shape, check_start, initial_adapter

FIELDS = tuple(field.name for field in dataclasses.fields(Member))
POINTS = 200  # of a training curve in results.jsonl


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The members: every combination of the lists, or those named one by one.

    Attributes:
        learning_rate: Values of `optim.learning_rate`.
        generator_ratio: Values of `optim.generator_ratio`.
        seed: Values of `train.seed`.
        alpha: Values of `adapter.alpha`.
        members: Instead of lists, members of any of these fields; the recipe has the others.
    """

    learning_rate: list[float] | None = None
    generator_ratio: list[float] | None = None
    seed: list[int] | None = None
    alpha: list[float] | None = None
    members: list[dict[str, int | float]] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        for name in (*FIELDS, "members"):
            if getattr(self, name) == []:
                raise ValueError(f"grid.{name} is empty: give values, or leave it out")
        lists = [name for name in FIELDS if getattr(self, name) is not None]
        if self.members and lists:
            raise ValueError(f"grid.members and grid.{lists[0]}: give either members or lists")
        for number, member in enumerate(self.members or [], 1):
            if unknown := sorted(set(member) - set(FIELDS)):
                raise ValueError(
                    f"grid.members: member {number} has an unknown field {unknown[0]}; "
                    f"fields are {', '.join(FIELDS)}"
                )


@dataclass(frozen=True, kw_only=True)
class SweepRecipe(Recipe):
    """A recipe and the grid to sweep.

    Attributes:
        grid: What the members have of their own.
        members_per_pass: Members whose activations are in memory at a time; divides their number,
            and is a multiple of `mesh.data`. Null for all.
        steps_per_call: Most steps in one call of the device.
    """

    grid: Grid = field(default_factory=Grid)
    members_per_pass: int | None = None
    steps_per_call: int = 16

    def __post_init__(self) -> None:
        """Raises ValueError that names the fields at fault."""
        super().__post_init__()
        if self.steps_per_call < 1:
            raise ValueError(f"steps_per_call must be at least 1, got {self.steps_per_call}")
        for name in ("resume", "distributed", "wandb"):
            if getattr(self.train, name):
                raise ValueError(f"train.{name}: a sweep has no such thing; leave it out")
        if self.data.eval is None:
            raise ValueError("data.eval is missing: a sweep needs it to tell which member is best")


def choose_members(recipe: SweepRecipe) -> list[Member]:
    """The members of a recipe's grid.

    Raises:
        ValueError: If a value cannot be or means nothing to the method, or two members are alike.
    """
    own = {
        "learning_rate": recipe.optim.learning_rate,
        "generator_ratio": recipe.optim.generator_ratio,
        "seed": recipe.train.seed,
        "alpha": getattr(recipe.adapter, "alpha", None),
    }
    named = recipe.grid.members
    rated = recipe.grid.generator_ratio or any("generator_ratio" in m for m in named or [])
    if rated and not isinstance(recipe.adapter, gl.GenLoRAConfig):
        method = type(recipe.adapter).__name__
        raise ValueError(f"grid.generator_ratio means nothing to {method}: leave it out")
    if named is None:
        lists = {name: getattr(recipe.grid, name) or [value] for name, value in own.items()}
        named = [dict(zip(lists, v, strict=True)) for v in itertools.product(*lists.values())]
    members: list[Member] = []
    for values in named:
        try:
            member = Member(**(own | values))  # type: ignore[arg-type]
            member.config(recipe.adapter)
        except ValueError as error:
            raise ValueError(f"grid: {error}") from None
        if member in members:
            raise ValueError(f"grid: {member} is there twice")
        members.append(member)
    return members


def sweep(recipe: SweepRecipe) -> tuple[SweepResult, int | None]:
    """Runs a sweep and writes its results.

    Returns:
        The results, and the signal that ended the sweep early, or None.

    Raises:
        FloatingPointError: If no member's evaluation was ever finite; nothing is written.
    """
    output = Path(recipe.train.output)
    refuse_existing(output, overwrite=False)
    members = choose_members(recipe)
    for cfg in {member.config(recipe.adapter) for member in members}:
        check_start(cfg, recipe.train.init_from)
    mesh = make_mesh(recipe.mesh)
    if len(members) % mesh.shape["data"] or recipe.data.batch_size % mesh.shape["fsdp"]:
        raise ValueError(
            f"mesh.data must divide the number of members ({len(members)}), and mesh.fsdp "
            f"data.batch_size ({recipe.data.batch_size}); they are {mesh.shape['data']} and "
            f"{mesh.shape['fsdp']}"
        )
    check_passes(recipe.members_per_pass, len(members), mesh.shape["data"])
    source = locate(recipe.model.path, revision=recipe.model.revision)
    tokenizer = load_tokenizer(source)
    examples, report = load_examples(recipe.data.train, tokenizer, recipe.data)
    print(report)
    eval_examples, report = load_examples(recipe.data.eval or [], tokenizer, recipe.data)
    print(report)

    options = dataclasses.asdict(recipe.model)
    del options["path"], options["shape"]
    check_shape(recipe, source)
    several = mesh if mesh.size > 1 else None
    model, params = gl.load_llama(source, **options, mesh=several)

    def make_adapter(cfg: gl.AdapterConfig, seed: int) -> gl.Adapter:
        train = dataclasses.replace(recipe.train, seed=seed)
        own = dataclasses.replace(recipe, train=train, adapter=cfg)
        return initial_adapter(own, params, model)

    steps = recipe.train.steps
    if steps is None:
        steps = sum(1 for _ in train_batches(examples, recipe.data, epochs=recipe.train.epochs))
    print(f"{len(members)} members, {steps} steps")
    with Interruption() as interruption:
        result = run_sweep(
            model,
            params,
            recipe.adapter,
            members,
            iter(train_batches(examples, recipe.data)),
            eval_batches(eval_examples, recipe.data),
            optim=recipe.optim,
            steps=steps,
            eval_every=recipe.train.eval_every,
            accumulate=recipe.train.accumulate,
            chunk=recipe.train.chunk * batch_shards(mesh),
            packed=recipe.data.pack,
            members_per_pass=recipe.members_per_pass,
            steps_per_call=recipe.steps_per_call,
            mesh=several,
            make_adapter=make_adapter,
            report=say,
            stop=lambda step: interruption.signal is not None,
        )
    best = result.ranking[0]
    if not np.isfinite(result.best_loss[best]):
        raise FloatingPointError(
            f"all {len(members)} members diverged, the last at step {result.diverged.max()}: "
            "lower grid.learning_rate"
        )
    with new_directory(output) as directory:
        write_recipe(directory / RECIPE, recipe, [f"# {json.dumps(provenance())}"])
        write_results(directory, result)
        cfg = members[best].config(recipe.adapter)
        gl.save_adapter(directory / "best", cfg, result.adapter(best), model=model)
    show(result)
    print(f"best adapter: {output / 'best'}")
    if len(result.loss) == steps:
        return result, None
    print(f"stopped at step {len(result.loss)} of {steps}")
    return result, interruption.signal


def say(step: int, losses: np.ndarray) -> None:
    """A line of progress."""
    finite = losses[np.isfinite(losses)]
    lowest = f"lowest eval loss {finite.min():.4f}" if len(finite) else "no finite eval loss"
    print(f"step {step}: {lowest}, {len(finite)} of {len(losses)} members finite")


def summaries(result: SweepResult) -> list[dict[str, Any]]:
    """A record of each member, best first."""
    every = -(-len(result.loss) // POINTS)
    return [
        dataclasses.asdict(result.members[i])
        | {
            "best_eval_loss": float(result.best_loss[i]),
            "best_step": int(result.best_step[i]) or None,
            "final_eval_loss": float(result.eval_loss[-1, i]),
            "diverged_at": int(result.diverged[i]) or None,
            "steps": len(result.loss),
            "loss_every": every,
            "loss": result.loss[every - 1 :: every, i].tolist(),
        }
        for i in result.ranking
    ]


def write_results(directory: Path, result: SweepResult) -> None:
    """`results.jsonl` and `metrics.jsonl`; what is not finite is null there."""
    evaluations = dict(zip(result.eval_steps.tolist(), result.eval_loss.tolist(), strict=True))
    metrics: list[dict[str, Any]] = []
    for i, losses in enumerate(result.loss):
        record = {"step": i + 1, "loss": losses.tolist(), "grad_norm": result.grad_norm[i].tolist()}
        if i + 1 in evaluations:
            record["eval_loss"] = evaluations[i + 1]
        metrics.append(record)
    for name, records in (("results", summaries(result)), ("metrics", metrics)):
        text = "".join(json.dumps(_strict(record), allow_nan=False) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def at_edge(result: SweepResult) -> str | None:
    """What to widen the grid by, if the best rate is the lowest or highest of several."""
    rates = sorted({member.learning_rate for member in result.members})
    best = result.members[result.ranking[0]].learning_rate
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    side = "lowest: widen it downwards" if best == rates[0] else "highest: widen it upwards"
    return f"the best learning rate, {best:g}, is the grid's {side}"


def show(result: SweepResult) -> None:
    """A table of the members, best first."""
    table = Table("rate", "ratio", "seed", "alpha", "best loss", "at step", "last loss", "")
    for record in summaries(result):
        diverged = record["diverged_at"]
        table.add_row(
            *("-" if record[name] is None else f"{record[name]:g}" for name in FIELDS),
            f"{record['best_eval_loss']:.4f}",
            str(record["best_step"] or ""),
            f"{record['final_eval_loss']:.4f}",
            f"diverged at step {diverged}" if diverged else "",
        )
    Console().print(table)
    if said := at_edge(result):
        print(said)


def main() -> None:
    """Command line; exits with 128 + the signal's number if a signal ended the sweep."""
    with report_errors():
        _, number = sweep(parse(SweepRecipe))
    if number is not None:
        sys.exit(128 + number)


if __name__ == "__main__":
    main()
