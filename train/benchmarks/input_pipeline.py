"""What the input of a run costs: padding, planning, batches a second, and pods of many processes.

    python -m train.benchmarks.input_pipeline [--rows 10000000] [--counted 300000]
    python -m train.benchmarks.input_pipeline --tokenizer SmolLM2-135M --text grimm.txt

The second form measures rows that are tokenised as a run goes, alone; the result keeps the rest.
No device is used. Lengths are log-normal about 130 tokens. Pods are simulated process by process:
each makes its rows of the batches, which are counted.
"""

import argparse
import json
import math
import os
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import grain.experimental
import numpy as np
from rich.console import Console
from rich.table import Table

from genlora_jax.data.batches import Batches
from genlora_jax.data.cache import INDEX, CacheSource
from genlora_jax.data.cache_writing import Shards
from genlora_jax.data.config import DataConfig
from genlora_jax.data.examples import Encoded
from genlora_jax.data.lazy import LazySource, LineFile
from genlora_jax.data.packing import Batch, max_in_row
from genlora_jax.data.sources import Part
from genlora_jax.hf.tokenizer import load_tokenizer
from genlora_jax.training.feed import Feed
from genlora_jax.training.provenance import provenance
from train.benchmarks.measuring import RESULTS, paragraphs

# Tokens/s of one H200: about those of LLaMA-8B, and more than those of SmolLM-135M in this library.
DEVICE = {"8B": 16_000, "135M": 60_000}
PODS = (64, 256, 1024)
EACH = 4  # rows of a batch that a process holds
COMPARED = 64  # processes of a pod whose rows are compared with the whole batch
LENGTH = 512


class Synthetic:
    """Rows of made-up lengths, whose tokens are the row's number."""

    def __init__(self, rows: int, *, known: bool = True):
        normal = np.random.default_rng(0).standard_normal(rows, np.float32)
        self.sizes = np.clip(np.exp(normal * 0.5 + math.log(130)), 8, LENGTH).astype(np.int32)
        self.lengths = self.sizes if known else None
        self.mean_length = float(self.sizes[:100_000].mean())
        self.parts, self.fingerprint = (Part(rows),), "synthetic"

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, rows: Sequence[int]) -> list[list[dict[str, np.ndarray]]]:
        return [[self.example(row)] for row in rows]

    def example(self, row: int) -> dict[str, np.ndarray]:
        size = self.sizes[row]
        return {"input_ids": np.full(size, row, np.int32), "loss_mask": np.ones(size, bool)}


def config(batch_size: int, length: int = LENGTH) -> DataConfig:
    return DataConfig(train="synthetic", length=length, batch_size=batch_size)


def padding(rows: int = 10_000) -> dict[str, dict[str, float]]:
    """The share of padding by length of row: ours where lengths are known and not, and Grain's."""
    found = {}
    for length in (512, 1024, 2048):
        cfg, source = config(16, length), Synthetic(rows)
        examples = grain.MapDataset.source([{"x": np.zeros(n, np.int8)} for n in source.sizes])
        first_fit = grain.experimental.FirstFitPackIterDataset(
            examples.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)),
            length_struct={"x": length},
            num_packing_bins=16,
            shuffle_bins=False,
            max_sequences_per_bin=max_in_row(source, cfg),
        )
        theirs = sum(1 for _ in first_fit) * length
        found[str(length)] = {
            "known": round(Batches(source, cfg).plan(1).padding, 4),
            "slots": round(Batches(Synthetic(rows, known=False), cfg).plan(1).padding, 4),
            "first_fit": round(1 - float(source.sizes.sum()) / theirs, 4),
        }
    return found


def resident() -> int:
    """The most memory that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def planning(rows: int) -> dict[str, Any]:
    """Seconds until an epoch's steps are known and the first batch is made, and memory for it."""
    next(Batches(Synthetic(1000), config(16)))
    before = resident()
    source = Synthetic(rows)
    began = time.perf_counter()
    plan = Batches(source, config(16)).plan(1)
    planned = time.perf_counter()
    next(Batches(source, config(16)))
    return {
        "rows": rows,
        "steps": plan.steps,
        "plan_s": round(planned - began, 1),
        "first_batch_s": round(time.perf_counter() - planned, 3),
        "mib_above_1000_rows": resident() - before,
    }


