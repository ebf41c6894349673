"""Fine-tunes a LLaMA with an adapter: `genlora finetune --config RECIPE.yaml`.

Any field of the recipe can be given on the command line (`--adapter.rank 16`); `--print_config`
shows what would run. The run's directory then holds `adapter/` (for `genlora merge`), the best one
by evaluation in `adapter-best/`, `checkpoints/`, `metrics.jsonl`, `tensorboard/` and the whole
recipe, `recipe.yaml`.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from genlora_jax.adapter import count_parameters, generate_factors
from genlora_jax.adapter_files import config_fingerprint, write_adapter
from genlora_jax.base.quantise import compiler_options
from genlora_jax.settings import run_command
from genlora_jax.sharding import local_rows, place_batch, state_shardings
from genlora_jax.storage import is_remote, storage_path
from genlora_jax.training import processes
from genlora_jax.training.checkpoint import Checkpoints
from genlora_jax.training.checkpoint_storage import naming_whole
from genlora_jax.training.divergence import check_finite, refuse_not_finite
from genlora_jax.training.feed import Feed
from genlora_jax.training.host_memory import keep_memory
from genlora_jax.training.metrics import MetricsLog, read_records
from genlora_jax.training.optim import learning_rate_schedule, make_optimizer
from genlora_jax.training.output import claimed, keep_recipe
from genlora_jax.training.pace import Pace
from genlora_jax.training.recipe import Recipe
from genlora_jax.training.recorder import Recorder, read
from genlora_jax.training.remat import step_that_fits
from genlora_jax.training.setup import Run, check_start, initial_adapter, prepare, recipe_mesh
from genlora_jax.training.step import (
    TrainState,
    evaluate,
    init_state,
    make_eval_step,
    make_train_step,
)


def finetune(recipe: Recipe) -> int | None:
    """Runs a recipe.

    Returns:
        The signal that ended the run early, or None.

    Raises:
        FloatingPointError: If the loss is no longer finite; the last checkpoint is kept.
    """
    settings = recipe.train
    if settings.distributed:
        processes.join(settings.heartbeat)
    primary = processes.is_primary()
    print_line = print if primary else lambda _: None
    claim: Any = claimed if primary else lambda _: contextlib.nullcontext(dict)  # no check
    with claim(recipe):  # checked now, before minutes of loading, and again when it is made
        source = check_start(recipe.adapter, settings.init_from)
    processes.keep_logs(settings.output)
    mesh = recipe_mesh(recipe)
    run = prepare(recipe, mesh, print_line)
    adapter = initial_adapter(recipe.adapter, settings.seed, source, run.base, mesh=mesh)
    print_line(f"{count_parameters(adapter):,} parameters to train")
    state = init_state(adapter, make_optimizer(recipe.optim, run.steps), settings.seed)
    state = jax.device_put(state, state_shardings(mesh, state))

    # Last of all preparations, so that one that fails leaves no directory.
    if primary and not is_remote(settings.output):
        Path(settings.output).mkdir(parents=True, exist_ok=True)
    with claim(recipe) as held:
        source = source or "the initial adapter"
        return run_in_output(recipe, run, state, source, print_line, held)


def run_in_output(
    recipe: Recipe,
    run: Run,
    state: TrainState,
    source: str,
    print_line: Callable[[object], None],
    before_save: Callable[[], object],
) -> int | None:
    """Trains in the run's directory, from its newest checkpoint if the recipe resumes.

    Args:
        recipe: The recipe.
        run: What it works on.
        state: The state before the first step.
        source: Where the state's adapter comes from, in words.
        print_line: Prints a line, in the process that prints.
        before_save: Raises if the directory is no longer this run's.

    Returns:
        The signal that ended the run early, or None.
    """
    settings, primary = recipe.train, processes.is_primary()
    output = storage_path(settings.output)
    checkpoints = Checkpoints(
        output / "checkpoints",
        keep=settings.keep,
        keep_every=settings.keep_every,
        base_config=config_fingerprint(run.base.model),
        origin=run.origin,
        before_save=before_save,
    )
    with (
        naming_whole(output, lambda: checkpoints.whole),
        checkpoints,
        feed(recipe, run) as batches,
        processes.stop_signals() as stop_signal,
    ):
        if settings.resume:
            state = checkpoints.restore(state, batches)
            none = checkpoints.latest() is None
            if settings.resume is True or not none:
                print_line(f"resumed at step {int(state.step)}" + ", as none was saved" * none)
            source = source if none else f"checkpoint {int(state.step)}"
        refuse_not_finite(state.adapter, source)
        start = int(state.step)
        if primary:
            keep_recipe(recipe, start)
        with MetricsLog(
            output,
            steps=run.steps,
            start=start,
            wandb=settings.wandb,
            settings=dataclasses.asdict(recipe),
            progress=settings.progress,
            primary=primary,
        ) as log:
            state, signal = train(recipe, run, state, batches, checkpoints, stop_signal, log)
        if signal is None:
            checkpoints.wait()
            save(output / "adapter", state, run)
            print_line(f"adapter: {output / 'adapter'}")
    return signal


def feed(recipe: Recipe, run: Run) -> Feed:
    """The batches of a run, of which a process makes the rows that its devices hold."""
    rows = recipe.data.batch_size
    slots = local_rows(run.mesh, rows)
    batches = run.objective.train_batches(run.source, recipe.data, slots=slots)
    return Feed(batches, functools.partial(place_batch, run.mesh, rows=rows))


def train(
    recipe: Recipe,
    run: Run,
    state: TrainState,
    batches: Feed,
    checkpoints: Checkpoints,
    stop_signal: Callable[[int], int | None],
    log: MetricsLog,
) -> tuple[TrainState, int | None]:
    """The loop: steps, evaluations and checkpoints.

    Returns:
        The last state, and the signal that ended the run early, or None.
    """
    keep_memory(jax.local_devices()[0])
    params, steps = run.base.params, run.steps
    train_step, eval_step = compiled_steps(recipe, run, log.print_line)
    held_out = [place_batch(run.mesh, batch) for batch in run.held_out]
    output, start = storage_path(recipe.train.output), int(state.step)
    best = min(best_eval_loss(output, start), checkpoints.best_loss(start))
    best = processes.broadcast_from_primary(best)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies counts by floats
        rates = np.asarray(jax.vmap(learning_rate_schedule(recipe.optim, steps))(np.arange(steps)))
    pace = Pace(log)
    recorder = Recorder(rates, checkpoints, log, params, pace.on_device(read), batches)
    train_step = pace.on_device(train_step)
    take = pace.on_device(batches.take)  # which waits for the device as well
    pending: dict[str, jax.Array] | None = None
    for step in range(start + 1, steps + 1):
        with pace.step(step):
            batch = take(None if pending is None else pending["loss"])
            state, metrics = train_step(state, params, batch)
            # Reading the metrics of the step before does not keep the device waiting.
            if pending is not None:
                recorder.record(step - 1, pending)
            pending = metrics
        pace.compare(step, pending)
        signal = stop_signal(step)  # called once a step, as a signal can come at any moment
        last = step == steps or signal is not None
        evaluating = held_out and (step == steps or _due(step, recipe.train.eval_every))
        if not (evaluating or last or _due(step, recipe.train.save_every)):
            continue
        recorder.record(step, pending)
        pending, loss = None, None
        checkpoints.before_save()
        if evaluating:
            factors = generate_factors(recipe.adapter, state.adapter)
            loss = evaluate(eval_step, params, factors, held_out)
            del factors  # perhaps as large as the base
            check_finite(step, {"eval_loss": loss}, params, checkpoints.latest())
            log.write(step, {"eval_loss": loss})
            log.print_line(f"step {step}: eval loss {loss:.4f}")
            if loss < best:
                best = loss
                save(output / "adapter-best", state, run)
        log.flush()
        checkpoints.save(state, batches, loss)
        recorder.restart()  # the next step's time has none of this
        if signal is not None and step < steps:
            checkpoints.wait()
            log.print_line(
                f"stopped at step {step}, saved; go on with --train.resume true, or take the "
                f"adapter so far: genlora merge --adapter {output}"
            )
            return state, signal
    return state, None


def compiled_steps(
    recipe: Recipe, run: Run, print_line: Callable[[str], None]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The steps of training and evaluation, which are compiled when they are first called."""
    model, device = run.base.model, jax.local_devices()[0]
    optimizer = make_optimizer(recipe.optim, run.steps)
    settings: dict[str, Any] = {
        "loss": run.objective.loss,
        "mesh": run.mesh,
        "compiler_options": compiler_options(run.base.params, device.platform),
    }

    def with_remat(policy: Any) -> Any:
        with_policy = model.clone(remat=policy)
        return make_train_step(with_policy, recipe.adapter, optimizer, run.options, **settings)

    layers = 0 if model.scan else model.config.num_hidden_layers
    step = step_that_fits(
        with_remat, recipe.model.policies(device.platform), device, print_line, layers
    )
    return announced(step, print_line), make_eval_step(model, run.options, **settings)


