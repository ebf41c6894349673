"""The tasks: rows to train, to choose and to test by, and how a model does on them.

Training rows are split into `tuned` and `validation`, which chooses. Test rows are the data sets'.
`chat` is GSM8K as turns of the model's chat template, `code` MBPP, whose exercises 11 to 510 test.
"""

import functools
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import genlora_jax as gl
from genlora_jax.data.batches import train_batches
from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import encode
from genlora_jax.data.packing import eval_batches
from genlora_jax.data.sources import MemorySource
from genlora_jax.evaluation.tasks import choices, code, match
from genlora_jax.generation.subject import Subject
from genlora_jax.hf.base_model import Base
from genlora_jax.training.step import evaluate, make_eval_step
from genlora_jax.training.step_options import StepOptions

CHUNK = 4096  # tokens whose logits exist at a time: the vocabulary is large
QUIZZES = ("llm_adapters/boolq", "arc_easy", "llm_adapters/arc_challenge", "openbookqa")
PROBLEMS = {"gsm8k": "jsonl", "svamp": "json"} | dict.fromkeys(
    ("llm_adapters/multiarith", "llm_adapters/addsub", "llm_adapters/singleeq"), "json"
)
BOOLQ = re.compile(r".*question: (.*?)\n\nAnswer format: true/false", re.DOTALL)
Batches = list[dict[str, np.ndarray]]


PROGRAMS = code.CodeConfig(
    data="mbpp",
    allow_code=True,
    samples=10,
    temperature=0.6,
    top_p=0.95,
    k=[1, 10],
    max_new_tokens=256,
)


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        kind: Options scored as `text` or by `letter`; answers decoded whose `number` counts; turns
            of a `chat`, whose loss counts; `code` that tests run.
        rows: Rows of a batch.
        length: Tokens of a row.
        validation: Training rows that are kept to choose by.
    """

    kind: Literal["text", "letter", "number", "chat", "code"]
    rows: int
    length: int
    validation: int


TASKS = {
    "completions": Task("text", 16, 256, 1000),
    "letters": Task("letter", 16, 256, 1000),
    "math": Task("number", 8, 512, 500),
    "chat": Task("chat", 8, 512, 500),
    "code": Task("code", 8, 512, 90),
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


def exercises(data: Path, *, tested: bool) -> list[code.Exercise]:
    """MBPP's exercises 11 to 510, which test, or those after them."""
    found = code.read(str(data / "mbpp.jsonl"))
    return found[10:510] if tested else found[510:]


def rows_of(data: Path, task: Task, part: Literal["train", "test"]) -> list[dict[str, Any]]:
    """The rows to train by, as the evaluation will ask; test rows of what has a test loss."""
    if task.kind == "code":
        return [
            {"prompt": one.prompt, "completion": one.solution}
            for one in exercises(data, tested=part == "test")
        ]
    if task.kind == "chat":

        def turn(role: str, content: str) -> dict[str, str]:
            return {"role": role, "content": content}

        return [
            {"messages": [turn("user", row["question"]), turn("assistant", row["answer"])]}
            for row in map(json.loads, (data / f"gsm8k/{part}.jsonl").read_text().splitlines())
        ]
    if task.kind == "number":
        return [
            {"prompt": str(problem.prompt), "completion": problem.expected}
            for problem in problems(data / f"gsm8k/{part}.jsonl")
        ]
    rows = []
    for quiz in QUIZZES:
        for item in items(data / quiz / f"{part}.json"):
            prompt, options = choices.formatted(item, task.kind)
            rows.append({"prompt": prompt, "completion": " " + options[item.answer]})
    return rows


def source(rows: list[dict[str, Any]], name: str, cfg: DataConfig, tokenizer: Any) -> MemorySource:
    """Rows as tokens."""
    places = ((f"{name}:{i}", dict(row)) for i, row in enumerate(rows))
    examples, report = encode(places, tokenizer, cfg, name)
    print(report, flush=True)
    return MemorySource(examples)


