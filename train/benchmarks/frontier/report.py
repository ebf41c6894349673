"""Tables and pictures of the study's runs, from results/frontier/*.json.

The tables go to results/frontier/tables.md, and the pictures that docs/results.md shows to docs.

    python -m train.benchmarks.frontier.report [--pictures FOLDER]  # all pictures, to the folder
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent.parent / "results" / "frontier"
TABLES = RESULTS / "tables.md"
DOCS = Path(__file__).parents[3] / "docs"
SHOWN = ("wide_final.png", "wide_final_hard2.png")  # by docs/results.md
HEAD = """# The study's tables

Written by `python -m train.benchmarks.frontier.report`; [the findings](findings.md) say what they
mean and what the arms' names stand for.
"""
FAMILIES = {  # by how an arm's name begins
    "lora r=": "LoRA",
    "target ": "one set of generators a target",
    "model ": "one set of generators",
    "b ": "one set of generators, random A",
    "rbf ": "with RBFs",
    "h lora ": "LoRA, Hadamard product",
    "h model ": "one set of generators, Hadamard product",
}
SPECTRA = ("lora r=8", "lora r=32", "target r=32 g=16", "model r=64 g=16", "model r=128 g=32")
Arms = dict[str, dict[str, Any]]


def finished(arms: Arms) -> Arms:
    """Arms by parameters; those that failed are left out."""
    done = [(name, arm) for name, arm in arms.items() if "failed" not in arm]
    return dict(sorted(done, key=lambda item: item[1]["parameters"]))


def best_of_size(points: Iterable[tuple[int, float]]) -> dict[int, float]:
    """The lowest loss of each number of parameters, the smallest number first."""
    best: dict[int, float] = {}
    for parameters, loss in sorted(points):
        best.setdefault(parameters, loss)
    return best


def lora_equivalent(arm: dict[str, Any], arms: Arms) -> float | None:
    """Parameters that LoRA needs for the same loss over an arm's, by interpolation of logarithms.

    Between LoRA's best arms of each size; None outside of what they span.
    """
    plain = [lora for name, lora in arms.items() if name.startswith("lora r=")]
    best = best_of_size((lora["parameters"], lora["best_loss"]) for lora in plain)
    curve = sorted((loss, math.log(parameters)) for parameters, loss in best.items())
    for (low, more), (high, fewer) in itertools.pairwise(curve):
        if low <= arm["best_loss"] <= high:
            share = (high - arm["best_loss"]) / (high - low) if high > low else 0.0
            return math.exp(fewer + share * (more - fewer)) / float(arm["parameters"])
    return None


def losses_by_seed(arm: dict[str, Any]) -> list[float]:
    """Validation losses of an arm's best rate, one for each seed."""
    pairs = zip(arm["members"], arm["validation_loss"], strict=True)
    return [loss for member, loss in pairs if member["learning_rate"] == arm["best_rate"]]


def over_seeds(values: list[float]) -> str:
    """Their mean, and their standard deviation if there are several."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def table(arms: Arms) -> str:
    """A run's arms by parameters, in Markdown."""
    done = finished(arms)
    tested = any("test_loss" in arm for arm in done.values())
    head = ["arm", "rank", "parameters", "best rate", "validation loss", "LoRA needs"]
    head += ["test loss", "exact match"] if tested else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, arm in done.items():
        rates = sorted({member["learning_rate"] for member in arm["members"]})
        edge = " (edge)" if arm["best_rate"] in (rates[0], rates[-1]) else ""
        ratio = None if name.startswith("lora r=") else lora_equivalent(arm, done)
        cells = [
            name,
            str(arm["config"].get("rank", "")),
            f"{arm['parameters']:,}",
            f"{arm['best_rate']:.2g}{edge}",
            over_seeds(losses_by_seed(arm)),
            "" if ratio is None else f"{ratio:.2f} x",
        ]
        if tested:
            cells.append(over_seeds(arm.get("test_loss", [])))
            cells.append(over_seeds(arm.get("test_exact_match", [])))
        lines.append("| " + " | ".join(cells) + " |")
    if lost := sorted(set(arms) - set(done)):
        lines.append(f"\nNot finished: {', '.join(lost)}.")
    return "\n".join(lines)


