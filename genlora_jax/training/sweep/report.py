"""What a sweep prints and writes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from genlora_jax.training.sweep.loop import SweepResult
from genlora_jax.training.sweep.members import FIELDS

POINTS = 200  # of a training curve in results.jsonl


def print_progress(step: int, losses: np.ndarray) -> None:
    """Prints a line of progress."""
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
    """Writes `results.jsonl` and `metrics.jsonl`, with null for what is not finite."""
    evaluations = dict(zip(result.eval_steps.tolist(), result.eval_loss.tolist(), strict=True))
    curves = zip(result.loss.tolist(), result.grad_norm.tolist(), strict=True)
    metrics: list[dict[str, Any]] = [
        {"step": step, "loss": losses, "grad_norm": norms}
        | ({"eval_loss": evaluations[step]} if step in evaluations else {})
        for step, (losses, norms) in enumerate(curves, 1)
    ]
    for name, records in (("results", summaries(result)), ("metrics", metrics)):
        text = "".join(json.dumps(_strict(record), allow_nan=False) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _strict(value: Any) -> Any:
    """A value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def at_edge(result: SweepResult) -> str | None:
    """Where to widen the grid, if the best rate is the lowest or highest of several."""
    rates = sorted({member.learning_rate for member in result.members})
    best = result.members[result.ranking[0]].learning_rate
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    side = "lowest: widen it downwards" if best == rates[0] else "highest: widen it upwards"
    return f"the best learning rate, {best:g}, is the grid's {side}"


def print_results(result: SweepResult) -> None:
    """Prints a table of the members, best first."""
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
    if advice := at_edge(result):
        print(advice)
