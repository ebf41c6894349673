r"""Sweeps rates, seeds and alphas at once, over one base in memory.

    genlora sweep --config RECIPE.yaml --grid.learning_rate '[0.001, 0.002]' --grid.seed '[0, 1, 2]'

The recipe is one of `genlora finetune`; every member of the sweep is what a run of its own would
make it. `train.output` then holds `results.jsonl` (a line a member, best first), `metrics.jsonl`
and `best/`, the adapter with the lowest evaluation loss. There are no checkpoints (`save_every`,
`keep` and `keep_every` are the run's): Ctrl-C and SIGTERM wait for the calls under way, two of
`steps_per_call` steps at most, evaluate, write that and leave; a second one ends at once, with
nothing.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genlora_jax.adapter import Adapter
from genlora_jax.adapter_files import save_adapter
from genlora_jax.files import new_directory, refuse_existing
from genlora_jax.mesh import make_mesh
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.settings import parse, report_errors
from genlora_jax.training.interrupt import Interruption
from genlora_jax.training.output import RECIPE, write_recipe
from genlora_jax.training.provenance import provenance
from genlora_jax.training.setup import check_start, initial_adapter, member_recipe, prepare
from genlora_jax.training.sweep.grid import SweepRecipe, choose_members
from genlora_jax.training.sweep.loop import check_passes, run_sweep
from genlora_jax.training.sweep.members import SweepResult
from genlora_jax.training.sweep.program import SweepProgram
from genlora_jax.training.sweep.report import print_progress, print_results, write_results


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
    run = prepare(recipe, mesh)
    print(f"{len(members)} members, {run.steps} steps")
    program = SweepProgram(
        model=run.base.model,
        cfg=recipe.adapter,
        optim=recipe.optim,
        steps=run.steps,
        options=recipe.step_options,
        loss=run.objective.loss,
        members_per_pass=recipe.members_per_pass,
        mesh=mesh,
    )

    def make_adapter(cfg: AdapterConfig, seed: int) -> Adapter:
        return initial_adapter(member_recipe(recipe, cfg, seed), run)

    with Interruption() as interruption:
        result = run_sweep(
            program,
            run.base.params,
            members,
            iter(run.objective.train_batches(run.examples, recipe.data)),
            run.held_out,
            eval_every=recipe.train.eval_every,
            steps_per_call=recipe.steps_per_call,
            make_adapter=make_adapter,
            report=print_progress,
            stop=lambda _: interruption.signal is not None,
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
        adapter = result.adapter(best)
        save_adapter(directory / "best", adapter.config, adapter, model=run.base.model)
    print_results(result)
    print(f"best adapter: {output / 'best'}")
    if len(result.loss) == run.steps:
        return result, None
    print(f"stopped at step {len(result.loss)} of {run.steps}")
    return result, interruption.signal


def main(args: Sequence[str] | None = None) -> None:
    """Command line; exits with 128 + the signal's number if a signal ended the sweep."""
    with report_errors():
        _, signal = sweep(parse(SweepRecipe, args))
    if signal is not None:
        sys.exit(128 + signal)


if __name__ == "__main__":
    main()