def announced(step: Callable[..., Any], print_line: Callable[[str], None]) -> Callable[..., Any]:
    """The step; before and after its first call, in which it is compiled, a line is printed."""
    called = False

    def call(*args: Any) -> Any:
        nonlocal called
        if called:
            return step(*args)
        called, began = True, time.monotonic()
        print_line("compiling the training step ...")
        result = jax.block_until_ready(step(*args))
        print_line(f"compiled, and made the first step, in {time.monotonic() - began:.1f} s")
        return result

    return call


def best_eval_loss(output: Any, step: int) -> float:
    """The lowest evaluation loss that a run recorded up to a step; infinity if none."""
    losses = [record.get("eval_loss", math.inf) for record in read_records(output, step)]
    return min(losses, default=math.inf)


def save(path: Any, state: TrainState, run: Run) -> None:
    """Writes the adapter, of which each process may hold a shard; it must be finite."""
    refuse_not_finite(state.adapter, f"{path} is not written")
    adapter, step = processes.gather_to_primary(state.adapter), int(state.step)
    if processes.is_primary():
        write_adapter(path, run.settings_of(adapter) | {"step": step}, adapter, overwrite=True)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def main(args: Sequence[str] | None = None) -> None:
    """Command line."""
    run_command(Recipe, finetune, args)


if __name__ == "__main__":
    main()
