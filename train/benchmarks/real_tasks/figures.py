"""The figures of the results, as in the paper's Figures 1, 3 and 4, from committed JSON alone.

python -m train.benchmarks.real_tasks.figures [--folder FOLDER]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from train.benchmarks.measuring import RESULTS

HERE = RESULTS / "real_tasks"
DOCS = Path(__file__).parents[3] / "docs"
SPECTRA = ("lora r=4", "lora r=16", "residual g=32", "rbf, h=spread", "target r=32 g=16, from lora")
FAMILIES = (
    *("LoRA", "GenLoRA, residual alone", "GenLoRA, residual alone, from LoRA"),
    *("GenLoRA, with RBFs", "GenLoRA, with RBFs, from LoRA", "other methods"),
)
COLOURS = {family: f"C{index}" for index, family in enumerate(FAMILIES)}
Records = dict[str, dict[str, Any]]


def family(name: str, record: dict[str, Any]) -> str:
    """What an arm is drawn as."""
    if record["config"]["method"] == "lora":
        return "LoRA"
    if record["config"]["method"] != "genlora":
        return "other methods"
    rbfs = "with RBFs" if record["config"]["kernels"] else "residual alone"
    return f"GenLoRA, {rbfs}" + (", from LoRA" if "from lora" in name else "")


def finished(records: Records) -> Records:
    """The arms that were trained, by parameters."""
    found = {name: record for name, record in records.items() if "best_loss" in record}
    return dict(sorted(found.items(), key=lambda item: item[1]["parameters"]))


def draw_accuracy(axis: Any, records: Records) -> None:
    """Accuracy on the test rows against parameters, with standard errors over the seeds."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for name, record in finished(records).items():
        values = [100 * score["mean"] for score in record.get("accuracy", [])]
        if values:
            error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
            point = (record["parameters"], float(np.mean(values)), float(error))
            points.setdefault(family(name, record), []).append(point)
    for label, found in sorted(points.items()):
        sizes, means, errors = zip(*found, strict=True)
        style = {"linestyle": "-" if label == "LoRA" else "none", "color": COLOURS[label]}
        axis.errorbar(sizes, means, errors, fmt="o", capsize=2, label=label, **style)
    for score in records.get("base", {}).get("accuracy", []):
        axis.axhline(100 * score["mean"], color="grey", linestyle=":", label="base")
    axis.set(xscale="log", xlabel="trained parameters", ylabel="accuracy, %")


def draw_losses(axis: Any, records: Records, field: str, fixed: dict[str, int]) -> None:
    """Validation loss against rank or group size, all else equal."""
    lines: dict[str, dict[int, float]] = {}
    for name, record in finished(records).items():
        cfg = record["config"]
        plain = name.startswith(("residual", "rbf, h=spread")) and not cfg.get("hadamard")
        if plain and all(cfg[key] == value for key, value in fixed.items()):
            size = cfg[field]
            kept = lines.setdefault(family(name, record), {})
            kept[size] = min(kept.get(size, np.inf), record["best_loss"])
    for label, found in sorted(lines.items()):
        points = zip(*sorted(found.items()), strict=True)
        axis.plot(*points, marker="o", label=label, color=COLOURS[label])
    axis.set_xscale("log", base=2)
    axis.set(xlabel=field.replace("_", " "), ylabel="validation loss")


def draw_spectra(axis: Any, records: Records) -> None:
    """Singular values of the deltas over their largest."""
    for name in SPECTRA:
        values = [x for x in records.get(name, {}).get("singular_values") or [] if x > 0]
        if values:
            axis.plot(range(1, len(values) + 1), values, label=name)
    axis.set(yscale="log", xlabel="index", ylabel="singular value / largest")


def draw_reconstruction(axis: Any, arms: Records) -> None:
    """Errors of a trained LoRA's basis vectors, generated from one latent, against parameters."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, arm in arms.items():
        kind = name.partition(" g=")[0].partition(" k=")[0]
        lines.setdefault(kind, []).append((arm["parameters"], arm["error"]))
    for label, found in lines.items():
        axis.plot(*zip(*sorted(found), strict=True), marker="o", label=label)
    axis.set(xscale="log", xlabel="parameters for 16 vectors", ylabel="relative error")


def save(figure: Any, file: Path) -> None:
    """Writes a figure, its panels with legends."""
    for axis in figure.axes:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)
    print(file)


def read(name: str) -> dict[str, Records]:
    """The runs of a result by task; none if there is no such result."""
    file = HERE / f"{name}.json"
    return json.loads(file.read_text())["runs"] if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=DOCS)
    folder = parser.parse_args().folder
    tasks = {**read("final"), **read("math")}
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.5), squeeze=False)
    for axis, (task, records) in zip(axes[0], tasks.items(), strict=True):
        draw_accuracy(axis, records)
        axis.set_title(f"{task}, three seeds")
    save(figure, folder / "real_tasks.png")
    final = tasks["completions"]
    one_seed = read("ablation")["completions"] | read("grid").get("completions", {})
    figure, axes = plt.subplots(1, 3, figsize=(18, 4.5))
    draw_losses(axes[0], one_seed, "rank", {"group_size": 32})
    axes[0].set_title("completions, g = 32, one seed")
    draw_losses(axes[1], one_seed, "group_size", {"rank": 64})
    axes[1].set_title("completions, r = 64, one seed")
    draw_spectra(axes[2], final)
    axes[2].set_title("completions, deltas of the first seed")
    save(figure, folder / "real_tasks_shapes.png")
    figure, axis = plt.subplots(figsize=(6, 4.5))
    arms = json.loads((HERE / "reconstruction.json").read_text())["arms"]
    draw_reconstruction(axis, arms)
    save(figure, folder / "real_tasks_reconstruction.png")


if __name__ == "__main__":
    main()
