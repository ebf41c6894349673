"""Exact match: the model answers, and the answer is the row's or is not."""

import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np

from genlora_jax.evaluation.generate import answers
from genlora_jax.evaluation.subject import Prompt, Subject
from genlora_jax.evaluation.tasks import (
    PromptConfig,
    Result,
    read_examples,
    read_items,
    text_field,
    with_examples,
)

MARK = "####"  # stands before the final answer in GSM8K
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


@dataclass(frozen=True, kw_only=True)
class MatchConfig(PromptConfig):
    """Questions to answer.

    Rows have `prompt` and `completion`, `messages` of which the assistant's last is the answer,
    or `question` (or `instruction`) and `answer`, as GSM8K and SVAMP have.

    Attributes:
        chat: Ask in the tokenizer's chat template.
        answer: What must agree: the `text`, the final `number` (see `final_number`), or by
            default the number where the row's answer is one or has `####`, else the text.
        max_new_tokens: Longest answer.
        stop: Strings before which an answer ends.
        temperature: 0 for greedy, else softmax temperature.
        top_p: Sample from the most likely tokens of this total probability.
        samples: Answers to each prompt; the score is their mean.
        seed: Of the sampling.
    """

    chat: bool = False
    answer: Literal["auto", "text", "number"] = "auto"
    max_new_tokens: int = 256
    stop: list[str] = field(default_factory=lambda: ["\nQuestion:", "\n\n"])
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0


class Problem(NamedTuple):
    """A question and its answer."""

    prompt: Prompt
    expected: str


def read(source: str, limit: int | None = None) -> list[Problem]:
    """The problems of a source; raises as `read_items` does."""
    return read_items(source, limit, _problem)


def _problem(place: str, row: dict[str, Any]) -> Problem:
    if "prompt" in row or "completion" in row:
        return Problem(text_field(place, row, "prompt"), text_field(place, row, "completion"))
    for name in ("question", "instruction"):
        if name in row:
            asked = text_field(place, row, name)
            return Problem(f"Question: {asked}\nAnswer:", f" {text_field(place, row, 'answer')}")
    messages = row.get("messages")
    if isinstance(messages, list) and len(messages) > 1:
        if messages[-1].get("role") != "assistant":
            raise ValueError(f"{place}: the last of messages must be the assistant's")
        return Problem(messages[:-1], text_field(place, messages[-1], "content"))
    raise ValueError(
        f"{place}: needs fields prompt and completion, question and answer, or messages; "
        f"has {sorted(row)}"
    )


def final_number(text: str) -> Decimal | None:
    """The first number after `####`, or else the last number of all; None if there is none.

    Dollar signs, and commas between digits in threes, do not count: "$1,250.50" is 1250.5.
    """
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text.replace("$", ""))
    marked = NUMBER.search(text.partition(MARK)[2])
    if marked is not None:
        return Decimal(marked[0])
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1]) if numbers else None


def matches(said: str, expected: str, answer: Literal["auto", "text", "number"] = "auto") -> bool:
    """Whether an answer is the expected one; see `MatchConfig.answer`."""
    if answer == "auto":
        numeric = MARK in expected or NUMBER.fullmatch(expected.strip())
        answer = "number" if numeric else "text"
    if answer == "text":
        return said.strip() == expected.strip()
    number = final_number(said)
    return number is not None and number == final_number(expected)


def run(subject: Subject, cfg: MatchConfig, problems: list[Problem]) -> Result:
    """Has the model answer, and counts what is right."""
    shown = read_examples(cfg, read)
    prompts = [with_examples(p.prompt, shown, chat=cfg.chat) for p in problems]
    said = answers(
        subject,
        [subject.encode_prompt(prompt) for prompt in prompts],
        max_new_tokens=cfg.max_new_tokens,
        stop=cfg.stop,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        samples=cfg.samples,
        seed=cfg.seed,
    )
    rows = [
        {
            "prompt": prompt,
            "expected": problem.expected,
            "answers": texts,
            "right": [matches(text, problem.expected, cfg.answer) for text in texts],
        }
        for prompt, problem, texts in zip(prompts, problems, said, strict=True)
    ]
    return Result({"exact_match": float(np.mean([row["right"] for row in rows]))}, rows)
