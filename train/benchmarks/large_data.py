"""Data of any size: how fast it is tokenised and read at random, and the memory that this takes.

    python -m train.benchmarks.large_data --text novels.txt --folder large-data --make
    python -m train.benchmarks.large_data --folder large-data [--only tokenising]
    JAX_PLATFORMS=cpu python -m train.benchmarks.large_data --folder large-data --only runs

With `--make` it writes the files alone: rows of prompt and completion cut out of a text, some 1,000
bytes each; those of the large file are the million of another one, ten times over. The tokenizer,
32,000 pairs of bytes with LLaMA-3's pattern of words, is learned from the text. Rates are of all
cores, and of a second of one core, which other work on the machine changes less; memory is the peak
of the process itself, above the same with a file of 1,000 rows. The cache of the large file is as
`genlora tokenize` would write it, but for its tokens: the shards of a smaller cache, over and over.
Runs are of a tiny model, an epoch long, and ended after their first step. Rows are counted over an
epoch in which the number of processes changes halfway; lengths of rows that are not known are as in
`lazy`.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from genlora_jax.data.cache import INDEX, LENGTHS, CacheSource, index_digest, shard_name
from genlora_jax.data.cache_writing import write_cache
from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import load_examples
from genlora_jax.data.lazy import LazySource, LineFile
from genlora_jax.training.provenance import provenance
from train.benchmarks.large_data_runs import counted, first_steps
from train.benchmarks.measuring import GIB, RESULTS, write_result

PART, LIBRARY, SMALL, MANY = 200_000, 20_000, 1_000, 10_000_000  # rows
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
RESULT = RESULTS / "large_data.json"
PARTS = ("tokenising", "reading", "runs", "counting", "counting-known")
GROUP, READS = 64, 300  # rows that are asked for at once, and how often


def make(text: str, folder: Path) -> None:
    """Writes the tokenizer and the files of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    parts = (text[i : i + 100_000] for i in range(0, min(len(text), 20_000_000), 100_000))
    tokenizer.train_from_iterator(parts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    begins = rng.integers(0, len(text) - 1500, MANY // 10)
    sizes = rng.integers(400, 1500, MANY // 10)
    with (folder / "million.jsonl").open("w", encoding="utf-8") as file:
        for at, size in zip(begins.tolist(), sizes.tolist(), strict=True):
            cut = at + size // 3
            row = {"prompt": text[at:cut], "completion": text[cut : at + size]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    head(folder / "million.jsonl", folder / "part.jsonl", PART)
    head(folder / "million.jsonl", folder / "small.jsonl", SMALL)
    with (folder / "many.jsonl").open("wb") as file:
        for _ in range(10):
            with (folder / "million.jsonl").open("rb") as part:
                shutil.copyfileobj(part, file, 1 << 24)


def head(source: Path, target: Path, rows: int) -> None:
    """The first rows of a file as another one."""
    with source.open("rb") as read, target.open("wb") as written:
        for _ in range(rows):
            written.write(read.readline())


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that something takes, and those of all cores, of processes that have ended too."""
    began, cpu = time.perf_counter(), sum(os.times()[:4])
    run()
    return time.perf_counter() - began, sum(os.times()[:4]) - cpu


def rates(folder: Path, tokenizer: PreTrainedTokenizerFast, cfg: DataConfig) -> dict[str, Any]:
    """Rows a second of the library alone, of a cache that is written, and of one process."""
    head(folder / "million.jsonl", folder / "library.jsonl", LIBRARY)
    with (folder / "library.jsonl").open(encoding="utf-8") as file:
        texts = [row["prompt"] + row["completion"] for row in map(json.loads, file)]
    encode = tokenizer.backend_tokenizer.encode_batch

    def library(size: int) -> None:
        for i in range(0, len(texts), size):
            encode(texts[i : i + size])

    alone, of_core = {}, {}
    for size in (300, 3000):
        took, cpu = seconds(lambda size=size: library(size))
        alone[f"batches of {size:,}"] = LIBRARY / took
        of_core[f"batches of {size:,}"] = LIBRARY / cpu
    shutil.rmtree(folder / "rated", ignore_errors=True)
    cfg = dataclasses.replace(cfg, cache=str(folder / "rated"))
    million, rows = folder / "million.jsonl", MANY // 10
    took, cpu = seconds(lambda: write_cache(str(million), tokenizer, cfg))
    in_memory, _ = seconds(lambda: load_examples(str(folder / "library.jsonl"), tokenizer, cfg))
    ours = rows / took
    return {
        "tokenizers_rows_per_s": {name: round(rate) for name, rate in alone.items()},
        "cache_rows_per_s": round(ours),
        "cache_share": round(ours / max(alone.values()), 3),
        "tokenizers_rows_per_cpu_s": {name: round(rate) for name, rate in of_core.items()},
        "cache_rows_per_cpu_s": round(rows / cpu),
        "cache_share_of_cpu": round(rows / cpu / max(of_core.values()), 3),
        "memory_rows_per_s": round(LIBRARY / in_memory),
        "rows": rows,
        "bytes": million.stat().st_size,
    }


def repeated(cache: str, folder: Path, rows: int) -> str:
    """A cache of so many rows, of the shards of another one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    index = json.loads((Path(cache) / INDEX).read_text())
    lengths = np.load(Path(cache) / LENGTHS)
    times, count = rows // len(lengths), len(index["shards"])
    for number in range(times * count):
        shutil.copyfile(Path(cache) / shard_name(number % count), folder / shard_name(number))
    np.save(folder / LENGTHS, np.tile(lengths, times))
    del index["digest"]
    index |= {"shards": index["shards"] * times, "rows": [len(lengths) * times]}
    index["digest"] = index_digest(index, (folder / LENGTHS).read_bytes())
    (folder / INDEX).write_text(json.dumps(index))
    return str(folder)


def read(kind: str, place: str, folder: Path) -> dict[str, Any]:
    """What opening a source and reading rows at random takes, in this process."""
    tokenizer, began = read_tokenizer(folder), time.perf_counter()
    is_cache = kind == "cache"
    source: Any = (
        CacheSource(place)
        if is_cache
        else LazySource([LineFile(Path(place))], [place], tokenizer, DataConfig(train=place))
    )
    opened = time.perf_counter() - began
    rng = np.random.default_rng(0)
    source.read(rng.integers(0, len(source), GROUP))
    first = time.perf_counter() - began
    groups = rng.integers(0, len(source), (READS if is_cache else READS // 10, GROUP))
    took, _ = seconds(lambda: [source.read(group) for group in groups])
    return {
        "rows": len(source),
        "open_s": round(opened, 2),
        "first_rows_s": round(first, 2),
        "rows_per_s": round(groups.size / took),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3),
    }


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", eos_token="</s>")


def in_process(kind: str, place: str, folder: Path) -> dict[str, Any]:
    """`read` in a process of its own."""
    command = [sys.executable, "-m", "train.benchmarks.large_data", "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--read", kind, place], stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text of 50 MB or more")
    parser.add_argument("--folder", type=Path, required=True, help="where files of 30 GB go")
    parser.add_argument("--make", action="store_true", help="write the files, and end")
    parser.add_argument("--only", choices=PARTS, help="one part; the others' results are kept")
    parser.add_argument("--counted", type=int, default=MANY, help="rows to count")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(json.dumps(read(*given.read, given.folder)))
        return
    if given.make:
        make(given.text.read_text(encoding="utf-8"), given.folder)
        return
    folder, tokenizer, origin = given.folder, read_tokenizer(given.folder), provenance()
    cfg = DataConfig(train="-", cache=str(folder / "caches"), length=1024)
    for part in PARTS if given.only is None else [given.only]:
        if part == "tokenising":
            found: Any = rates(folder, tokenizer, cfg)
        elif part == "reading":
            found = reading(folder, tokenizer, cfg)
        elif part == "runs":
            small, many = caches(folder, tokenizer, cfg)
            names = {"small.jsonl": small, "many.jsonl": many}
            found = first_steps(folder, names, tokenizer, cfg)
        else:
            found = []
            for count in counted(given.counted, known=part == "counting-known"):
                found.append(count)
                print(count, flush=True)
        result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        result[part] = {"found": found, "commit": origin["commit"]}
        write_result(RESULT, result, origin)
        print(json.dumps({part: found}, indent=1), flush=True)


def caches(folder: Path, tokenizer: PreTrainedTokenizerFast, cfg: DataConfig) -> tuple[str, str]:
    """The caches of the small file and of the large one, as their directories."""
    small = write_cache(str(folder / "small.jsonl"), tokenizer, cfg)
    part = write_cache(str(folder / "part.jsonl"), tokenizer, cfg)
    return small, repeated(part, folder / "many", MANY)


def reading(folder: Path, tokenizer: PreTrainedTokenizerFast, cfg: DataConfig) -> dict[str, Any]:
    """Time, rate and memory of reading a small file's rows and those of the large one."""
    places = {
        "cache": caches(folder, tokenizer, cfg),
        "lazy": (str(folder / "small.jsonl"), str(folder / "many.jsonl")),
    }
    result = {}
    for kind, both in places.items():
        found = [in_process(kind, place, folder) for place in both]
        more = round(found[1]["peak_gib"] - found[0]["peak_gib"], 3)
        result[kind] = {"small": found[0], "many": found[1], "gib_more": more}
    return result


if __name__ == "__main__":
    main()
