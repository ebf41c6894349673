"""Fine-tunes a LLaMA with an adapter: `genlora finetune --config RECIPE.yaml`.

Any field of the recipe can be given on the command line (`--adapter.rank 16`); `--print_config`
shows what would run. The run's directory then holds `adapter/` (for `genlora merge`), the best one
by evaluation in `adapter-best/`, `checkpoints/`, `metrics.jsonl`, `tensorboard/` and the whole
recipe, `recipe.yaml`.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from genlora_jax.adapter import Adapter, count_parameters, generate_factors
from genlora_jax.adapter_files import config_fingerprint, save_adapter
from genlora_jax.settings import parse, report_errors
from genlora_jax.sharding import place_batch, state_shardings
from genlora_jax.training.checkpoint import Checkpoints
from genlora_jax.training.metrics import MetricsLog, read_records
from genlora_jax.training.optim import learning_rate_schedule, make_optimizer
from genlora_jax.training.output import check_output, keep_recipe, make_output
from genlora_jax.training.processes import (
    Stopping,
    broadcast_from_primary,
    gather_to_primary,
    is_primary,
    join,
)
from genlora_jax.training.recipe import Recipe
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
    if recipe.train.distributed:
        join(recipe.train.heartbeat)
    say = print if is_primary() else lambda _: None
    if is_primary():
        check_output(recipe)
    check_start(recipe.adapter, recipe.train.init_from)
    mesh = recipe_mesh(recipe)
    run = prepare(recipe, mesh, say)
    adapter = initial_adapter(recipe, run, mesh=mesh)
    say(f"{count_parameters(adapter):,} parameters to train")
    state = init_state(adapter, make_optimizer(recipe.optim, run.steps), recipe.train.seed)
    state = jax.device_put(state, state_shardings(mesh, state))

    output = Path(recipe.train.output)
    if is_primary():
        make_output(output)
    checkpoints = Checkpoints(
        output / "checkpoints",
        keep=recipe.train.keep,
        keep_every=recipe.train.keep_every,
        base_config=config_fingerprint(run.base.model),
    )
    with checkpoints, Stopping() as stopping:
        batches = iter(run.objective.train_batches(run.examples, recipe.data))
        if recipe.train.resume:
            state = checkpoints.restore(state, batches)
            say(f"resumed at step {int(state.step)}")
        start = int(state.step)
        if is_primary():
            keep_recipe(recipe, start)
        with MetricsLog(
            output,
            steps=run.steps,
            start=start,
            wandb=recipe.train.wandb,
            settings=dataclasses.asdict(recipe),
            progress=recipe.train.progress,
            primary=is_primary(),
        ) as log:
            state, signal = train(recipe, run, state, batches, checkpoints, stopping, log)
    if signal is None:
        save(output / "adapter", state.adapter, run.base.model)
        say(f"adapter: {output / 'adapter'}")
    return signal


def train(
    recipe: Recipe,
    run: Run,
    state: TrainState,
    batches: Iterator[Any],
    checkpoints: Checkpoints,
    stopping: Stopping,
    log: MetricsLog,
) -> tuple[TrainState, int | None]:
    """The loop: steps, evaluations and checkpoints.

    Returns:
        The last state, and the signal that ended the run early, or None.
    """
    base, mesh, steps, options = run.base, run.mesh, run.steps, recipe.step_options
    optimizer, loss_of = make_optimizer(recipe.optim, steps), run.objective.loss
    train_step = make_train_step(
        base.model, recipe.adapter, optimizer, options, loss=loss_of, mesh=mesh
    )
    eval_step = make_eval_step(base.model, options, loss=loss_of, mesh=mesh)
    place = functools.partial(place_batch, mesh)
    held_out = [place(batch) for batch in run.held_out]
    output, start = Path(recipe.train.output), int(state.step)
    best = broadcast_from_primary(best_eval_loss(output, start))
    schedule = learning_rate_schedule(recipe.optim, steps)
    recorder = Recorder(schedule, checkpoints, log)
    pending: dict[str, jax.Array] | None = None
    for step in range(start + 1, steps + 1):
        state, metrics = train_step(state, base.params, place(next(batches)))
        # The metrics of the step before: the device never waits for the host to look.
        if pending is not None:
            recorder.record(step - 1, pending)
        pending = metrics
        stopped = stopping.after(step)  # asked once: it can come at any moment
        last = step == steps or stopped is not None
        evaluating = held_out and (step == steps or _due(step, recipe.train.eval_every))
        if not (evaluating or last or _due(step, recipe.train.save_every)):
            continue
        recorder.record(step, pending)
        pending, loss = None, None
        if evaluating:
            factors = generate_factors(recipe.adapter, state.adapter)
            loss = evaluate(eval_step, base.params, factors, held_out)
            del factors  # perhaps as large as the base
            log.write(step, {"eval_loss": loss})
            log.say(f"step {step}: eval loss {loss:.4f}")
            if loss < best:
                best = loss
                save(output / "adapter-best", state.adapter, base.model)
        checkpoints.save(state, batches, loss)
        recorder.restart_clock()
        if stopped is not None and step < steps:
            checkpoints.wait()
            log.say(f"stopped at step {step}, saved; go on with --train.resume true")
            return state, stopped
    return state, None


@dataclass
class Recorder:
    """Waits for the metrics of steps, checks and writes them.

    Attributes:
        schedule: Learning rate by step.
        checkpoints: What there is to go back to.
        log: Where metrics go.
        clock: When the last step was recorded.
    """

    schedule: Callable[[int], Any]
    checkpoints: Checkpoints
    log: MetricsLog
    clock: float = dataclasses.field(default_factory=time.monotonic)

    def restart_clock(self) -> None:
        """Leaves out of the next step's time what was done besides."""
        self.clock = time.monotonic()

    def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Writes a step's metrics.

        Raises:
            FloatingPointError: If they are not finite.
        """
        values = {name: float(value) for name, value in metrics.items()}
        now = time.monotonic()
        values["tokens_per_second"] = values["tokens"] / (now - self.clock)
        values["learning_rate"] = float(self.schedule(step - 1))
        self.clock = now
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            saved = self.checkpoints.latest()
            kept = f"the last good checkpoint, of step {saved}, is kept"
            raise FloatingPointError(
                f"the loss is {values['loss']} (gradient norm {values['grad_norm']}) at step "
                f"{step}; {kept if saved is not None else 'nothing had been saved yet'}. "
                "Lower optim.learning_rate"
            )
        self.log.write(step, values)
        self.log.advance(
            step, loss=f"{values['loss']:.4f}", tok_s=f"{values['tokens_per_second']:,.0f}"
        )


def best_eval_loss(output: Path, step: int) -> float:
    """The lowest evaluation loss that a run recorded up to a step; infinity if none."""
    losses = [record.get("eval_loss", math.inf) for record in read_records(output, step)]
    return min(losses, default=math.inf)


def save(path: Path, adapter: Adapter, model: Any) -> None:
    """Writes the adapter, of which each process may hold a shard."""
    adapter = gather_to_primary(adapter)
    if is_primary():
        save_adapter(path, adapter.config, adapter, model=model, overwrite=True)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def main(args: Sequence[str] | None = None) -> None:
    """Command line; exits with 128 + the signal's number if a signal ended the run."""
    with report_errors():
        signal = finetune(parse(Recipe, args))
    if signal is not None:
        sys.exit(128 + signal)


if __name__ == "__main__":
    main()
