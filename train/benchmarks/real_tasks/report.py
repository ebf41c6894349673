"""The results of runs as Markdown tables.

    python -m train.benchmarks.real_tasks.report final.json [ablation.json ...] \
        [--pairs "rbf, h=spread" "residual g=32" ...]

Losses and accuracies are means over the seeds, with the standard deviation over them. A best rate
at an end of those tried is marked with "at an end": its arm could do better. `--pairs` compares
arms two by two, in points of mean accuracy. The difference has two standard errors: over seeds,
and over test rows, each row's share of right seeds compared with its share in the other arm.
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
        mean_and_deviation(
            [score[quiz] for score in scores], *((1, 3) if quiz == "loss" else (100, 1))
        )
        if scores
        else ""
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


def row_shares(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """By data set, the share of seeds that were right on each test row."""
    quizzes = record["right"][0]
    return {
        quiz: np.mean(
            [
                np.unpackbits(np.frombuffer(bytes.fromhex(right[quiz]), np.uint8))
                for right in record["right"]
            ],
            axis=0,
        )
        for quiz in quizzes
    }


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float, float]:
    """Mean accuracy of one arm over another's, its standard errors over seeds and test rows."""
    one, other = ([score["mean"] for score in each["accuracy"]] for each in (ours, theirs))
    seeds = sum(np.var(each, ddof=1) / len(each) for each in (one, other))
    shares = row_shares(ours), row_shares(theirs)
    # The bits are filled up with zeros to whole bytes: fewer than eight rows of hundreds.
    rows = [np.var(shares[0][quiz] - x, ddof=1) / len(x) for quiz, x in shares[1].items()]
    gap = float(np.mean(one) - np.mean(other))
    return gap, float(np.sqrt(seeds)), float(np.sqrt(sum(rows)) / len(rows))


def has_rows(record: dict[str, Any]) -> bool:
    """Whether a record has accuracies by test row; tasks with a test loss have none."""
    scores = record.get("accuracy", [])
    return any(record.get("right", [])) and all("mean" in score for score in scores)


def comparisons(records: dict[str, Any], names: Sequence[str]) -> str:
    """A line for each pair of arms that the results have with accuracies by test row."""
    lines = ["| arm | beside | points | error, seeds | error, rows |", "|---" * 5 + "|"]
    for ours, theirs in zip(names[::2], names[1::2], strict=True):
        if all(has_rows(records.get(name, {})) for name in (ours, theirs)):
            found = difference(records[ours], records[theirs])
            gap, seeds, rows = (100 * x for x in found)
            lines.append(f"| {ours} | {theirs} | {gap:+.2f} | {seeds:.2f} | {rows:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--pairs", nargs="*", default=[], help="arms, two by two")
    options = parser.parse_args()
    for file in options.files:
        for task, records in json.loads(file.read_text())["runs"].items():
            print(f"\n{file.stem}, {task}\n\n{table(records)}")
            if options.pairs:
                print(f"\n{comparisons(records, options.pairs)}")


if __name__ == "__main__":
    main()
