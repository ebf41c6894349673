"""One run of the study: bases pretrained, then every arm at every rate of its grid.

    python -m train.benchmarks.frontier.run --data frontier-data --base wide --out run.json

Figures of several runs are not for comparison: a rebuilt base differs a little. Every run has LoRA
arms to compare with. Results are written after each arm. All losses are of validation rows; nothing
here opens the test rows.
"""

import argparse
import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import genlora_jax as gl
from genlora_jax.config import config_to_json
from genlora_jax.training.members import Member
from genlora_jax.training.optim import OptimConfig
from genlora_jax.training.provenance import provenance
from genlora_jax.training.sweep import run_sweep
from train.benchmarks.frontier.arms import ARMS, FIRST, RATES
from train.benchmarks.frontier.pretrain import BASES, REPEATS, make_model, pretrain

FIELDS = ("input_ids", "loss_mask", "segment_ids", "positions")
CHUNK = 16384


def load_batches(file: Path, task: str) -> list[dict[str, np.ndarray]]:
    """A task's batches, one after another."""
    arrays = np.load(file)
    stacked = [arrays[f"{task}/{field}"] for field in FIELDS]
    return [dict(zip(FIELDS, parts, strict=True)) for parts in zip(*stacked, strict=True)]


def rates_of(cfg: gl.AdapterConfig, count: int) -> list[float]:
    """So many rates, four a decade, from the first of the method's."""
    first = FIRST.get(config_to_json(cfg)["method"], FIRST["lora"])
    start = int(np.argmin(np.abs(np.log(np.array(RATES) / first))))
    return [float(f"{rate:.3g}") for rate in RATES[start : start + count]]


def run_arm(name: str, model: Any, params: Any, tuned: Any, held_out: Any, options: Any) -> Any:
    """All members of an arm; the record that goes to the results."""
    cfg, began = ARMS[name], time.perf_counter()
    members = [
        Member(learning_rate=rate, generator_ratio=options.ratio, seed=seed)
        for rate in rates_of(cfg, options.rates)
        for seed in range(options.seeds)
    ]
    steps = len(tuned) if options.steps is None else options.steps
    result = run_sweep(
        model,
        params,
        cfg,
        members,
        iter(tuned),
        held_out,
        optim=OptimConfig(),
        steps=steps // 8 * 8,
        eval_every=max(steps // 8 // 3, 1) * 8,
        chunk=CHUNK,
        steps_per_call=8,
    )
    return {
        "config": config_to_json(cfg),
        "parameters": gl.count_parameters(result.adapter(0)),
        "members": [dataclasses.asdict(member) for member in members],
        "steps": steps // 8 * 8,
        "train_loss": result.loss[-8:].mean(axis=0).round(5).tolist(),
        "validation_loss": result.best_loss.round(5).tolist(),
        "final_validation_loss": result.eval_loss[-1].round(5).tolist(),
        "diverged_at": result.diverged.tolist(),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of `prepare`")
    parser.add_argument("--base", choices=BASES, default="wide")
    parser.add_argument("--task", default="math")
    parser.add_argument("--regimes", nargs="+", default=["hard", "known"])
    parser.add_argument("--arms", default=".*", help="regular expression for the arms' names")
    parser.add_argument("--rates", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=0.3, help="generators' rate over latents'")
    parser.add_argument("--steps", type=int, help="tune for so many steps instead of all there are")
    parser.add_argument("--pretraining-steps", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    settings = {name: v for name, v in vars(options).items() if not isinstance(v, Path)}
    about = json.loads((options.data / "about.json").read_text())
    found: dict[str, Any] = {"settings": settings, "data": about, "regimes": {}} | provenance()
    streams = np.load(options.data / "pretraining.npz")
    tuned = load_batches(options.data / "tuned.npz", options.task)
    held_out = load_batches(options.data / "validation.npz", options.task)
    names = [name for name in ARMS if re.fullmatch(options.arms, name)]
    base = BASES[options.base]
    model = make_model(base, 8192, "cudnn" if jax.default_backend() == "gpu" else "auto")

    def save() -> None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")

    for regime in options.regimes:
        rows = [streams["novels"]]
        if regime == "known":
            rows += [streams[f"known-{options.task}"]] * REPEATS
        params, told = pretrain(
            model, np.concatenate(rows), rate=base.rate, seed=0, steps=options.pretraining_steps
        )
        print(regime, told, flush=True)
        arms: dict[str, Any] = {}
        found["regimes"][regime] = {"pretraining": told, "arms": arms}

        for name in names:
            try:
                record = run_arm(name, model, params, tuned, held_out, options)
            except Exception as error:  # one arm must not cost the others
                record = {"failed": f"{type(error).__name__}: {error}"[:500]}
            arms[name] = record
            save()
            best = min(record.get("validation_loss", [float("nan")]))
            print(f"{regime} | {name} | {best:.4f} | {record.get('seconds')} s", flush=True)
    save()


if __name__ == "__main__":
    main()
