"""What lm-eval asks of a model, as functions; `lm_eval.py` puts lm-eval's class around them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from genlora_jax.evaluation.scoring import Pair, Score, encode_pair, log_likelihoods
from genlora_jax.generation.answers import answers, cut
from genlora_jax.generation.subject import Subject

MAX_NEW_TOKENS = 256  # lm-eval's default


def loglikelihood(subject: Subject, requests: Sequence[tuple[str, str]]) -> list[Score]:
    """Scores of texts (context, continuation), in order.

    An empty context stands for the beginning of a text.

    Raises:
        ValueError: As `log_likelihoods` does.
    """
    return log_likelihoods(subject, [encode_pair(subject, *request) for request in requests])


def loglikelihood_rolling(subject: Subject, texts: Sequence[str]) -> list[float]:
    """Log-likelihoods (nats) of whole texts, each token predicted once with what context fits.

    The token that begins a text comes before each and is not predicted. (lm-eval's model for
    PyTorch predicts a second one where the tokenizer adds it.)

    Texts may have any length; the empty text scores 0.

    Raises:
        ValueError: If the tokenizer has no token that begins or ends a text.
    """
    encoded = [subject.encode(text, special=False) for text in texts]
    windows = [list(_windows(ids, subject.prefix, subject.positions)) for ids in encoded]
    scores = iter(log_likelihoods(subject, list(itertools.chain.from_iterable(windows))))
    return [sum(next(scores).logprob for _ in pairs) for pairs in windows]


def _windows(ids: list[int], prefix: int, positions: int) -> Iterator[Pair]:
    """Contexts and continuations that predict each token of a text once."""
    if ids:
        yield [prefix], ids[:positions]
    for start in range(positions, len(ids), positions):
        stop = min(start + positions, len(ids))
        yield ids[stop - positions - 1 : start], ids[start:stop]


def generate_until(
    subject: Subject, requests: Sequence[tuple[str, Mapping[str, Any]]], *, seed: int = 0
) -> list[str]:
    """Continuations, in order.

    Args:
        subject: The model, and how many rows a batch has.
        requests: Contexts and their settings: lm-eval's `until`, `max_gen_toks`, `do_sample`,
            `temperature` and `top_p`.
        seed: Seed of the sampling.

    Raises:
        ValueError: If a setting is another that changes what is generated.
    """
    continuations = [""] * len(requests)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (_, settings) in enumerate(requests):
        groups.setdefault(_settings(settings), []).append(i)
    for (stop, max_new_tokens, temperature, top_p), chosen in groups.items():
        texts = answers(
            subject,
            [subject.encode(requests[i][0]) or [subject.prefix] for i in chosen],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        for i, (text,) in zip(chosen, texts, strict=True):
            continuations[i] = cut(text, stop)
    return continuations


def _settings(requested: Mapping[str, Any]) -> tuple[tuple[str, ...], int, float, float]:
    """Stop strings, most new tokens, temperature and top-p of a request."""
    settings = dict(requested)
    until = settings.pop("until", None) or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    longest = settings.pop("max_gen_toks", None) or settings.pop("max_new_tokens", None)
    max_new_tokens = int(longest or MAX_NEW_TOKENS)
    temperature = float(settings.pop("temperature", None) or 0.0)
    if settings.pop("do_sample", temperature > 0) and not temperature > 0:
        temperature = 1.0
    elif requested.get("do_sample") is False:
        temperature = 0.0
    top_p = float(settings.pop("top_p", None) or 1.0)
    if unknown := {name for name, value in settings.items() if value is not None}:
        raise ValueError(f"generation settings that are not supported: {sorted(unknown)}")
    return stop, max_new_tokens, temperature, top_p
