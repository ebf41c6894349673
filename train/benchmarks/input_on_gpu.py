"""Whether a GPU waits for its input: a run that tokenises as it goes on two cores, profiled.

    python -m train.benchmarks.input_on_gpu --model SmolLM2-135M --text grimm.txt --output RUN

`genlora finetune` with LoRA r=16, rows of 512 tokens, packed, on two cores with all its processes.
The text is repeated until the file is too large to be read into memory, so that rows are tokenised
as the run goes. A profile of some seconds says for how much of them no kernel ran, and the longest
of these times.
The model is small, so that a GPU asks for more tokens a second than it does with 8B. Its layers are
scanned, as thirty unrolled ones take two minutes to compile on two cores.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from train.benchmarks.measuring import RESULTS, gpu_events, paragraphs, union, write_result

RESULT = RESULTS / "input_on_gpu.json"
CORES, LENGTH, ROWS = 2, 512, 32
STEPS, FIRST, SECONDS = 400, 100, 3.0  # the step after which the profile begins, and its length


def records(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run so far."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def profile(run: Path, folder: Path, done: threading.Event) -> None:
    """Profiles some seconds of a run that has begun, or nothing if it ends before."""
    import jax

    while not (done.is_set() or any(row["step"] >= FIRST for row in records(run))):
        time.sleep(0.2)
    if not done.is_set():
        with jax.profiler.trace(folder):
            time.sleep(SECONDS)


def idle(folder: Path) -> dict[str, float]:
    """For how much of a profile its first GPU ran nothing, and the longest of these times."""
    # A copy is no work: the GPU may wait for it.
    kernels = [e for e in gpu_events(folder)[0] if not e.name.startswith(("Memcpy", "Memset"))]
    busy = union((event.start_ns, event.start_ns + event.duration_ns) for event in kernels)
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(busy)]
    seconds = (busy[-1][1] - busy[0][0]) / 1e9
    return {
        "profiled_s": seconds,
        "idle_share": sum(gaps) / 1e9 / seconds,
        "longest_idle_ms": max(gaps, default=0) / 1e6,
        "idle_share_over_1_ms": sum(gap for gap in gaps if gap > 1e6) / 1e9 / seconds,
    }


def main() -> None:
    """Runs, writes the result and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="of the run")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # before JAX starts threads
    import jax

    from genlora_jax.data.config import DataConfig
    from genlora_jax.data.open_source import LARGE
    from genlora_jax.hf.base_model import ModelConfig
    from genlora_jax.methods import LoRAConfig
    from genlora_jax.training.finetune import finetune
    from genlora_jax.training.recipe import Recipe, TrainConfig

    with tempfile.TemporaryDirectory() as scratch:
        folder, done = Path(scratch), threading.Event()
        rows = folder / "rows.jsonl"
        once = "".join(paragraphs(options.text))
        rows.write_text(once * (LARGE // len(once) + 2))
        recipe = Recipe(
            model=ModelConfig(path=str(options.model), scan=True),
            adapter=LoRAConfig(rank=16, alpha=32.0),
            data=DataConfig(train=str(rows), length=LENGTH, batch_size=ROWS, overlong="split"),
            train=TrainConfig(output=str(options.output), steps=options.steps, progress=False),
        )
        watch = threading.Thread(target=profile, args=(options.output, folder, done))
        watch.start()
        try:
            finetune(recipe)
        finally:
            done.set()
            watch.join()
        if not any(folder.rglob("*.xplane.pb")):
            raise SystemExit(f"the run ended before step {FIRST}, where its profile begins")
        found = idle(folder)
    kept = [row for row in records(options.output) if row["step"] > FIRST]
    for name in ("tokens_per_second", "input_wait"):
        found[name] = statistics.median(row[name] for row in kept if name in row)
    result = {
        "device": jax.devices()[0].device_kind,
        "cores": CORES,
        "rows": ROWS,
        "length": LENGTH,
        "data": dataclasses.asdict(recipe.data) | {"train": options.text.name},
    }
    write_result(RESULT, result | found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
