"""Texts to token arrays, once, for all runs of the study; needs no accelerator.

    python -m train.benchmarks.frontier.prepare --shared ../shared --out frontier-data

Half of each task's training rows can be part of the pretraining (the regime `known`); another
part tunes adapters, and a third, validation, chooses among them. A task's test rows go to another
file, which no run that chooses anything opens.
"""

import argparse
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from genlora_jax.data.batches import train_batches
from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import encode
from genlora_jax.data.packing import eval_batches
from genlora_jax.data.sources import MemorySource
from genlora_jax.evaluation.tasks import choices

VOCABULARY, LENGTH = 8192, 512
# Rows of a batch and epochs, so that every task has a hundred steps or two.
ROWS = {"math": 16, "letters": 4, "completions": 4, "code": 2}
EPOCHS = {"math": 3, "letters": 3, "completions": 3, "code": 6}
TUNED, VALIDATION, TEST = 2660, 400, 1000
NOVELS = "<|novel|>"
Row = dict[str, str]


def multiple_choice(file: Path, style: choices.Style) -> list[Row]:
    """Prompts as the evaluation formats them, with the right option as the completion."""
    rows = []
    for item in choices.read(str(file)):
        prompt, options = choices.formatted(item, style)
        rows.append({"prompt": prompt, "completion": " " + options[item.answer]})
    return rows


def math(file: Path) -> list[Row]:
    rows = map(json.loads, file.read_text().splitlines())
    return [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": " " + row["answer"]}
        for row in rows
    ]


def code(file: Path) -> list[Row]:
    rows = map(json.loads, file.read_text().splitlines())
    return [
        {"prompt": f"Task: {row['text']}\n", "completion": row["code"].replace("\r\n", "\n")}
        for row in rows
    ]


def read_tasks(shared: Path) -> dict[str, tuple[list[Row], list[Row]]]:
    """Training and test rows of each task."""
    data = shared / "data"
    quizzes = [data / "arc_easy", data / "openbookqa"]
    programs = code(data / "mbpp.jsonl")  # in the order of its published split: test is 11-510
    found = {
        "math": (math(data / "gsm8k/train.jsonl"), math(data / "gsm8k/test.jsonl")),
    }
    styles: dict[str, choices.Style] = {"letters": "letter", "completions": "text"}
    for name, style in styles.items():
        train, test = (
            [row for quiz in quizzes for row in multiple_choice(quiz / f"{part}.json", style)]
            for part in ("train", "test")
        )
        found[name] = (train, test)
    found["code"] = (programs[:10] + programs[510:], programs[10:510])
    return found


def split(rows: list[Row], seed: int) -> dict[str, list[Row]]:
    """Shares of a task's training rows: half for pretraining, the rest to tune and to choose."""
    order = np.random.default_rng(seed).permutation(len(rows))
    known = len(rows) // 2
    chosen = min(VALIDATION, (len(rows) - known) // 4)
    tuned = min(TUNED, len(rows) - known - chosen)
    parts = np.split(order, [known, known + chosen, known + chosen + tuned])
    names = ("known", "validation", "tuned")
    return {name: [rows[i] for i in part] for name, part in zip(names, parts[:-1], strict=True)}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> np.ndarray:
    """Rows `[n, LENGTH]` of texts one after another, in a random order of pieces."""
    ids = [
        np.array([*piece, tokenizer.eos_token_id], np.uint16)
        for piece in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    order = np.random.default_rng(seed).permutation(len(ids))
    flat = np.concatenate([ids[i] for i in order])
    count = len(flat) // LENGTH
    return flat[: count * LENGTH].reshape(count, LENGTH)


def pieces(text: str, size: int = 8000) -> list[str]:
    """A text in parts of about so many characters, split between paragraphs."""
    parts, part = [], ""
    for paragraph in text.split("\n\n"):
        part += paragraph + "\n\n"
        if len(part) >= size:
            parts.append(part)
            part = ""
    return [*parts, part] if part else parts


def packed(rows: list[Row], tokenizer: Any, task: str, kind: str) -> dict[str, np.ndarray]:
    """Batches `[batches, rows, LENGTH]`: all epochs to tune on, or every row once."""
    name, train = f"{task}-{kind}", kind == "tuned"
    cfg = DataConfig(train=name, length=LENGTH, batch_size=ROWS[task], overlong="truncate")
    places = ((f"{name}:{i}", dict(row)) for i, row in enumerate(rows, 1))
    examples, report = encode(places, tokenizer, cfg, name)
    print(report, flush=True)
    source = MemorySource(examples)
    batches: Any = train_batches(source, cfg, epochs=EPOCHS[task]) if train else None
    found = list(batches) if train else eval_batches(source, cfg)
    return {field: np.stack([batch[field] for batch in found]) for field in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    arguments = parser.parse_args()
    tasks = read_tasks(arguments.shared)
    # One seed: what is known as letters is what is known as completions.
    shares = {name: split(train, seed=0) for name, (train, _) in tasks.items()}
    packed_novels = (arguments.shared / "data/novels.txt.xz").read_bytes()
    novels = lzma.decompress(packed_novels).decode("utf-8")
    texts = [piece for novel in novels.split(NOVELS) for piece in pieces(novel)]
    known = {
        name: [row["prompt"] + row["completion"] for row in share["known"]]
        for name, share in shares.items()
    }
    sample = texts[:: max(len(texts) // 2000, 1)]
    tokenizer = train_tokenizer(sample + [text for rows in known.values() for text in rows])
    arguments.out.mkdir(parents=True)
    streams = {"novels": token_stream(tokenizer, texts, 0)}
    streams |= {f"known-{name}": token_stream(tokenizer, rows, 1) for name, rows in known.items()}
    np.savez_compressed(arguments.out / "pretraining.npz", **streams)
    for kind in ("tuned", "validation", "test"):
        arrays = {}
        for task, share in shares.items():
            rows = tasks[task][1][:TEST] if kind == "test" else share[kind]
            batches = packed(rows, tokenizer, task, kind)
            arrays |= {f"{task}/{field}": value for field, value in batches.items()}
        np.savez_compressed(arguments.out / f"{kind}.npz", **arrays)
    tokenizer.save_pretrained(arguments.out / "tokenizer")
    about = {
        "vocabulary": len(tokenizer),
        "rows": {name: {k: len(v) for k, v in share.items()} for name, share in shares.items()},
        "tokens": {name: int(stream.size) for name, stream in streams.items()},
        "sha256": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(arguments.out.glob("*.npz"))
        },
    }
    (arguments.out / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
