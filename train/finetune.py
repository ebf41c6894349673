"""Fine-tunes a LLaMA with an adapter: `python train/finetune.py --config train/recipes/NAME.yaml`.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import genlora_jax as gl
from genlora_jax.adapter_files import load_config
from genlora_jax.data.encode import load_examples
from genlora_jax.data.packing import eval_batches, train_batches
from genlora_jax.factors import by_module
from genlora_jax.hf.checkpoint import load_tokenizer, locate, model_config
from genlora_jax.hf.peft_import import is_peft
from genlora_jax.mesh import batch_shards, make_mesh
from genlora_jax.methods import config_to_json
from genlora_jax.settings import parse, report_errors
from genlora_jax.sharding import place_batch, state_shardings
from genlora_jax.training.checkpoint import Checkpoints, difference
from genlora_jax.training.metrics import MetricsLog, read_records
from genlora_jax.training.optim import learning_rate_schedule, make_optimizer
from genlora_jax.training.output import check_output, keep_recipe, make_output
from genlora_jax.training.processes import Stopping, is_primary, join, on_primary, told_by_primary
from genlora_jax.training.recipe import Recipe
from genlora_jax.training.step import (
    TrainState,
    evaluate,
    init_state,
    make_eval_step,
    make_train_step,
)


def choose_mesh(recipe: Recipe) -> Mesh | None:
    """The mesh of a recipe; None on one device.

    Raises:
        ValueError: If the devices or the batch cannot be shared out as it says.
    """
    mesh = make_mesh(recipe.mesh)
    parts = batch_shards(mesh) * recipe.train.accumulate
    if recipe.data.batch_size % parts:
        raise ValueError(
            f"data.batch_size ({recipe.data.batch_size}) is no multiple of mesh.data x mesh.fsdp x "
            f"train.accumulate ({parts})"
        )
    return mesh if mesh.size > 1 else None


def check_shape(recipe: Recipe, source: Path) -> None:
    """Raises ValueError if the recipe's shape of the model, where it has one, is another."""
    config = model_config(source)
    for field in dataclasses.fields(config) if recipe.model.shape else ():
        said, found = (getattr(x, field.name) for x in (recipe.model.shape, config))
        if said != found:
            raise ValueError(f"model.shape: {field.name} is {said}; the checkpoint has {found}")


def check_start(cfg: gl.AdapterConfig, source: str | None) -> None:
    """Raises if an adapter of the config cannot start from the source; a base is not needed.

    Raises:
        FileNotFoundError: If no adapter is there.
        ValueError: If it was made with other settings, or is PEFT's and the config is not LoRA's.
    """
    if source is None:
        return
    if not is_peft(source):
        if said := difference(config_to_json(load_config(source)), config_to_json(cfg)):
            raise ValueError(f"train.init_from: {source} was made {said}")
    elif type(cfg) is not gl.LoRAConfig:
        raise ValueError(
            f"train.init_from: {source} is a PEFT adapter, which goes on as LoRA alone: give "
            "adapter.class_path genlora_jax.LoRAConfig"
        )


def initial_adapter(
    recipe: Recipe, params: Any, model: Any, mesh: Mesh | None = None
) -> gl.Adapter:
    """A new adapter, or the one to start from, which `check_start` let pass.

    Laid out on a mesh if there is one, but for one of PEFT's, which is small.

    Raises:
        ValueError: If that one was made for another base, or the recipe's adapter has no room for a
            PEFT adapter.
    """
    key, source = jax.random.key(recipe.train.seed), recipe.train.init_from
    if source is None:
        return gl.init_adapter(recipe.adapter, key, params, mesh=mesh)
    if isinstance(recipe.adapter, gl.LoRAConfig) and is_peft(source):
        factors = gl.import_peft(source, params)
        rank = max(kind.rank(leaves) or 0 for kind, leaves in by_module(factors).values())
        if rank > recipe.adapter.rank:
            raise ValueError(
                f"train.init_from: {source} has rank {rank}, more than adapter.rank "
                f"({recipe.adapter.rank})"
            )
        try:
            return gl.fit(recipe.adapter, factors, params=params, key=key)[0]
        except ValueError as error:
            raise ValueError(f"train.init_from: {source}: {error}") from error
    return gl.load_adapter(source, params, model=model, mesh=mesh)[1]