def table_by_rank(arms: Arms) -> str:
    """A run's arms by rank, in Markdown; empty if no rank has several."""
    ranks: dict[int, list[str]] = {}
    for name, arm in finished(arms).items():
        if rank := arm["config"].get("rank"):
            cells = [f"{arm['parameters']:,}", over_seeds(losses_by_seed(arm))]
            cells.append(over_seeds(arm.get("test_loss", [])))
            ranks.setdefault(rank, []).append(f"| {rank} | {name} | {' | '.join(cells)} |")
    lines = [line for rank in sorted(ranks) if len(ranks[rank]) > 1 for line in ranks[rank]]
    head = ["| rank | arm | parameters | validation loss | test loss |", "|" + "---|" * 5]
    return "\n".join(head + lines) if lines else ""


def draw(runs: dict[str, Arms], plot: Callable[[Any, Arms], None], file: Path) -> None:
    """A panel a run, in each what `plot` makes of its finished arms."""
    figure, axes = plt.subplots(1, len(runs), figsize=(6 * len(runs), 4.5), squeeze=False)
    for axis, (name, arms) in zip(axes[0], runs.items(), strict=True):
        plot(axis, finished(arms))
        axis.set_title(name)
        axis.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def plot_frontier(axis: Any, arms: Arms) -> None:
    """Loss against parameters (the paper's Figure 1, lower)."""
    points: dict[str, list[tuple[int, float]]] = {}
    for name, arm in arms.items():
        others = "other methods and settings"
        family = next((f for head, f in FAMILIES.items() if name.startswith(head)), others)
        points.setdefault(family, []).append((arm["parameters"], arm["best_loss"]))
    for family, values in points.items():
        drawn = axis.plot(*zip(*values, strict=True), linestyle="none", marker="o", label=family)
        if family.startswith("LoRA"):  # a line through the best of each size
            best = best_of_size(values)
            axis.plot(*zip(*best.items(), strict=True), color=drawn[0].get_color())
    axis.set(xscale="log", xlabel="trained parameters", ylabel="validation loss")


def plot_scaling(axis: Any, arms: Arms) -> None:
    """Loss against rank, a line a group size and scope of sharing (the paper's Figure 3)."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, arm in arms.items():
        head, comma, extra = name.partition(", ")
        if extra and not extra.startswith("dropout"):
            continue
        cfg, words = arm["config"], head.split()
        if cfg["method"] == "lora" and words[0] == "lora":
            label = "lora"
        elif words[0] in ("target", "model") and len(words) == 3:
            label = f"one set a {words[0]}, g={cfg['group_size']}"
        else:
            continue
        lines.setdefault(label + comma + extra, []).append((cfg["rank"], arm["best_loss"]))
    for label, values in sorted(lines.items()):
        axis.plot(*zip(*sorted(values), strict=True), marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="rank", ylabel="validation loss")


def plot_spectra(axis: Any, arms: Arms) -> None:
    """Singular values of the deltas over their largest (the paper's Figure 4)."""
    for name in SPECTRA:
        values = arms.get(name, {}).get("singular_values") or []
        above = [value for value in values if value > 0]
        if above:
            axis.plot(range(1, len(above) + 1), above, label=name)
    axis.set(yscale="log", xlabel="index", ylabel="singular value / largest")


def pictures(file: Path, runs: dict[str, Arms]) -> dict[str, Callable[[Any, Arms], None]]:
    """What is drawn of a file of results, by the picture's name."""
    drawn = {f"{file.stem}.png": plot_frontier, f"{file.stem}_scaling.png": plot_scaling}
    if any("singular_values" in arms.get(name, {}) for arms in runs.values() for name in SPECTRA):
        drawn[f"{file.stem}_spectra.png"] = plot_spectra
    return drawn


def page(files: list[Path]) -> str:
    """All tables, in Markdown."""
    parts = [HEAD]
    for file in files:
        found = json.loads(file.read_text())
        for name, arms in found["runs"].items():
            base = found["pretraining"][" ".join(name.split()[:2])]
            parts.append(
                f"## {file.stem}: {name}\n\nThe base's own loss at the end of its pretraining: "
                f"{base['loss']:.3f}. Commit {found['settings'][0]['commit']}, "
                f"{found['settings'][0]['machine']}.\n\n{table(arms)}\n"
            )
            tested = any("test_loss" in arm for arm in arms.values())
            if tested and (by_rank := table_by_rank(arms)):
                parts.append(f"By rank:\n\n{by_rank}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="folder for all pictures")
    folder = parser.parse_args().pictures
    files = sorted(RESULTS.glob("*.json"))
    for file in files:
        runs = json.loads(file.read_text())["runs"]
        for name, plot in pictures(file, runs).items():
            if name in SHOWN:
                draw(runs, plot, DOCS / name)
            if folder is not None:
                draw(runs, plot, folder / name)
    TABLES.write_text(page(files))


if __name__ == "__main__":
    main()
