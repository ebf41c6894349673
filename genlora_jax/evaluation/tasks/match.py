"""Exact match: the model answers, and its answer equals the row's or does not."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np

from genlora_jax.data.conversation import Conversation
from genlora_jax.data.forms import read_form, text_field
from genlora_jax.evaluation.tasks.task import (
    AnswerConfig,
    Result,
    Say,
    ask,
    read_examples,
    read_items,
    with_examples,
)
from genlora_jax.generation.subject import Prompt, Subject

MARK = "####"  # precedes the final answer in GSM8K
# What follows an answer of a model that was never trained to stop.
AFTER_ANSWER = ("\nQuestion:", "\n\n")
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


@dataclass(frozen=True, kw_only=True)
class MatchConfig(AnswerConfig):
    """Questions to answer.

    Rows have the forms of training data, but `text`. Of a conversation the assistant's last
    message is the answer. Of rows with `output` and `answer`, as SVAMP has, it is `answer`.

    The score is the mean over all answers to all prompts.

    Attributes:
        answer: What must agree: the `text`, the final `number` (see `final_number`), or by
            default the number where the row's answer is one or has `####`, else the text.
        stop: Strings before which an answer ends. By default a blank line and the next question,
            and none in a conversation, whose answers end by themselves.
    """

    answer: Literal["auto", "text", "number"] = "auto"
    stop: list[str] | None = None


class Problem(NamedTuple):
    """A question and its answer."""

    prompt: Prompt
    expected: str


def read(source: str, limit: int | None = None, say: Say = print) -> list[Problem]:
    """The problems of a source; raises as `read_items` does."""
    return read_items(source, limit, _problem, say)


def _problem(place: str, row: dict[str, Any]) -> tuple[Problem, Collection[str]]:
    form = read_form(row, place, asked=True)
    if form.talk is not None:
        *asked, answer = form.talk.messages
        if not asked or answer["role"] != "assistant":
            raise ValueError(f"{place}: messages must end with the assistant's, after another's")
        expected = text_field(place, answer, "content")
        return Problem(replace(form.talk, messages=asked), expected), form.used
    # Rows of LLM-Adapters have the steps in `output`, and what counts in `answer`.
    steps = "output" in form.used and isinstance(row.get("answer"), str)
    if steps:
        return Problem(form.prompt, f" {row['answer']}"), form.used - {"output"} | {"answer"}
    return Problem(form.prompt, form.completion), form.used


def final_number(text: str) -> Decimal | None:
    """The first number after `####`, or else the last number of all; None if there is none.

    Dollar signs, and commas between digits in threes, do not count: "$1,250.50" is 1250.5.
    """
    text = _without_marks(text)
    numbers = NUMBER.findall(text.partition(MARK)[2])[:1] or NUMBER.findall(text)[-1:]
    return Decimal(numbers[0]) if numbers else None


def _without_marks(text: str) -> str:
    """Numbers as Python writes them: no dollar signs, no commas between thousands."""
    return re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text.replace("$", ""))


def matches(given: str, expected: str, answer: Literal["auto", "text", "number"] = "auto") -> bool:
    """Whether an answer is the expected one; see `MatchConfig.answer`."""
    if answer == "auto":
        numeric = MARK in expected or NUMBER.fullmatch(_without_marks(expected).strip(" \n."))
        answer = "number" if numeric else "text"
    if answer == "text":
        return given.strip() == expected.strip()
    number = final_number(given)
    return number is not None and number == final_number(expected)


def check(cfg: MatchConfig, problems: list[Problem]) -> None:
    """Raises ValueError if a number is to agree and a problem has none."""
    for problem in problems if cfg.answer == "number" else ():
        if final_number(problem.expected) is None:
            raise ValueError(f"match.answer is number, and {problem.expected!r} has none")


def prompts(cfg: MatchConfig, problems: list[Problem]) -> list[Prompt]:
    """What the model is asked; raises as `read_examples` and `with_examples` do."""
    shown = read_examples(cfg, read)
    return [with_examples(problem.prompt, shown, chat=cfg.chat) for problem in problems]


def run(subject: Subject, cfg: MatchConfig, problems: list[Problem]) -> Result:
    """Has the model answer, and counts the right answers.

    Returns:
        `exact_match`, the share of right answers, and `cut_prompts`, how many prompts were too
        long and lost their beginning.

    Raises:
        ValueError: As `ask` and `with_examples` do.
    """
    asked = prompts(cfg, problems)
    usual = [AFTER_ANSWER if isinstance(prompt, str) else () for prompt in asked]
    stop = usual if cfg.stop is None else [cfg.stop] * len(asked)
    answers, too_long = ask(subject, cfg, asked, stop)
    rows = [
        {
            "prompt": prompt.messages if isinstance(prompt, Conversation) else prompt,
            "expected": problem.expected,
            "answers": texts,
            "right": [matches(text, problem.expected, cfg.answer) for text in texts],
        }
        for prompt, problem, texts in zip(asked, problems, answers, strict=True)
    ]
    exact_match = float(np.mean([row["right"] for row in rows]))
    return Result({"exact_match": exact_match, "cut_prompts": too_long}, rows)
