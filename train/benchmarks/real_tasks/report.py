"""The results of runs as Markdown tables.

    python -m train.benchmarks.real_tasks.report final.json [ablation.json ...]

Losses and accuracies are means over the seeds, with the standard deviation over them. A best rate
at an end of those tried is marked with "at an end": its arm could do better.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def mean_and_deviation(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """The mean of some values, with their standard deviation if there are several."""
    scaled = scale * np.asarray(values, np.float64)
    if len(scaled) == 1:
        return f"{scaled[0]:.{digits}f}"
    return f"{scaled.mean():.{digits}f} ± {scaled.std(ddof=1):.{digits}f}"


def row(name: str, record: dict[str, Any], quizzes: Sequence[str]) -> str:
    """An arm's line."""
    scores = record.get("accuracy", [])
    accuracy = [
        mean_and_deviation([score[quiz] for score in scores], 100, 1) if scores else ""
        for quiz in quizzes
    ]
    if "best_loss" not in record:  # the base alone
        return f"| {name} | | | | {' | '.join(accuracy)} |"
    rate = f"{record['best_rate']:g}" + ("" if record["inside"] else ", at an end")
    loss = mean_and_deviation(record["best_losses"])
    return f"| {name} | {record['parameters']:,} | {rate} | {loss} | {' | '.join(accuracy)} |"


def table(records: dict[str, Any]) -> str:
    """A task's table, the lowest loss first; arms that failed are listed below it."""
    failed = [name for name, record in records.items() if "failed" in record]
    kept = {name: record for name, record in records.items() if name not in failed}
    found = (list(record["accuracy"][0]) for record in kept.values() if "accuracy" in record)
    quizzes = next(found, ["accuracy"])
    order = sorted(kept, key=lambda name: kept[name].get("best_loss", float("inf")))
    lines = [
        f"| arm | parameters | rate | validation loss | {' | '.join(quizzes)} |",
        "|---" * (4 + len(quizzes)) + "|",
        *(row(name, kept[name], quizzes) for name in order),
        *(f"\nfailed: {name}: {records[name]['failed']}" for name in failed),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    for file in parser.parse_args().files:
        for task, records in json.loads(file.read_text())["runs"].items():
            print(f"\n{file.stem}, {task}\n\n{table(records)}")


if __name__ == "__main__":
    main()