def finetune(recipe: Recipe) -> int | None:
    """Runs a recipe.

    Returns:
        The signal that ended the run early, or None.

    Raises:
        FloatingPointError: If the loss is no longer finite; the last checkpoint is kept.
    """
    if recipe.train.distributed:
        join(recipe.train.heartbeat)
    output = Path(recipe.train.output)
    if is_primary():
        check_output(recipe)
    # What can be refused is refused before minutes of loading.
    check_start(recipe.adapter, recipe.train.init_from)
    mesh = choose_mesh(recipe)
    say = print if is_primary() else lambda *_: None
    source = locate(recipe.model.path, revision=recipe.model.revision)
    tokenizer = load_tokenizer(source)
    examples, report = load_examples(recipe.data.train, tokenizer, recipe.data)
    say(report)
    held_out = []
    if recipe.data.eval:
        eval_examples, report = load_examples(recipe.data.eval, tokenizer, recipe.data)
        say(report)
        held_out = eval_batches(eval_examples, recipe.data)

    options = dataclasses.asdict(recipe.model)
    del options["path"], options["shape"]
    check_shape(recipe, source)
    model, params = gl.load_llama(source, **options, mesh=mesh)
    adapter = initial_adapter(recipe, params, model, mesh)
    say(f"{gl.count_parameters(adapter):,} parameters to train")

    steps = recipe.train.steps
    if steps is None:
        steps = sum(1 for _ in train_batches(examples, recipe.data, epochs=recipe.train.epochs))
    optimizer = make_optimizer(recipe.optim, steps)
    schedule = learning_rate_schedule(recipe.optim, steps)
    chunk = recipe.train.chunk * (batch_shards(mesh) if mesh else 1)
    train_step = make_train_step(
        model,
        recipe.adapter,
        optimizer,
        accumulate=recipe.train.accumulate,
        chunk=chunk,
        packed=recipe.data.pack,
        mesh=mesh,
    )
    eval_step = make_eval_step(model, chunk=chunk, packed=recipe.data.pack, mesh=mesh)
    state = init_state(adapter, optimizer, recipe.train.seed)
    place: Callable[[Any], Any] = lambda batch: batch  # noqa: E731
    if mesh is not None:
        state = jax.device_put(state, state_shardings(mesh, state))
        place = functools.partial(place_batch, mesh)
    held_out = [place(batch) for batch in held_out]
    batches = iter(train_batches(examples, recipe.data))
    if is_primary():
        make_output(output)

    with (
        Checkpoints(
            output / "checkpoints",
            keep=recipe.train.keep,
            keep_every=recipe.train.keep_every,
            adapter=recipe.adapter,
        ) as checkpoints,
        Stopping() as stopping,
    ):
        if recipe.train.resume:
            state = checkpoints.restore(state, batches)
            say(f"resumed at step {int(state.step)}")
        if is_primary():
            keep_recipe(recipe, int(state.step))
        start = int(state.step)
        best = told_by_primary(best_eval_loss(output, start))
        with MetricsLog(
            output,
            steps=steps,
            start=start,
            wandb=recipe.train.wandb,
            settings=dataclasses.asdict(recipe),
            progress=recipe.train.progress,
            primary=is_primary(),
        ) as log:
            clock = time.monotonic()

            def record(step: int, metrics: dict[str, jax.Array]) -> None:
                """Waits for a step's metrics, checks and writes them."""
                nonlocal clock
                values = {name: float(value) for name, value in metrics.items()}
                now = time.monotonic()
                values["tokens_per_second"] = values["tokens"] / (now - clock)
                values["learning_rate"] = float(schedule(step - 1))
                clock = now
                if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
                    raise FloatingPointError(
                        f"the loss is {values['loss']} (gradient norm {values['grad_norm']}) at "
                        f"step {step}; {last_good(checkpoints)}. Lower optim.learning_rate"
                    )
                log.write(step, values)
                log.advance(
                    step, loss=f"{values['loss']:.4f}", tok_s=f"{values['tokens_per_second']:,.0f}"
                )

            pending: dict[str, jax.Array] | None = None
            for step in range(start + 1, steps + 1):
                state, metrics = train_step(state, params, place(next(batches)))
                # The metrics of the step before: the device never waits for the host to look.
                if pending is not None:
                    record(step - 1, pending)
                pending = metrics
                stopped = stopping.after(step)  # asked once: it can come at any moment
                last = step == steps or stopped is not None
                due = {
                    "eval": bool(held_out)
                    and (step == steps or _due(step, recipe.train.eval_every)),
                    "save": last or _due(step, recipe.train.save_every),
                }
                if any(due.values()):
                    record(step, pending)
                    pending = None
                    loss = None
                    if due["eval"]:
                        factors = gl.generate_factors(recipe.adapter, state.adapter)
                        loss = evaluate(eval_step, params, factors, held_out)
                        del factors  # perhaps as large as the base
                        log.write(step, {"eval_loss": loss})
                        log.say(f"step {step}: eval loss {loss:.4f}")
                        if loss < best:
                            best = loss
                            _save(output / "adapter-best", recipe, state, model)
                    checkpoints.save(state, batches, loss)
                    clock = time.monotonic()
                if stopped is not None and step < steps:
                    checkpoints.wait()
                    log.say(f"stopped at step {step}, saved; go on with --train.resume true")
                    return stopped
    _save(output / "adapter", recipe, state, model)
    say(f"adapter: {output / 'adapter'}")
    return None


def last_good(checkpoints: Checkpoints) -> str:
    """What there is to go back to, in words."""
    step = checkpoints.latest()
    if step is None:
        return "nothing had been saved yet"
    return f"the last good checkpoint, of step {step}, is kept"


def best_eval_loss(output: Path, step: int) -> float:
    """The lowest evaluation loss that a run recorded up to a step; infinity if none."""
    losses = [record.get("eval_loss", math.inf) for record in read_records(output, step)]
    return min(losses, default=math.inf)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _save(path: Path, recipe: Recipe, state: TrainState, model: Any) -> None:
    adapter = on_primary(state.adapter)  # each process may hold a part
    if is_primary():
        gl.save_adapter(path, recipe.adapter, adapter, model=model, overwrite=True)


def main() -> None:
    """Command line; exits with 128 + the signal's number if a signal ended the run."""
    with report_errors():
        recipe = parse(Recipe)
        number = finetune(recipe)
    if number is not None:
        sys.exit(128 + number)


if __name__ == "__main__":
    main()
