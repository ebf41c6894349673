"""Every arm on every task: rates swept, then the losses and the accuracy of the best one.

    python -m train.benchmarks.real_tasks.run --base DIR --data ../shared/data --tasks completions \
        --arms ablation --steps 120 --seconds 540 --out ablation.json
    python -m train.benchmarks.real_tasks.run --base DIR --data ../shared/data --arms final \
        --tasks completions math --rates 3 --seeds 3 --start-from ablation.json --test \
        --seconds 540 --out final.json

The mean validation loss over the seeds chooses the rate; rates are added until the best one is not
at an end, one at a time if there are several seeds. Only `--test` opens the test rows, once, for
the members of the best rate. Results are written after each arm; the same command goes on where the
last one ended. `--only` takes the arms whose names match, `--limit-rows` two rows of each batch, to
try it on a CPU.
"""

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import genlora_jax as gl
from genlora_jax.hf.base_model import Base, ModelConfig, find_base, load_base
from genlora_jax.mesh import one_device
from genlora_jax.methods import config_to_json
from genlora_jax.training.optim import OptimConfig
from genlora_jax.training.provenance import provenance
from genlora_jax.training.step_options import StepOptions
from genlora_jax.training.sweep.loop import run_sweep
from genlora_jax.training.sweep.members import Member
from genlora_jax.training.sweep.program import SweepProgram
from train.benchmarks.frontier.arms import PER_DECADE, Arm
from train.benchmarks.frontier.run import claim_gpu
from train.benchmarks.frontier.tune import STEPS_PER_CALL, Trials, search, spectrum
from train.benchmarks.measuring import write_result
from train.benchmarks.real_tasks.arms import ARMS, SETS
from train.benchmarks.real_tasks.tasks import CHUNK, PROGRAMS, TASKS, Batches, batches, tested

MOST_AT_ONCE = 5  # members whose activations are in memory
LOWEST = -12  # exponent of the lowest rate to begin with: 1e-3
WARM_LORA, WARM_RATE = 16, 1.78e-3  # the LoRA that a warm start compresses
FIT_STEPS = 300
PLACES = ("base", "data", "start_from", "folder", "out")  # of one machine: not in a result


@functools.cache
def base_of(path: str) -> Base:
    """The base, its parameters in float32; what makes it compile fast and leaves room."""
    cfg = ModelConfig(path=path, param_dtype="float32", scan=True, remat="dots")
    return load_base(cfg, find_base(cfg), one_device())


def sweep_program(arm: Arm, base: Base, steps: int, members: int) -> SweepProgram:
    """The program of so many members of an arm."""
    return SweepProgram(
        model=base.model,
        cfg=arm.cfg,
        optim=OptimConfig(b_ratio=arm.b_ratio, basis_ratio=arm.basis_ratio),
        steps=steps,
        options=StepOptions(chunk=CHUNK),
        members_per_pass=max(n for n in range(1, MOST_AT_ONCE + 1) if members % n == 0),
    )


def warm_adapters(
    cfg: Any, base: Base, tuned: Batches, held_out: Batches, seeds: int
) -> tuple[list[gl.Adapter], list[float]]:
    """A GenLoRA adapter a seed, fitted to a LoRA trained on these batches, and its errors."""
    lora = gl.LoRAConfig(rank=WARM_LORA, alpha=2.0 * WARM_LORA)
    members = [
        Member(learning_rate=WARM_RATE, generator_ratio=1.0, seed=seed) for seed in range(seeds)
    ]
    program = sweep_program(Arm(cfg=lora), base, len(tuned), seeds)
    trained = run_sweep(
        program, base.params, members, iter(tuned), held_out, steps_per_call=STEPS_PER_CALL
    )
    found, errors = [], []
    for seed in range(seeds):
        factors = gl.generate_factors(lora, trained.adapter(seed))
        key = jax.random.key(seed)
        adapter, report = gl.compress(cfg, factors, params=base.params, key=key, steps=FIT_STEPS)
        errors.append(round(report.error, 4))
        found.append(with_small_latents(adapter))
    return found, errors


