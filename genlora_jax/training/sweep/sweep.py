r"""Sweeps rates, seeds and alphas at once, over one base in memory.

    genlora sweep --config RECIPE.yaml --grid.learning_rate '[0.001, 0.002]' --grid.seed '[0, 1, 2]'

The recipe is one of `genlora finetune`. Every member of the sweep becomes what a run of it alone
would make. `train.output` then holds `results.jsonl` (a line a member, best first), `metrics.jsonl`
and `best/`, the adapter with the lowest evaluation loss.

There are no checkpoints, so `save_every`, `keep` and `keep_every` have no effect. Ctrl-C and
SIGTERM wait for the calls under way (two of `steps_per_call` steps at most), evaluate, write the
results and leave. A second signal ends at once and writes nothing.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from genlora_jax.adapter import Adapter
from genlora_jax.adapter_files import write_adapter
from genlora_jax.atomic_files import new_directory, refuse_existing
from genlora_jax.mesh import make_mesh
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.settings import run_command
from genlora_jax.storage import storage_path
from genlora_jax.training.divergence import advice, refuse_not_finite
from genlora_jax.training.output import RECIPE, write_recipe
from genlora_jax.training.processes import Interruption
from genlora_jax.training.provenance import provenance
from genlora_jax.training.setup import check_start, initial_adapter, prepare
from genlora_jax.training.sweep.loop import SweepResult, check_members, run_sweep
from genlora_jax.training.sweep.members import SweepRecipe
from genlora_jax.training.sweep.program import SweepProgram
from genlora_jax.training.sweep.report import print_progress, print_results, write_results
from genlora_jax.validation import first_not_finite


def sweep(recipe: SweepRecipe) -> int | None:
    """Runs a sweep and writes its results.

    Returns:
        The signal that ended the sweep early, or None.

    Raises:
        FloatingPointError: If no member's evaluation was ever finite; nothing is written.
    """
    output = _new_output(recipe)
    members = recipe.members()
    source = recipe.train.init_from
    for cfg in {member.config(recipe.adapter) for member in members}:
        source = check_start(cfg, source)
    mesh = make_mesh(recipe.mesh)
    check_members(len(members), mesh, recipe.members_per_pass)
    if recipe.data.batch_size % mesh.shape["fsdp"]:
        raise ValueError(
            f"data.batch_size ({recipe.data.batch_size}) is no multiple of "
            f"mesh.fsdp ({mesh.shape['fsdp']})"
        )
    run = prepare(recipe, mesh)
    print(f"{len(members)} members, {run.steps} steps; compiling, then training ...")
    program = SweepProgram(
        model=run.base.model,
        cfg=recipe.adapter,
        optim=recipe.optim,
        steps=run.steps,
        options=run.options,
        loss=run.objective.loss,
        members_per_pass=recipe.members_per_pass,
        mesh=mesh,
    )

    def make_adapter(cfg: AdapterConfig, seed: int) -> Adapter:
        return initial_adapter(cfg, seed, source, run.base)

    with new_directory(output) as directory:  # from now on, so that no other command takes it
        with Interruption() as interruption:
            result = run_sweep(
                program,
                run.base.params,
                members,
                iter(run.objective.train_batches(run.source, recipe.data)),
                run.held_out,
                eval_every=recipe.train.eval_every,
                steps_per_call=recipe.steps_per_call,
                make_adapter=make_adapter,
                report=print_progress,
                stop=lambda _: interruption.signal is not None,
            )
        best = result.ranking[0]
        _refuse_diverged(result, run.base.params)
        write_recipe(directory / RECIPE, recipe, [f"# {json.dumps(provenance())}"])
        write_results(directory, result)
        adapter = result.adapter(best)
        if first_not_finite(adapter) is None:
            write_adapter(directory / "best", run.settings_of(adapter), adapter)
    print_results(result)
    refuse_not_finite(adapter, f"{output / 'best'} is not written")
    print(f"best adapter: {output / 'best'}")
    if len(result.loss) == run.steps:
        return None
    print(f"stopped at step {len(result.loss)} of {run.steps}")
    return interruption.signal


def _new_output(recipe: SweepRecipe) -> Any:
    """The directory to make; raises OSError if it is there or cannot be made."""
    output, inputs = storage_path(recipe.train.output), (recipe.model.path, recipe.train.init_from)
    if output.exists():  # the other check's advice is a flag that a sweep has not got
        raise FileExistsError(f"{output} exists: choose another train.output")
    refuse_existing(output, overwrite=False, inputs=inputs)
    return output


def _refuse_diverged(result: SweepResult, params: Any) -> None:
    """Raises FloatingPointError if no member has an adapter to show."""
    if not np.isfinite(result.best_loss).any():
        step = int(result.diverged.max())
        raise FloatingPointError(
            f"all {len(result.members)} members diverged, the last at step {step}: "
            f"{advice(step, params, 'grid.learning_rate')}"
        )


def main(args: Sequence[str] | None = None) -> None:
    """Command line."""
    run_command(SweepRecipe, sweep, args)


if __name__ == "__main__":
    main()