def config(task: Task) -> DataConfig:
    """How the rows of a task are read."""
    return DataConfig(train=task.kind, length=task.length, batch_size=task.rows, overlong="drop")


@functools.cache
def batches(data: Path, name: str, tokenizer: Any, steps: int) -> tuple[Batches, Batches]:
    """The batches of so many steps, and those of the validation rows."""
    task = TASKS[name]
    rows, cfg = rows_of(data, task, "train"), config(task)
    order = np.random.default_rng(0).permutation(len(rows))
    kept = [rows[i] for i in order[: task.validation]]
    tuned = source([rows[i] for i in order[task.validation :]], f"{name}-tuned", cfg, tokenizer)
    epoch = sum(1 for _ in train_batches(tuned, cfg, epochs=1))
    train = train_batches(tuned, cfg, epochs=-(-steps // epoch) + 1)
    held_out = eval_batches(source(kept, f"{name}-validation", cfg, tokenizer), cfg)
    return list(itertools.islice(train, steps)), list(held_out)


def merged_subject(base: Base, adapter: gl.Adapter | None, batch_size: int) -> Subject:
    """The base, an adapter merged into it, as what is asked."""
    params = base.params
    if adapter is not None:
        params = gl.merge(params, gl.generate_factors(adapter.config, adapter))
    return Subject(
        model=base.model,
        params=params,
        factors={},
        tokenizer=base.tokenizer,
        stop=base.stop,
        batch_size=batch_size,
    )


def tested(
    base: Base,
    adapter: gl.Adapter | None,
    data: Path,
    name: str,
    limit: int,
    programs: code.CodeConfig,
) -> tuple[dict[str, float], dict[str, str]]:
    """A model's figures on the test rows.

    Args:
        base: The base.
        adapter: An adapter of it; None for the base alone.
        data: The folder of the data.
        name: The task.
        limit: Most rows of a data set.
        programs: How programs are drawn and run.

    Returns:
        Accuracies by data set and their `mean`, or `loss` and perhaps `pass@k`; and by data set
        which rows were right, a bit each, in hexadecimal.
    """
    task = TASKS[name]
    subject = merged_subject(base, adapter, min(256, 10 * limit))
    if task.kind in ("chat", "code"):
        cfg = config(task)
        rows = eval_batches(
            source(rows_of(data, task, "test")[:limit], f"{name}-test", cfg, base.tokenizer), cfg
        )
        step = make_eval_step(base.model, StepOptions(chunk=CHUNK))
        figures = {"loss": evaluate(step, subject.params, {}, list(rows))}
        if task.kind == "code":
            code.check_sandbox(programs)
            ran = code.run(subject, programs, exercises(data, tested=True)[:limit]).metrics
            figures |= {f"pass@{k}": ran[f"pass@{k}"] for k in programs.k}
        return figures, {}
    figures, right = {}, {}
    for quiz, rows in right_answers(subject, data, name, limit).items():
        figures[quiz] = float(np.mean(rows))
        right[quiz] = np.packbits(rows).tobytes().hex()
    return figures | {"mean": float(np.mean(list(figures.values())))}, right


def right_answers(subject: Subject, data: Path, name: str, limit: int) -> dict[str, list[bool]]:
    """By data set, which test rows are answered rightly."""
    kind, found = TASKS[name].kind, {}
    if kind == "number":
        cfg = match.MatchConfig(data=name, answer="number", max_new_tokens=200)
        for quiz, suffix in PROBLEMS.items():
            asked = problems(data / quiz / f"test.{suffix}")[:limit]
            found[quiz] = [row["right"][0] for row in match.run(subject, cfg, asked).rows]
        return found
    scored = choices.ChoicesConfig(data=name, style="text" if kind == "text" else "letter")
    for quiz in QUIZZES:
        asked_items = items(data / quiz / "test.json")[:limit]
        rows = choices.run(subject, scored, asked_items).rows
        found[quiz] = [row["chosen"] == row["answer"] for row in rows]
    return found