def write_cache(directory: Path, rows: int) -> None:
    """A cache as `genlora tokenize` writes it, of random tokens."""
    shards, rng, sizes = Shards(directory), np.random.default_rng(0), Synthetic(rows).sizes
    for some in np.array_split(sizes, -(-rows // 50_000)):
        tokens = rng.integers(0, 100_000, int(some.sum()), np.uint32)
        shards.write(Encoded(tokens, some, np.ones(len(some), np.int32)))
    shards.close()
    index = {"rows": [rows], "shards": shards.tokens, "fingerprint": "random", "report": ""}
    (directory / INDEX).write_text(json.dumps(index))


def rate(rows: int = 1_000_000, batches: int = 400) -> dict[str, Any]:
    """Tokens/s of batches of 16 rows, padding included, from a cache of 580 MB."""
    with tempfile.TemporaryDirectory() as directory:
        write_cache(Path(directory), rows)
        made = Batches(CacheSource(directory), config(16))
        next(made)
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(made)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    tokens = batches * 16 * LENGTH / seconds
    return {
        "tokens_per_second": round(tokens),
        "cores": round(cpu / seconds, 2),
        **{f"times_{name}": round(tokens / device, 1) for name, device in DEVICE.items()},
    }


def tokenised(tokenizer: str, text: Path, batches: int = 200) -> dict[str, Any]:
    """Rows read from a file of lines and tokenised as they are asked for, on this process's cores.

    Tokens/s as fast as batches come, and the share of time in which a device that takes four times
    those of an H200 waits for its batch, as a run's `input_wait` counts it.
    """
    lines = paragraphs(text)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.jsonl"
        file.write_text("".join(lines) * -(-100_000 // len(lines)))
        cfg = DataConfig(train=str(file), length=LENGTH, batch_size=16, overlong="split")
        source = LazySource([LineFile(file)], [str(file)], load_tokenizer(Path(tokenizer)), cfg)
        made = Batches(source, cfg)
        next(made)
        began, real = time.perf_counter(), 0
        for _ in range(batches):
            real += int((next(made)["segment_ids"] > 0).sum())
        seconds = time.perf_counter() - began
        found: dict[str, Any] = {
            "cores": len(os.sched_getaffinity(0)),
            "tokens_per_second": round(batches * 16 * LENGTH / seconds),
            "padding": round(1 - real / (batches * 16 * LENGTH), 4),
            "input_wait": {},
        }
        with Feed(made, lambda batch: batch) as feed:
            for name, device in DEVICE.items():
                feed.take()
                before, began = feed.waited, time.perf_counter()
                for _ in range(batches):
                    time.sleep(16 * LENGTH / (4 * device))
                    feed.take()
                wait = (feed.waited - before) / (time.perf_counter() - began)
                found["input_wait"][f"four_times_{name}"] = round(wait, 4)
    return found


def rows_of(batch: Batch) -> np.ndarray:
    """The rows of the source that a batch has examples of."""
    return batch["input_ids"][(batch["positions"] == 0) & (batch["segment_ids"] > 0)]


def slots_of(process: int) -> range:
    return range(process * EACH, (process + 1) * EACH)


def pod_of_slots(rows: int, processes: int) -> dict[str, Any]:
    """An epoch of a source of unknown lengths; from the middle on by half as many processes."""
    source, cfg = Synthetic(rows, known=False), config(processes * EACH)
    counts, shares = np.zeros(rows, int), []
    half = Batches(source, cfg, slots=slots_of(0)).plan(1).steps // 2
    places: list[Any] = [None] * cfg.batch_size
    for process in range(processes):
        made = Batches(source, cfg, epochs=1, slots=slots_of(process))
        seen = [rows_of(next(made)) for _ in range(half)]
        shares.append(sum(map(len, seen)))
        counts += np.bincount(np.concatenate(seen), minlength=rows)
        state = made.get_state()
        for slot in slots_of(process):
            places[slot] = state["places"][slot]
        made.close()
    state |= {"places": places}
    for process in range(processes // 2):
        slots = [*slots_of(2 * process), *slots_of(2 * process + 1)]
        made = Batches(source, cfg, epochs=1, slots=slots)
        made.set_state(state)
        counts += np.bincount(np.concatenate([rows_of(b) for b in made]), minlength=rows)
        made.close()
    return {
        "rows_of_a_process": [min(shares), max(shares)],
        "lost": int((counts == 0).sum()),
        "repeated": int((counts > 1).sum()),
        "state_bytes": len(json.dumps(state)),
    } | memory(source, cfg)


def pod_of_known(rows: int, processes: int) -> dict[str, Any]:
    """An epoch of a source of known lengths: counted over all slots; 64 processes compared."""
    source, cfg = Synthetic(rows), config(processes * EACH)
    counts, places, whole = np.zeros(rows, int), [], Batches(source, cfg, epochs=1)
    steps = whole.plan(1).steps
    compared = {0, steps // 2, steps - 1}
    for step in range(steps):
        place = whole.get_state()
        batch = next(whole)
        counts += np.bincount(rows_of(batch), minlength=rows)
        if step in compared:
            places.append((place, batch))
    different = 0
    for process in range(0, processes, processes // COMPARED):
        made = Batches(source, cfg, epochs=1, slots=slots_of(process))
        for place, batch in places:
            made.set_state(place)
            ours = next(made)
            theirs = {name: value[list(slots_of(process))] for name, value in batch.items()}
            different += any((ours[name] != theirs[name]).any() for name in ours)
    return {
        "lost": int((counts == 0).sum()),
        "repeated": int((counts > 1).sum()),
        "different_rows": different,
        "state_bytes": len(json.dumps(place)),
    } | memory(source, cfg)


def memory(source: Synthetic, cfg: DataConfig, steps: int = 20) -> dict[str, float]:
    """MiB that one process's batches take beside the lengths, and its milliseconds a batch."""
    tracemalloc.start()
    made = Batches(source, cfg, slots=slots_of(1))
    for _ in range(3):
        next(made)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    began = time.perf_counter()
    for _ in range(steps):
        next(made)
    milliseconds = (time.perf_counter() - began) / steps * 1e3
    made.close()
    return {"mib": round(peak / 2**20, 1), "ms_per_batch": round(milliseconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000, help="to plan an epoch of")
    parser.add_argument("--counted", type=int, default=300_000, help="rows that a pod counts")
    parser.add_argument("--tokenizer", help="whose directory; with --text")
    parser.add_argument("--text", type=Path, help="paragraphs that are the rows")
    arguments = parser.parse_args()
    file = RESULTS / "input_pipeline.json"
    if arguments.tokenizer:
        found = tokenised(arguments.tokenizer, arguments.text) | provenance()
        print(json.dumps(found, indent=1))
        whole = json.loads(file.read_text()) | {"tokenised": found}
        file.write_text(json.dumps(whole, indent=1) + "\n")
        return
    result: dict[str, Any] = {"planning": planning(arguments.rows), "padding": padding()}
    result["rate"] = rate() | {"assumed_tokens_per_second": DEVICE}
    pods = {"known": pod_of_known, "slots": pod_of_slots}
    result["pods"] = {
        kind: {str(count): pod(arguments.counted, count) for count in PODS}
        for kind, pod in pods.items()
    } | {"rows": arguments.counted, "rows_of_a_batch_each": EACH}
    table = Table("pod", "processes", "lost", "repeated", "MiB of one", "ms a batch", "state")
    for kind in pods:
        for count, found in result["pods"][kind].items():
            names = ("lost", "repeated", "mib", "ms_per_batch", "state_bytes")
            table.add_row(kind, count, *(str(found[name]) for name in names))
    Console().print(table)
    print(json.dumps({name: result[name] for name in ("planning", "padding", "rate")}, indent=1))
    result |= provenance()
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
