"""Answers: continuations of many prompts as text."""

from collections.abc import Sequence
from typing import Any

import jax

from genlora_jax.generation.decoding import decode
from genlora_jax.generation.subject import Subject


def answers(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
) -> list[list[str]]:
    """The model's answers to prompts.

    A prompt that leaves no room for `max_new_tokens` loses its beginning.

    Args:
        subject: The model, and how many rows a batch has.
        prompts: Token ids, at least one a prompt.
        max_new_tokens: Longest answer.
        temperature: 0 for greedy, else softmax temperature.
        top_p: Sample from the most likely tokens of this total probability.
        samples: Answers to each prompt.
        seed: Seed of the sampling.

    Returns:
        Texts, `samples` for each prompt, up to a stop token of the model's.

    Raises:
        ValueError: If `max_new_tokens` leaves no position for a prompt.
    """
    longest = room(subject, max_new_tokens)
    kept = [list(prompt)[-longest:] for prompt in prompts for _ in range(samples)]
    new = decode(
        subject.model,
        subject.params,
        kept,
        factors=subject.factors,
        max_new_tokens=max_new_tokens,
        stop=subject.stop,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(seed),
        rows=subject.batch_size,
    )
    texts = [_text(subject, *both) for both in zip(kept, new, strict=True)]
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def room(subject: Subject, max_new_tokens: int) -> int:
    """Positions that an answer leaves for its prompt.

    Raises:
        ValueError: If there are none.
    """
    if not 0 < max_new_tokens < subject.positions:
        raise ValueError(
            f"max_new_tokens ({max_new_tokens}) must be at least 1 and below the model's positions "
            f"({subject.positions})"
        )
    return subject.positions - max_new_tokens


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first occurrence of any of some strings."""
    return text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]


def _text(subject: Subject, prompt: list[int], new: list[int]) -> str:
    """New tokens as text, decoded after their prompt: some tokenizers drop a text's first space."""
    options: Any = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    whole, before = (str(subject.tokenizer.decode(x, **options)) for x in (prompt + new, prompt))
    return whole[len(before) :]
