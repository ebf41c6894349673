"""How long an import takes beside that of the libraries that it needs.

    python -m train.benchmarks.import_time

Each statement runs five times, in turn with the others, in a process of its own; an earlier round
fills the caches of bytecode and files. CPU time leaves out what else the machine does meanwhile.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from genlora_jax.training.provenance import provenance

RUNS = 5
NEEDED = "import jax, flax.linen"
STATEMENTS = (
    NEEDED,
    "import genlora_jax",
    "from genlora_jax.models.llama import LlamaForCausalLM",
    "from genlora_jax import load_llama",
)
TIMED = """
import time
wall, cpu = time.perf_counter(), time.process_time()
{statement}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""
ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "import_time.json"


def measure(statement: str) -> tuple[float, float]:
    """Seconds of wall-clock and of CPU time that a statement takes in a new process."""
    command = [sys.executable, "-c", TIMED.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def main() -> None:
    where = provenance()
    rounds = [[measure(statement) for statement in STATEMENTS] for _ in range(1 + RUNS)][1:]
    results = {}
    for statement, runs in zip(STATEMENTS, zip(*rounds, strict=True), strict=True):
        wall, cpu = (statistics.median(times) for times in zip(*runs, strict=True))
        results[statement] = {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}
    table = Table("statement", "seconds", "CPU seconds", "ratio", "ratio of CPU seconds")
    for statement, times in results.items():
        for field in ("seconds", "cpu_seconds"):
            times[f"{field}_ratio"] = round(times[field] / results[NEEDED][field], 2)
        table.add_row(
            statement,
            f"{times['seconds']:.2f}",
            f"{times['cpu_seconds']:.2f}",
            f"{times['seconds_ratio']:.2f}",
            f"{times['cpu_seconds_ratio']:.2f}",
        )
    RESULT.write_text(json.dumps({"runs": RUNS, "imports": results} | where, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
