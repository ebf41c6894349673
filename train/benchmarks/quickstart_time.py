"""The quickstart's training command by this checkout and by another one, in turn.

    python -m train.benchmarks.quickstart_time ../older-checkout

Wall seconds of the whole process, from the first import to the saved adapter. Nothing is compiled
ahead: each process has an empty cache of compiled programs.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from genlora_jax.training.provenance import provenance
from train.benchmarks.measuring import RESULTS, keeping_compilations, write_result

COMMAND = ("finetune", "--config", "train/recipes/quickstart.yaml")
HERE = Path(__file__).resolve().parents[2]


def seconds(checkout: Path) -> float:
    """Seconds of the command in a checkout."""
    with tempfile.TemporaryDirectory() as empty:
        environment = keeping_compilations(Path(empty)) | {"PYTHONPATH": str(checkout)}
        quick = (checkout / "genlora_jax" / "__main__.py").exists()  # as the command is installed
        module = "genlora_jax" if quick else "genlora_jax.cli"
        command = [sys.executable, "-m", module, *COMMAND, "--train.output", f"{empty}/out"]
        began = time.perf_counter()
        subprocess.run(
            command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    other = given.other.resolve()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=other, text=True)
    found: dict[str, list[float]] = {"other": [], "this": []}
    for _ in range(given.pairs):
        for name, checkout in (("other", other), ("this", HERE)):
            found[name].append(round(seconds(checkout), 1))
            print(name, found[name][-1], flush=True)
    medians = {name: statistics.median(times) for name, times in found.items()}
    result = {"seconds": found, "medians": medians, "other_commit": commit.strip()}
    write_result(RESULTS / "quickstart_time.json", result, provenance())


if __name__ == "__main__":
    main()
