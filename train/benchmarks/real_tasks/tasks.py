"""The tasks: rows to train, to choose and to test by, and the accuracy of a model on them.

Training rows are split into `tuned` and `validation`, which chooses. Test rows are the data sets'.
"""

import functools
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genlora_jax.data.batches import train_batches
from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import encode
from genlora_jax.data.packing import eval_batches
from genlora_jax.data.sources import MemorySource
from genlora_jax.evaluation.tasks import choices, match
from genlora_jax.generation.subject import Subject
from genlora_jax.hf.base_model import Base

VALIDATION = 1000
QUIZZES = ("llm_adapters/boolq", "arc_easy", "llm_adapters/arc_challenge", "openbookqa")
PROBLEMS = {"gsm8k": "jsonl", "svamp": "json"} | dict.fromkeys(
    ("llm_adapters/multiarith", "llm_adapters/addsub", "llm_adapters/singleeq"), "json"
)
BOOLQ = re.compile(r".*question: (.*?)\n\nAnswer format: true/false", re.DOTALL)
Batches = list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        style: How options are scored; None for problems, whose answers are decoded.
        rows: Rows of a batch.
        length: Tokens of a row.
    """

    style: choices.Style | None
    rows: int
    length: int


TASKS = {
    "completions": Task("text", 16, 256),
    "letters": Task("letter", 16, 256),
    "math": Task(None, 8, 512),
}


def items(file: Path) -> list[choices.Item]:
    """The questions of a quiz of LLM-Adapters; BoolQ's have the options true and false."""
    found = []
    rows = json.loads(file.read_text())
    if BOOLQ.fullmatch(rows[0]["instruction"]) is None:
        return choices.read(str(file))
    for row in rows:
        parts = BOOLQ.fullmatch(row["instruction"])
        if parts is None or row["answer"] not in ("true", "false"):
            raise ValueError(f"{file}: no question of BoolQ: {row['instruction']!r}")
        found.append(
            choices.Item(parts[1].strip(), ["true", "false"], int(row["answer"] == "false"))
        )
    return found


def problems(file: Path) -> list[match.Problem]:
    """The problems of GSM8K's or of LLM-Adapters' form."""
    text = file.read_text()
    rows = map(json.loads, text.splitlines()) if file.suffix == ".jsonl" else json.loads(text)
    return [
        match.Problem(
            f"Question: {str(row.get('question', row.get('instruction'))).strip()}\nAnswer:",
            f" {row['answer']}",
        )
        for row in rows
    ]


def train_rows(data: Path, task: Task) -> list[dict[str, str]]:
    """The training rows, as the evaluation will ask."""
    if task.style is None:
        return [
            {"prompt": str(problem.prompt), "completion": problem.expected}
            for problem in problems(data / "gsm8k/train.jsonl")
        ]
    rows = []
    for quiz in QUIZZES:
        for item in items(data / quiz / "train.json"):
            prompt, options = choices.formatted(item, task.style)
            rows.append({"prompt": prompt, "completion": " " + options[item.answer]})
    return rows


@functools.cache
def batches(data: Path, name: str, tokenizer: Any, steps: int) -> tuple[Batches, Batches]:
    """The batches of so many steps, and those of the validation rows."""
    task = TASKS[name]
    rows = train_rows(data, task)
    order = np.random.default_rng(0).permutation(len(rows))
    cfg = DataConfig(train=name, length=task.length, batch_size=task.rows, overlong="drop")

    def source(kind: str, chosen: np.ndarray) -> MemorySource:
        places = ((f"{name}-{kind}:{i}", dict(rows[i])) for i in chosen)
        examples, report = encode(places, tokenizer, cfg, f"{name}-{kind}")
        print(report, flush=True)
        return MemorySource(examples)

    tuned = source("tuned", order[VALIDATION:])
    epoch = sum(1 for _ in train_batches(tuned, cfg, epochs=1))
    train = train_batches(tuned, cfg, epochs=-(-steps // epoch) + 1)
    held_out = eval_batches(source("validation", order[:VALIDATION]), cfg)
    return list(itertools.islice(train, steps)), list(held_out)


def accuracy(
    base: Base, params: Any, data: Path, name: str, part: Literal["train", "test"], limit: int
) -> dict[str, float]:
    """The accuracy by data set, and their mean.

    Args:
        base: For its model and tokenizer.
        params: A merged model's.
        data: The folder of the data.
        name: The task.
        part: The test rows, or training rows to try this on.
        limit: Most rows of a data set.
    """
    task = TASKS[name]
    subject = Subject(
        model=base.model,
        params=params,
        factors={},
        tokenizer=base.tokenizer,
        stop=base.stop,
        batch_size=128 if task.style is None else 256,
    )
    scores = {}
    if task.style is None:
        cfg = match.MatchConfig(data=name, answer="number", max_new_tokens=200)
        for quiz, suffix in PROBLEMS.items():
            asked = problems(data / quiz / f"{part}.{suffix}")[:limit]
            scores[quiz] = match.run(subject, cfg, asked).metrics["exact_match"]
    else:
        options = choices.ChoicesConfig(data=name, style=task.style)
        for quiz in QUIZZES:
            asked_items = items(data / quiz / f"{part}.json")[:limit]
            scores[quiz] = choices.run(subject, options, asked_items).metrics["accuracy"]
    return scores | {"mean": float(np.mean(list(scores.values())))}
