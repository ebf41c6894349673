"""One run of the study: bases pretrained, then every arm at as many rates as its optimum takes.

    python -m train.benchmarks.frontier.run --data frontier-data --folder frontier-bases \
        --bases wide deep --tasks math --arms main --gpus 2 --per-gpu 3 --out run.json

Figures of several runs are not for comparison: a rebuilt base differs a little. Every run has LoRA
arms to compare with. Results are written after each arm; the same command again goes on where the
last one stopped. All losses are of validation rows; nothing here opens the test rows but `--test`,
which looks at them once, with the member of each arm that validation chose.
"""

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.flax import load_file, save_file

import genlora_jax as gl
from genlora_jax.config import config_to_json
from genlora_jax.training.losses import next_token_targets, summed_loss
from genlora_jax.training.members import Member
from genlora_jax.training.optim import OptimConfig
from genlora_jax.training.provenance import provenance
from genlora_jax.training.sweep import run_sweep
from train.benchmarks.frontier.arms import ARMS, FIRST, SETS, rate_at
from train.benchmarks.frontier.pretrain import BASES, REPEATS, make_model, pretrain

FIELDS = ("input_ids", "loss_mask", "segment_ids", "positions")
CHUNK, VOCABULARY, STEPS_PER_CALL = 16384, 8192, 8
RATES_AT_ONCE, MOST_RATES = 4, 16


def load_batches(file: Path, task: str) -> list[dict[str, np.ndarray]]:
    """A task's batches, one after another."""
    arrays = np.load(file)
    stacked = [arrays[f"{task}/{field}"] for field in FIELDS]
    return [dict(zip(FIELDS, parts, strict=True)) for parts in zip(*stacked, strict=True)]


def base_model(name: str) -> Any:
    return make_model(
        BASES[name], VOCABULARY, "cudnn" if jax.default_backend() == "gpu" else "auto"
    )


def best_of(losses: dict[float, list[float]]) -> float:
    """The rate with the lowest loss, the mean over its seeds; a lost seed loses the rate."""
    return min(losses, key=lambda rate: (np.mean(losses[rate]), rate))


