"""One run of the study: bases pretrained, then every arm at as many rates as its optimum takes.

    python -m train.benchmarks.frontier.run --data frontier-data --folder frontier-bases \
        --bases wide deep --tasks math --arms main --gpus 2 --per-gpu 3 --out run.json

Figures of different runs cannot be compared: a rebuilt base differs a little. Every run has LoRA
arms to compare with. Results are written after each arm; the same command again continues where
the last one stopped. All losses are of validation rows. Only `--test` opens the test rows, once,
for the member of each arm that has the best validation loss.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import jax

from genlora_jax.training.provenance import provenance
from train.benchmarks.frontier.arms import ARMS, FIRST, SETS
from train.benchmarks.frontier.pretrain import BASES, base_file, pretrain_base
from train.benchmarks.frontier.tune import STEPS_PER_CALL, sweep_rates


def perform(work: tuple[argparse.Namespace, dict[str, str]]) -> tuple[dict[str, str], Any]:
    """Does a job in a worker; one that fails must not end the others."""
    options, job = work
    try:
        return job, (sweep_rates if "arm" in job else pretrain_base)(options, job)
    except Exception as error:
        return job, {"failed": f"{type(error).__name__}: {error}"[:500]}


def claim_gpu(gpus: Any, options: argparse.Namespace) -> None:
    """Assigns a worker its GPU, or a share of it, before JAX starts."""
    if options.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpus.get())
        share = f"{0.93 / options.per_gpu:.2f}"
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
    jax.config.update("jax_compilation_cache_dir", str(options.folder / "compiled"))


def jobs_of(options: argparse.Namespace) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The jobs of pretraining, and those of tuning that follow."""
    bases = [
        {"base": base, "regime": regime}
        for base, regime in itertools.product(options.bases, options.regimes)
    ]
    arms = dict.fromkeys(arm for name in options.arms for arm in SETS.get(name, {name: None}))
    lengths = [{"steps": str(steps)} for steps in options.steps] or [{}]
    tuning = [
        job | {"task": task, "arm": arm} | length
        for job, task, length, arm in itertools.product(bases, options.tasks, lengths, arms)
    ]
    return bases, tuning


def run_of(job: dict[str, str]) -> str:
    """The name under which the results of a base, task and length are stored."""
    name = f"{base_of(job)} {job['task']}"
    return f"{name}, {job['steps']} steps" if "steps" in job else name


def base_of(job: dict[str, str]) -> str:
    """The name under which the pretraining of a job's base is stored."""
    return f"{job['base']} {job['regime']}"


def has_base(found: dict[str, Any], job: dict[str, str]) -> bool:
    """Whether a job's base has been pretrained."""
    return "failed" not in found["pretraining"].get(base_of(job), {"failed": "not begun"})


def is_due(found: dict[str, Any], job: dict[str, str], test: bool) -> bool:
    """Whether a job is still to do; arms of a base that failed are left out."""
    if "arm" not in job:
        return not has_base(found, job)
    record = found["runs"].get(run_of(job), {}).get(job["arm"], {"failed": "not begun"})
    done = "failed" not in record and ("test_loss" in record or not test)
    return has_base(found, job) and not done


def check_continues(
    parser: argparse.ArgumentParser, options: argparse.Namespace, found: dict[str, Any]
) -> None:
    """Refuses to add to results of other bases or other settings."""
    for name, record in found["pretraining"].items():
        base, regime = name.split()
        file = base_file(options.folder, {"base": base, "regime": regime})
        if "failed" not in record and not file.exists():
            parser.error(f"{options.out} has results of a base {name} that is not in --folder")
    for field in ("seeds", "rates", "steps", "pretraining_steps"):
        before = found["settings"][-1].get(field)
        if getattr(options, field) != before:
            parser.error(f"{options.out} was begun with {field} {before}: give another --out")


def add_record(options: argparse.Namespace, found: dict[str, Any], job: Any, record: Any) -> None:
    """Stores a job's record in the results, on disk as well, and prints its figures."""
    if "arm" in job:
        found["runs"].setdefault(run_of(job), {})[job["arm"]] = record
    else:
        found["pretraining"][base_of(job)] = record
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    shown = ("parameters", "best_loss", "best_rate", "loss", "seconds", "failed")
    figures = [f"{key} {record[key]}" for key in shown if key in record]
    print(*job.values(), *figures, sep=" | ", flush=True)


def do_jobs(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Pretrains, then tunes, in a process a worker, until all is done or the time is over."""
    end = time.monotonic() + options.seconds
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    workers = options.gpus * options.per_gpu
    gpus = context.Queue()
    for index in range(workers):
        gpus.put(index % options.gpus)
    with context.Pool(max(workers, 1), initializer=claim_gpu, initargs=(gpus, options)) as pool:
        for stage in jobs_of(options):
            due = [job for job in stage if is_due(found, job, options.test)]
            done = pool.imap_unordered(perform, [(options, job) for job in due])
            for _ in due:
                try:
                    job, record = done.next(timeout=max(end - time.monotonic(), 1))
                except multiprocessing.TimeoutError:
                    print("out of time", flush=True)
                    return
                add_record(options, found, job, record)


def main() -> None:
    """Checks the options, and runs or continues a study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of `prepare`")
    parser.add_argument("--folder", type=Path, required=True, help="for bases of this run")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["wide", "deep"])
    parser.add_argument("--regimes", nargs="+", choices=FIRST, default=list(FIRST))
    parser.add_argument("--tasks", nargs="+", default=["math"])
    parser.add_argument("--arms", nargs="+", default=["main"], help=f"of {[*SETS, *ARMS]}")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rates", type=int, default=4, help="fewest rates of each arm")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[], help="of tuning; as many as batches by default"
    )
    parser.add_argument("--pretraining-steps", type=int)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--per-gpu", type=int, default=1, help="workers on each")
    parser.add_argument("--seconds", type=float, default=86400, help="stop after this time")
    parser.add_argument("--test", action="store_true", help="measure the chosen on the test rows")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    about = json.loads((options.data / "about.json").read_text())
    for field, known in (("arms", SETS | ARMS), ("tasks", about["rows"])):
        if unknown := [name for name in getattr(options, field) if name not in known]:
            parser.error(f"no such {field}: {unknown}. There are: {[*known]}")
    if min(options.steps, default=STEPS_PER_CALL) < STEPS_PER_CALL:
        parser.error(f"--steps must be at least {STEPS_PER_CALL}")
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"data": about, "settings": [], "pretraining": {}, "runs": {}}
    if options.out.exists():
        found = json.loads(options.out.read_text())
        check_continues(parser, options, found)
    settings = {name: v for name, v in vars(options).items() if not isinstance(v, Path)}
    found["settings"].append(settings | provenance())
    do_jobs(options, found)


if __name__ == "__main__":
    main()
