"""Multiple choice: the option that the model finds most likely is its answer."""

import re
import string
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np

from genlora_jax.data.forms import text_field
from genlora_jax.evaluation.scoring import encode_pair, log_likelihoods
from genlora_jax.evaluation.tasks.task import (
    PromptConfig,
    Result,
    Say,
    read_examples,
    read_items,
    with_examples,
)
from genlora_jax.generation.subject import Subject

INSTRUCTION = re.compile(
    r"Please choose the correct answer to the question: (.*)\n\n"
    r"(Answer1: .*)\n\nAnswer format: answer1(?:/answer[0-9])*",
    re.DOTALL,
)
Style = Literal["text", "letter"]


@dataclass(frozen=True, kw_only=True)
class ChoicesConfig(PromptConfig):
    """Questions with options.

    Rows have `question`, `choices` (a list of texts) and `answer` (an index from 0), or `prompt`
    instead of `question`, which is then shown as it stands; or the form that ARC and OpenBookQA
    have on the hub; or that of LLM-Adapters: an `instruction` ("Please choose the correct answer
    to the question: ... Answer1: ... Answer2: ...") and `answer` ("answer2").

    Attributes:
        style: Score each option's `text` after the question alone, or each option's `letter`
            after the question and the lettered options.
        delimiter: Text between prompt and option.
    """

    style: Style = "text"
    delimiter: str = " "


class Item(NamedTuple):
    """A question, its options and the index of the right one; a `plain` one is shown as it is."""

    question: str
    options: list[str]
    answer: int
    plain: bool = False


def read(source: str, limit: int | None = None, say: Say = print) -> list[Item]:
    """The questions of a source; raises as `read_items` does."""
    return read_items(source, limit, _item, say)


def _item(place: str, row: dict[str, Any]) -> tuple[Item, Collection[str]]:
    if "instruction" in row:
        return _instruction(place, row), ("instruction", "answer")
    options, answer = row.get("choices"), row.get("answer")
    name = next((n for n in ("prompt", "question_stem") if n in row), "question")
    asked = text_field(place, row, name)
    if isinstance(options, dict) and "answerKey" in row:  # ARC and OpenBookQA on the hub
        labels, options = options.get("label"), options.get("text")
        if not isinstance(labels, list) or row["answerKey"] not in labels:
            raise ValueError(f"{place}: answerKey {row['answerKey']!r} is none of {labels}")
        answer = labels.index(row["answerKey"])
    if not isinstance(options, list) or not all(isinstance(o, str) and o for o in options):
        raise ValueError(f"{place}: choices must be a list of texts")
    if type(answer) is not int or not 0 <= answer < len(options):
        raise ValueError(
            f"{place}: answer must be an index into {len(options)} choices, got {answer!r}"
        )
    used = (name, "choices", "answerKey" if "answerKey" in row else "answer")
    return Item(asked, options, answer, plain=name == "prompt"), used


def _instruction(place: str, row: dict[str, Any]) -> Item:
    parts = INSTRUCTION.fullmatch(text_field(place, row, "instruction"))
    if parts is None:
        raise ValueError(f"{place}: instruction has no question with Answer1, Answer2, ...")
    pieces = re.split(r"(?:^| )Answer([0-9]): ", parts[2])[1:]
    names, options = [f"answer{n}" for n in pieces[::2]], [text.strip() for text in pieces[1::2]]
    if names != [f"answer{i + 1}" for i in range(len(names))] or not all(options):
        raise ValueError(f"{place}: the options are not Answer1, Answer2, ... in order")
    if (answer := text_field(place, row, "answer")) not in names:
        raise ValueError(f"{place}: answer {answer!r} is none of {names}")
    return Item(parts[1].strip(), options, names.index(answer))


def formatted(item: Item, style: Style) -> tuple[str, list[str]]:
    """A question's prompt, and what may follow it, in the order of the options.

    Raises:
        ValueError: If a plain prompt is to get letters, or there are more options than letters.
    """
    if item.plain:
        if style == "letter":
            raise ValueError("choices.style letter needs rows with question instead of prompt")
        return item.question, item.options
    if style == "text":
        return f"Question: {item.question}\nAnswer:", item.options
    if len(item.options) > len(string.ascii_uppercase):
        raise ValueError(
            f"choices.style letter has 26 letters, {len(item.options)} options are too many: "
            f"{item.question!r}"
        )
    letters = list(string.ascii_uppercase[: len(item.options)])
    listed = [f"{letter}. {text}" for letter, text in zip(letters, item.options, strict=True)]
    return "\n".join([f"Question: {item.question}", *listed, "Answer:"]), letters


def check(cfg: ChoicesConfig, items: list[Item]) -> None:
    """Raises ValueError if a question cannot be shown in the style; see `formatted`."""
    for item in items:
        formatted(item, cfg.style)


def run(subject: Subject, cfg: ChoicesConfig, items: list[Item]) -> Result:
    """Scores every option of every question.

    Returns:
        `accuracy` by the options' log-likelihoods; for options as text, `accuracy_per_character`
        by those over the options' lengths (lm-eval's acc and acc_norm); and `cut_prompts`, how
        many prompts were too long and lost their beginning.

    Raises:
        ValueError: As `formatted`, `read_examples` and `log_likelihoods` do.
    """
    shown = []
    for item in read_examples(cfg, read):
        prompt, options = formatted(item, cfg.style)
        shown.append((prompt, cfg.delimiter + options[item.answer]))
    asked = [formatted(item, cfg.style) for item in items]
    prompts = [str(with_examples(prompt, shown)) for prompt, _ in asked]
    pairs = [
        encode_pair(subject, prompt, cfg.delimiter + option)
        for prompt, (_, options) in zip(prompts, asked, strict=True)
        for option in options
    ]
    scored = zip(pairs, log_likelihoods(subject, pairs), strict=True)
    rows, too_long = [], 0
    for item, prompt, (_, options) in zip(items, prompts, asked, strict=True):
        of_item = list(islice(scored, len(options)))
        logprobs = [score.logprob for _, score in of_item]
        # The last token is predicted, not seen.
        too_long += any(len(a) + len(b) > subject.positions + 1 for (a, b), _ in of_item)
        by_length = [x / len(option) for x, option in zip(logprobs, options, strict=True)]
        rows.append(
            {
                "prompt": prompt,
                "options": options,
                "answer": item.answer,
                "log_likelihoods": logprobs,
                "chosen": int(np.argmax(logprobs)),
                "chosen_per_character": int(np.argmax(by_length)),
            }
        )
    metrics = {"accuracy": _share(rows, "chosen"), "cut_prompts": too_long}
    if cfg.style == "text":
        metrics["accuracy_per_character"] = _share(rows, "chosen_per_character")
    return Result(metrics, rows)


def _share(rows: list[dict[str, Any]], field: str) -> float:
    return float(np.mean([row[field] == row["answer"] for row in rows]))
