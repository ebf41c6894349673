"""What the tasks have in common: rows of a source, worked examples, results.

A task is a module with `read(source, limit)`, which returns its items, and `run(subject, cfg,
items)`, which returns a `Result`. Where items may not go with the settings it has `check(cfg,
items)`, and where the model is asked something `prompts(cfg, items)`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from genlora_jax.data.forms import names_of, unused_fields
from genlora_jax.data.rows import read_rows
from genlora_jax.generation.answers import answers, cut, room
from genlora_jax.generation.decoding import check_sampling
from genlora_jax.generation.subject import Prompt, Subject
from genlora_jax.validation import require_int

T = TypeVar("T")
Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The rows of a task.

    Attributes:
        data: A source of rows, or several with separate results; as `data.train` of a recipe, or
            a `.json` file with an array.
        limit: Rows to take from the beginning of each source; None for all.
    """

    data: str | list[str]
    limit: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        if not self.data:
            raise ValueError("data names no source")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")

    @property
    def sources(self) -> list[str]:
        """The sources, in order."""
        return [self.data] if isinstance(self.data, str) else self.data


@dataclass(frozen=True, kw_only=True)
class PromptConfig(TaskConfig):
    """The rows of a task, and what comes before each.

    Attributes:
        shots: Worked examples before each row's prompt.
        examples: Their source, of which the first are taken; needed for them.
    """

    shots: int = 0
    examples: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        if self.shots < 0:
            raise ValueError(f"shots must not be negative, got {self.shots}")
        if self.shots and self.examples is None:
            raise ValueError("shots need examples: a source whose rows are none of the data's")


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(PromptConfig):
    """The rows of a task, and how the model answers.

    Attributes:
        chat: Ask in the tokenizer's chat template.
        max_new_tokens: Longest answer.
        temperature: 0 for greedy, else softmax temperature.
        top_p: Sample from the most likely tokens of this total probability.
        samples: Answers to each prompt.
        seed: Seed of the sampling.
    """

    chat: bool = False
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        check_sampling(self.max_new_tokens, self.temperature, self.top_p)
        require_int("samples", self.samples, 1)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples of greedy decoding are one: set temperature")


@dataclass(frozen=True)
class Result:
    """The results of one source.

    Attributes:
        metrics: By name.
        rows: One entry a row: what the model was asked, what it answered, how that was judged.
    """

    metrics: dict[str, Any]
    rows: list[dict[str, Any]]


def read_items(
    source: str,
    limit: int | None,
    read: Callable[[str, dict[str, Any]], tuple[T, Collection[str]]],
    say: Say,
) -> list[T]:
    """The first rows of a source.

    Args:
        source: The source.
        limit: How many rows; None for all.
        read: Makes an item of a row and its place, and names the fields that it took for that.
        say: Is told which fields of the rows are used, and which are not.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If a row is bad, or there is none.
    """
    items, taken, idle = [], set(), set()
    for place, row in islice(read_rows(source), limit):
        item, used = read(place, row)
        items.append(item)
        taken |= row.keys() & used
        idle.update(unused_fields(row, used))
    if not items:
        raise ValueError(f"{source} has no rows")
    rest = f"; not used: {names_of(idle)}" if idle else ""
    say(f"{source}: {len(items):,} rows of {names_of(taken)}{rest}")
    return items


def read_examples(cfg: PromptConfig, read: Callable[[str, int, Say], list[T]]) -> list[T]:
    """The worked examples of a task, read by the task's `read`; none if it takes none.

    Raises:
        ValueError: If there are too few.
    """
    # They have the fields of the data, of which is told once.
    items = read(str(cfg.examples), cfg.shots, lambda _: None) if cfg.shots else []
    if len(items) < cfg.shots:
        raise ValueError(f"{cfg.examples} has {len(items)} rows: too few for {cfg.shots} shots")
    return items


def with_examples(
    prompt: Prompt, examples: Sequence[tuple[Prompt, str]], *, chat: bool = False
) -> Prompt:
    """A prompt after worked examples; with `chat` as a conversation.

    Raises:
        ValueError: If there are examples and the prompt is a conversation already.
    """
    if not isinstance(prompt, str):
        if examples:
            raise ValueError("rows with messages take no worked examples: set shots to 0")
        return prompt
    if not chat:
        return "\n\n".join([*(f"{asked}{answer}" for asked, answer in examples), prompt])
    messages: list[dict[str, str]] = []
    for asked, answer in examples:
        messages.append({"role": "user", "content": str(asked)})
        messages.append({"role": "assistant", "content": answer.strip()})
    return [*messages, {"role": "user", "content": prompt}]


def ask(
    subject: Subject, cfg: AnswerConfig, prompts: Sequence[Prompt], stop: Sequence[Sequence[str]]
) -> tuple[list[list[str]], int]:
    """The model's answers to the prompts of a task.

    Args:
        subject: The model, and how many rows a batch has.
        cfg: How it answers.
        prompts: Texts or conversations.
        stop: Strings before which the answers to each prompt end, in addition to the model's
            stop tokens. They are applied to finished answers and save no time.

    Returns:
        Texts, `cfg.samples` for each prompt, and how many prompts were too long: those lost their
        beginning.

    Raises:
        ValueError: If `cfg.max_new_tokens` leaves no position for a prompt, or the tokenizer has no
            chat template for a conversation.
    """
    if subject.tokenizer.chat_template and any(isinstance(prompt, str) for prompt in prompts):
        print("note: asks without the model's chat template; chat: true asks in it")
    encoded = [subject.encode_prompt(prompt) for prompt in prompts]
    names = ("max_new_tokens", "temperature", "top_p", "samples", "seed")
    continuations = answers(subject, encoded, **{name: getattr(cfg, name) for name in names})
    texts = [
        [cut(text, strings) for text in samples]
        for samples, strings in zip(continuations, stop, strict=True)
    ]
    longest = room(subject, cfg.max_new_tokens)
    return texts, sum(len(ids) > longest for ids in encoded)