def sweep_rates(options: argparse.Namespace, job: dict[str, str]) -> dict[str, Any]:
    """An arm at rates of the grid until the best is not the first or the last; its record."""
    arm, began = ARMS[job["arm"]], time.perf_counter()
    model, params = base_model(job["base"]), load_base(options.folder, job)
    tuned = load_batches(options.data / "tuned.npz", job["task"])
    held_out = load_batches(options.data / "validation.npz", job["task"])
    steps = (options.steps or len(tuned)) // STEPS_PER_CALL * STEPS_PER_CALL
    members: list[Member] = []
    losses: dict[float, list[float]] = {}
    kept: dict[float, list[gl.Adapter]] = {}
    train_loss, diverged = [], []

    def sweep(exponents: range) -> None:
        new = [
            Member(learning_rate=rate_at(exponent), generator_ratio=arm.ratio, seed=seed)
            for exponent in exponents
            for seed in range(options.seeds)
        ]
        result = run_sweep(
            model,
            params,
            arm.cfg,
            new,
            iter(tuned),
            held_out,
            optim=OptimConfig(b_ratio=arm.b_ratio),
            steps=steps,
            eval_every=max(steps // STEPS_PER_CALL // 3, 1) * STEPS_PER_CALL,
            chunk=CHUNK,
            steps_per_call=STEPS_PER_CALL,
        )
        for i, (member, loss) in enumerate(zip(new, result.best_loss, strict=True)):
            members.append(member)
            losses.setdefault(member.learning_rate, []).append(float(loss))
            kept.setdefault(member.learning_rate, []).append(result.adapter(i))
        train_loss.extend(result.loss[-STEPS_PER_CALL:].mean(axis=0).round(5).tolist())
        diverged.extend(result.diverged.tolist())

    low = FIRST[job["regime"]] + arm.shift
    high = low + RATES_AT_ONCE
    sweep(range(low, high))
    while high - low < MOST_RATES:
        best = best_of(losses)
        if best == rate_at(low):
            sweep(range(low - RATES_AT_ONCE, low))
            low -= RATES_AT_ONCE
        elif best == rate_at(high - 1):
            sweep(range(high, high + RATES_AT_ONCE))
            high += RATES_AT_ONCE
        else:
            break
    best = best_of(losses)
    record = {
        "config": config_to_json(arm.cfg),
        "b_ratio": arm.b_ratio,
        "parameters": gl.count_parameters(kept[best][0]),
        "members": [dataclasses.asdict(member) for member in members],
        "steps": steps,
        "train_loss": train_loss,
        "validation_loss": [
            round(x, 5) if math.isfinite(x) else None for own in losses.values() for x in own
        ],
        "diverged_at": diverged,
        "best_rate": best,
        "best_loss": round(float(np.mean(losses[best])), 5),
    }
    if options.test:
        rows = load_batches(options.data / "test.npz", job["task"])
        record["test_loss"] = [
            held_out_loss(model, params, arm.cfg, adapter, rows) for adapter in kept[best]
        ]
    return record | {"seconds": round(time.perf_counter() - began, 1)}


def held_out_loss(model: Any, params: Any, cfg: Any, adapter: Any, batches: Any) -> float:
    """Mean loss of the trained tokens of some batches."""

    @jax.jit
    def sums(params: Any, factors: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        total = summed_loss(model, params, factors, batch, chunk=CHUNK)
        return total, next_token_targets(batch)[1].sum()

    factors = gl.generate_factors(cfg, adapter)
    parts = [sums(params, factors, batch) for batch in batches]
    return round(float(sum(t for t, _ in parts)) / float(sum(n for _, n in parts)), 5)


def base_file(folder: Path, job: dict[str, str]) -> Path:
    return folder / f"{job['base']}-{job['regime']}.safetensors"


def load_base(folder: Path, job: dict[str, str]) -> Any:
    """Parameters of a base that this run pretrained."""
    return unflatten_dict(load_file(base_file(folder, job)), sep="/")


def pretrain_base(options: argparse.Namespace, job: dict[str, str]) -> dict[str, Any]:
    """Pretrains a base into the run's folder; what became of it."""
    streams = np.load(options.data / "pretraining.npz")
    rows = [streams["novels"]]
    if job["regime"] == "known":
        rows += [v for name, v in streams.items() if name != "novels"] * REPEATS
    params, told = pretrain(
        base_model(job["base"]),
        np.concatenate(rows),
        rate=BASES[job["base"]].rate,
        seed=0,
        steps=options.pretraining_steps,
    )
    save_file(flatten_dict(params, sep="/"), base_file(options.folder, job))
    return told


def perform(work: tuple[argparse.Namespace, dict[str, str]]) -> tuple[dict[str, str], Any]:
    """A job in a worker; one that fails must not cost the others."""
    options, job = work
    try:
        return job, (sweep_rates if "arm" in job else pretrain_base)(options, job)
    except Exception as error:
        return job, {"failed": f"{type(error).__name__}: {error}"[:500]}


def claim(places: Any, options: argparse.Namespace) -> None:
    """Gives a worker its GPU, or a share of it, before JAX looks for one."""
    if options.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(places.get())
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.93 / options.per_gpu:.2f}"
    jax.config.update("jax_compilation_cache_dir", str(options.folder / "compiled"))


def jobs_of(options: argparse.Namespace) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """What to pretrain, and what to tune after that."""
    bases = [
        {"base": base, "regime": regime}
        for base, regime in itertools.product(options.bases, options.regimes)
    ]
    arms = [name for chosen in options.arms for name in SETS.get(chosen, {chosen: None})]
    tuning = [
        job | {"task": task, "arm": arm} for job in bases for task in options.tasks for arm in arms
    ]
    return bases, tuning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of `prepare`")
    parser.add_argument("--folder", type=Path, required=True, help="for bases of this run")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["wide", "deep"])
    parser.add_argument("--regimes", nargs="+", choices=FIRST, default=list(FIRST))
    parser.add_argument("--tasks", nargs="+", default=["math"])
    parser.add_argument("--arms", nargs="+", default=["main"], help=f"of {[*SETS, *ARMS]}")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="tune for so many steps instead of all there are")
    parser.add_argument("--pretraining-steps", type=int)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--per-gpu", type=int, default=1, help="workers on each")
    parser.add_argument("--seconds", type=float, default=86400, help="stop after so many")
    parser.add_argument("--test", action="store_true", help="look at the test rows, once chosen")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if unknown := [name for name in options.arms if name not in SETS | ARMS]:
        parser.error(f"no such arms: {unknown}")
    options.folder.mkdir(parents=True, exist_ok=True)

    found: dict[str, Any] = {"pretraining": {}, "runs": {}}
    if options.out.exists():
        found = json.loads(options.out.read_text())
    settings = {name: v for name, v in vars(options).items() if not isinstance(v, Path)}
    found |= {"data": json.loads((options.data / "about.json").read_text())} | provenance()
    found.setdefault("settings", []).append(settings)

    def place(job: dict[str, str]) -> tuple[dict[str, Any], str]:
        """Where a job's result goes."""
        base = f"{job['base']} {job['regime']}"
        if "arm" not in job:
            return found["pretraining"], base
        return found["runs"].setdefault(f"{base} {job['task']}", {}), job["arm"]

    def is_done(job: dict[str, str]) -> bool:
        where, name = place(job)
        return name in where and "failed" not in where[name]

    end = time.monotonic() + options.seconds
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    places = context.Queue()
    for index in range(options.gpus * options.per_gpu):
        places.put(index % options.gpus)
    with context.Pool(
        max(options.gpus * options.per_gpu, 1), initializer=claim, initargs=(places, options)
    ) as pool:
        for stage in jobs_of(options):
            missing = [job for job in stage if not is_done(job)]
            done = pool.imap_unordered(perform, [(options, job) for job in missing])
            for _ in missing:
                try:
                    job, record = done.next(timeout=max(end - time.monotonic(), 1))
                except multiprocessing.TimeoutError:
                    print("out of time", flush=True)
                    return
                where, name = place(job)
                where[name] = record
                options.out.write_text(json.dumps(found, indent=1) + "\n")
                shown = ("parameters", "best_loss", "best_rate", "loss", "seconds", "failed")
                told = [f"{key} {record[key]}" for key in shown if key in record]
                print(*job.values(), *told, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
