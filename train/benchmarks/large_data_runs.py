"""Runs on data of any size, for `large_data`: their first step, their memory, and no row lost."""

import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from genlora_jax.data.batches import Batches
from genlora_jax.data.cache import cache_name
from genlora_jax.data.config import DataConfig
from genlora_jax.data.packing import Batch
from genlora_jax.data.sources import Part
from genlora_jax.storage import WRITTEN
from train.benchmarks.measuring import GIB
from train.benchmarks.quantised_loading import write_model
from train.benchmarks.random_base import SIZES

PROCESSES = ((1, 8), (2, 1), (4, 2), (8, 4))  # in the first half of an epoch, and in the second
SLOTS = 64  # rows of a batch
LONGEST = 24  # tokens of a counted row
SECONDS = 600  # that a first step may take


def first_steps(
    folder: Path, caches: dict[str, str], tokenizer: PreTrainedTokenizerFast, cfg: DataConfig
) -> dict[str, Any]:
    """Seconds to the first step of a run of one epoch, and memory of its process until then.

    Args:
        folder: Has the files of rows.
        caches: The caches of files, by the files' names.
        tokenizer: The tokenizer.
        cfg: That the caches were made with.
    """
    base, found = folder / "base", {}
    if not base.exists():
        size = dataclasses.replace(SIZES["tiny"], vocab_size=32_000)
        write_model(base, size, np.float32)
        tokenizer.save_pretrained(base)
    for name, cache in caches.items():
        # As `genlora tokenize` would have named it.
        own = cache_name([str(folder / name)], tokenizer, dataclasses.replace(cfg))
        place = folder / "caches" / own
        if not place.exists():
            shutil.copytree(cache, place, copy_function=_link)
        (place / WRITTEN).touch()
    for kind in ("cache", "lazy"):
        for name in caches:
            given = ["--data.cache", str(cfg.cache)] if kind == "cache" else []
            found[f"{kind}, {name}"] = _first_step(folder, folder / name, given)
            print(kind, name, found[f"{kind}, {name}"], flush=True)
    small, many = caches
    for kind in ("cache", "lazy"):
        both = (found[f"{kind}, {name}"]["peak_gib"] for name in (many, small))
        found[f"{kind}, {many}"]["gib_more"] = round(float(np.subtract(*both)), 3)
    return found


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def _first_step(folder: Path, data: Path, given: Sequence[str]) -> dict[str, float]:
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    recipe = {
        "--model.path": folder / "base",
        "--data.train": data,
        "--data.batch_size": 2,
        "--data.length": 1024,
        "--train.output": output,
        "--train.progress": "false",
        "--adapter.rank": 4,
    }
    flags = [str(part) for pair in recipe.items() for part in pair]
    command = [sys.executable, "-m", "genlora_jax", "finetune", *flags, *given]
    began, metrics = time.perf_counter(), output / "metrics.jsonl"
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (metrics.exists() and metrics.stat().st_size):
        if run.poll() is not None or time.perf_counter() - began > SECONDS:
            run.kill()
            raise RuntimeError(f"the run came to no first step: {' '.join(command)}")
        time.sleep(0.1)
    took = time.perf_counter() - began
    lines = Path(f"/proc/{run.pid}/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    run.send_signal(signal.SIGTERM)
    run.wait()
    return {"first_step_s": round(took, 1), "peak_gib": round(peak * 1024 / GIB, 3)}


class Numbered:
    """Rows of some tokens each, all of them the row's number."""

    def __init__(self, rows: int, *, known: bool):
        self.sizes = np.random.default_rng(0).integers(1, LONGEST + 1, rows, np.int32)
        self.lengths = self.sizes if known else None
        self.mean_length = float(self.sizes.mean())
        self.parts, self.fingerprint = (Part(rows),), "numbered"

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, rows: Sequence[int]) -> list[list[dict[str, np.ndarray]]]:
        sizes = self.sizes[rows].tolist()
        return [
            [{"input_ids": np.full(size, row, np.int32), "loss_mask": np.ones(size, bool)}]
            for row, size in zip(rows, sizes, strict=True)
        ]


def counted(rows: int, *, known: bool) -> Iterator[dict[str, Any]]:
    """How many rows an epoch loses or repeats, if the number of processes changes halfway."""
    source = Numbered(rows, known=known)
    cfg = DataConfig(train="numbered", length=4 * LONGEST, batch_size=SLOTS)
    half = Batches(source, cfg).plan(1).steps // 2
    for before, after in PROCESSES:
        began, counts = time.perf_counter(), np.zeros(rows, np.uint8)
        places: list[Any] = [None] * SLOTS
        state: Any = None
        for process in range(before):
            made = Batches(source, cfg, epochs=1, slots=_slots(process, before))
            _count(counts, [_rows(next(made)) for _ in range(half)])
            state = made.get_state()
            merged = zip(state["places"], places, strict=False)
            places = [own if own is not None else other for own, other in merged]
            made.close()
        state |= {"places": places}
        for process in range(after):
            made = Batches(source, cfg, epochs=1, slots=_slots(process, after))
            made.set_state(state)
            _count(counts, [_rows(batch) for batch in made])
            made.close()
        yield {
            "rows": rows,
            "lengths_known": known,
            "processes": [before, after],
            "lost": int((counts == 0).sum()),
            "repeated": int((counts > 1).sum()),
            "seconds": round(time.perf_counter() - began),
        }


def _slots(process: int, processes: int) -> range:
    each = SLOTS // processes
    return range(process * each, (process + 1) * each)


def _rows(batch: Batch) -> np.ndarray:
    return batch["input_ids"][(batch["positions"] == 0) & (batch["segment_ids"] > 0)]


def _count(counts: np.ndarray, rows: list[np.ndarray]) -> None:
    np.add.at(counts, np.concatenate(rows), 1)