def with_small_latents(adapter: gl.Adapter) -> gl.Adapter:
    """The same adapter with latents as small as they begin elsewhere.

    The normalisation takes it back; Adam moves small latents faster.
    """
    std = adapter.config.latent_std
    latents = jax.tree.map(
        lambda z: z * std / jnp.sqrt(jnp.square(z).mean(-1, keepdims=True)),
        adapter.trainable["latents"],
    )
    return adapter.replace(trainable=adapter.trainable | {"latents": latents})


def run_arm(options: argparse.Namespace, job: dict[str, str]) -> dict[str, Any]:
    """An arm on a task; its record."""
    arm, began = ARMS[job["arm"]], time.perf_counter()
    base = base_of(str(options.base))
    tuned, held_out = batches(options.data, job["task"], base.tokenizer, options.steps)
    if options.limit_rows:
        tuned, held_out = (
            [{name: leaf[:2] for name, leaf in batch.items()} for batch in part]
            for part in (tuned, held_out[:1])
        )
    warm = round(arm.warm_start * len(tuned) / STEPS_PER_CALL) * STEPS_PER_CALL
    adapters, errors = [], []
    if warm:
        adapters, errors = warm_adapters(arm.cfg, base, tuned[:warm], held_out, options.seeds)
    at_once = rates_at_once(options)
    trials = Trials(
        program=sweep_program(arm, base, len(tuned) - warm, at_once * options.seeds),
        params=base.params,
        batches=tuned[warm:],
        held_out=held_out,
        ratio=arm.ratio,
        make_adapter=(lambda cfg, seed: adapters[seed]) if warm else None,
    )
    first = first_exponent(options, job["task"], job["arm"], arm)
    search(
        trials,
        first,
        options.rates,
        at_once=at_once,
        seeds=options.seeds,
        stop=lambda: time.time() > options.end - options.reserve,
    )
    ranked = trials.ranked(options.seeds)
    best = ranked[0]
    chosen = [trials.adapters[i] for i in trials.of_rate(best)]
    record: dict[str, Any] = {
        "config": config_to_json(arm.cfg),
        "ratio": arm.ratio,
        "basis_ratio": arm.basis_ratio,
        "warm_start_steps": warm,
        "warm_start_errors": errors,
        "parameters": gl.count_parameters(chosen[0]),
        "steps": len(tuned),
        "rates": [member.learning_rate for member in trials.members],
        "seeds": [member.seed for member in trials.members],
        "validation_loss": [round(x, 5) if math.isfinite(x) else None for x in trials.losses],
        "train_loss": trials.train_losses,
        "diverged_at": trials.diverged,
        "best_rate": best,
        "inside": min(ranked) < best < max(ranked),
        "best_loss": round(trials.mean_loss(best), 5),
        "best_losses": [round(trials.losses[i], 5) for i in trials.of_rate(best)],
        "singular_values": spectrum_on_cpu(chosen[0]),
        "tuning_seconds": round(time.perf_counter() - began, 1),
    }
    if options.test:
        record |= test_record(options, base, job["task"], chosen)
    return record | {"seconds": round(time.perf_counter() - began, 1)}


