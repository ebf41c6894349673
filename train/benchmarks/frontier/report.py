"""Tables and pictures of the study's runs.

python -m train.benchmarks.frontier.report            # all of results/frontier/*.json
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent.parent / "results" / "frontier"
PICTURES = Path(__file__).parents[3] / "docs" / "frontier"
COLOURS = {"lora": "tab:blue", "residual": "tab:orange", "rbf": "tab:green"}


def best(arm: dict[str, Any]) -> tuple[float, float, str]:
    """Lowest validation loss over an arm's rates, its rate, and where in the grid that lies."""
    losses = [math.inf if loss is None else loss for loss in arm["validation_loss"]]
    i = min(range(len(losses)), key=losses.__getitem__)
    rates = sorted({member["learning_rate"] for member in arm["members"]})
    rate = arm["members"][i]["learning_rate"]
    edge = {rates[0]: "lowest", rates[-1]: "highest"}.get(rate, "") if len(rates) > 1 else ""
    return losses[i], rate, edge


def lora_equivalent(parameters: int, loss: float, arms: dict[str, Any]) -> float | None:
    """Parameters that LoRA needs for the same loss over an arm's, by interpolation of logarithms.

    None outside of what LoRA's arms span.
    """
    plain = [a for n, a in arms.items() if n.startswith("lora") and "failed" not in a]
    curve = sorted((best(arm)[0], math.log(arm["parameters"])) for arm in plain)
    for (low, more), (high, fewer) in itertools.pairwise(curve):
        if low <= loss <= high:
            share = (high - loss) / (high - low) if high > low else 0.0
            return math.exp(fewer + share * (more - fewer)) / parameters
    return None


def table(arms: dict[str, Any]) -> str:
    """A regime's arms by parameters, in Markdown."""
    lines = [
        "| arm | parameters | best rate | validation loss | LoRA needs |",
        "|---|---|---|---|---|",
    ]
    done = {name: arm for name, arm in arms.items() if "failed" not in arm}
    for name, arm in sorted(done.items(), key=lambda item: item[1]["parameters"]):
        loss, rate, edge = best(arm)
        ratio = lora_equivalent(arm["parameters"], loss, done)
        needs = "" if ratio is None or name.startswith("lora") else f"{ratio:.2f} x"
        said = f"{rate:.2g}" + (f" ({edge})" if edge else "")
        lines.append(f"| {name} | {arm['parameters']:,} | {said} | {loss:.4f} | {needs} |")
    return "\n".join(lines)


def draw(run: dict[str, Any], file: Path) -> None:
    """Loss against parameters, a panel a regime."""
    regimes = run["regimes"]
    figure, axes = plt.subplots(1, len(regimes), figsize=(6 * len(regimes), 4.5), squeeze=False)
    for axis, (regime, found) in zip(axes[0], regimes.items(), strict=True):
        points: dict[str, list[tuple[int, float]]] = {}
        for name, arm in found["arms"].items():
            if "failed" not in arm:
                points.setdefault(name.split()[0], []).append((arm["parameters"], best(arm)[0]))
        for family, values in points.items():
            line = "o-" if family == "lora" else "o"
            axis.plot(
                *zip(*sorted(values), strict=True), line, label=family, color=COLOURS.get(family)
            )
        axis.set(xscale="log", xlabel="trained parameters", ylabel="validation loss", title=regime)
        axis.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=sorted(RESULTS.glob("*.json")))
    for file in parser.parse_args().files:
        run = json.loads(file.read_text())
        for regime, found in run["regimes"].items():
            told = found["pretraining"]
            print(f"\n## {file.stem}, {regime} (base: loss {told['loss']:.3f})\n")
            print(table(found["arms"]))
        draw(run, PICTURES / f"{file.stem}.png")


if __name__ == "__main__":
    main()