def spectrum_on_cpu(adapter: gl.Adapter) -> list[float] | None:
    """Its singular values; a GPU's solver has no memory beside what JAX has taken."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return spectrum(jax.device_put(adapter, cpu))


def test_record(
    options: argparse.Namespace, base: Base, task: str, adapters: Sequence[gl.Adapter | None]
) -> dict[str, Any]:
    """What the test rows tell of some adapters, of the base alone for None."""
    programs = dataclasses.replace(PROGRAMS, allow_open_sandbox=options.allow_open_sandbox)
    found = [
        tested(base, each, options.data, task, options.test_rows, programs) for each in adapters
    ]
    return {"accuracy": [figures for figures, _ in found], "right": [right for _, right in found]}


def rates_at_once(options: argparse.Namespace) -> int:
    """Rates of a sweep: with several seeds one, so that none is tried in vain."""
    return options.rates if options.seeds == 1 else 1


def first_exponent(options: argparse.Namespace, task: str, name: str, arm: Arm) -> int:
    """Exponent of the lowest rate to try first: around the best one of an earlier run."""
    middle = LOWEST + arm.shift + options.rates // 2
    found = [
        (each, records[name]["best_rate"])
        for file in reversed(options.start_from or [])
        for each, records in json.loads(file.read_text())["runs"].items()
        if records.get(name, {}).get("best_rate")
    ]
    # A rate of this task in any file goes before other tasks', then the last file's.
    if found:
        _, rate = min(found, key=lambda one: one[0] != task)
        middle = round(PER_DECADE * math.log10(rate))
    return middle - rates_at_once(options) // 2


def perform(work: tuple[argparse.Namespace, dict[str, str]]) -> tuple[dict[str, str], Any]:
    """Does a job in a worker; one that fails must not end the others."""
    options, job = work
    try:
        if job["arm"] == "base":
            base = base_of(str(options.base))
            return job, test_record(options, base, job["task"], [None])
        return job, run_arm(options, job)
    except Exception as error:
        return job, {"failed": f"{type(error).__name__}: {error}"[:500]}


def jobs_of(options: argparse.Namespace, found: dict[str, Any]) -> list[dict[str, str]]:
    """What is still to do, in the order of the arms."""
    names = dict.fromkeys(arm for name in options.arms for arm in SETS.get(name, (name,)))
    names = [name for name in names if re.search(options.only, name)]
    jobs = []
    for task in options.tasks:
        done = {k for k, record in found.get(task, {}).items() if "failed" not in record}
        due = [*(["base"] if options.test else []), *names]
        jobs += [{"task": task, "arm": name} for name in due if name not in done]
    return jobs


def do_jobs(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Runs arms, some at a time, until all are done or the time is over."""
    where = provenance()
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(options.gpus)))
    gpus, workers = context.Queue(), max(options.gpus, 1) * options.per_gpu
    for index in range(workers):
        gpus.put(visible.split(",")[index % max(options.gpus, 1)])
    jobs = jobs_of(options, result["runs"])
    with context.Pool(workers, initializer=claim_gpu, initargs=(gpus, options)) as pool:
        done = pool.imap_unordered(perform, [(options, job) for job in jobs])
        for _ in jobs:
            try:
                job, record = done.next(timeout=max(options.end - time.time(), 1))
            except multiprocessing.TimeoutError:
                print("out of time", flush=True)
                return
            result["runs"].setdefault(job["task"], {})[job["arm"]] = record
            write_result(options.out, result, where)
            shown = ("parameters", "best_loss", "best_rate", "inside", "accuracy", "failed")
            figures = [f"{key} {record[key]}" for key in (*shown, "seconds") if key in record]
            print(*job.values(), *figures, sep=" | ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="directory of the base")
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k and the others")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["completions"])
    parser.add_argument("--arms", nargs="+", default=["ablation"], help=f"{[*SETS, *ARMS]}")
    parser.add_argument("--only", default="", help="expression that the arms' names must match")
    parser.add_argument("--rates", type=int, default=5, help="rates tried at once")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--start-from", type=Path, nargs="+", help="results with rates to begin by")
    parser.add_argument("--test", action="store_true", help="the accuracy of the best")
    parser.add_argument("--test-rows", type=int, default=1000, help="most rows of a data set")
    parser.add_argument("--allow-open-sandbox", action="store_true", help="of the task code")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--per-gpu", type=int, default=1, help="workers on each")
    parser.add_argument("--seconds", type=float, default=86400, help="stop after this time")
    parser.add_argument(
        "--reserve", type=float, default=0, help="seconds of them without new rates"
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="for compiled programs")
    parser.add_argument("--limit-rows", action="store_true", help="two rows of each batch")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.steps = options.steps // STEPS_PER_CALL * STEPS_PER_CALL
    options.end = time.time() + options.seconds
    result: dict[str, Any] = {"settings": [], "runs": {}}
    if options.out.exists():
        result = json.loads(options.out.read_text())
    kept = {name: value for name, value in vars(options).items() if name not in PLACES}
    result["settings"].append(kept)
    do_jobs(options, result)


if __name__ == "__main__":
    main()
