"""Log-likelihoods of continuations, in batches of few shapes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genlora_jax.generation.subject import Subject
from genlora_jax.inject import apply
from genlora_jax.models.llama import LlamaForCausalLM
from genlora_jax.training.losses import split_columns, split_head
from genlora_jax.validation import no_result

CHUNK = 1024  # tokens whose logits exist at a time
SHORTEST = 32  # rows are padded to this many tokens or more

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation


class Score(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding would produce it."""

    logprob: float
    greedy: bool


def padded(length: int) -> int:
    """The length to pad to: the next power of two, so that few lengths are compiled."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def encode_pair(subject: Subject, context: str, continuation: str) -> Pair:
    """Token ids of a context and its continuation, split where the context alone would end.

    Spaces at the context's end go to the continuation, since they belong to its first token;
    lm-eval splits in the same way. An empty context stands for the token that begins a text.
    """
    kept = context.rstrip(" ")
    if not kept:
        return [subject.prefix], subject.encode(context + continuation, special=False)
    before, whole = subject.encode(kept), subject.encode(context + continuation)
    return whole[: len(before)], whole[len(before) :]


def log_likelihoods(subject: Subject, pairs: Sequence[Pair]) -> list[Score]:
    """Scores of continuations, in order, summed in float32.

    A context too long for the model loses its beginning.

    Raises:
        FloatingPointError: If the model's logits are not finite.
        ValueError: If a context or a continuation is empty, or a continuation alone is too long.
    """
    rows = []
    for context, continuation in pairs:
        if not context or not 0 < len(continuation) <= subject.positions:
            raise ValueError(
                f"cannot score {len(continuation)} tokens after {len(context)}: both must be at "
                f"least 1, and the model has {subject.positions} positions. (A continuation that "
                "merges with the context's last token has no tokens.)"
            )
        # The last token is predicted, not seen.
        rows.append(([*context, *continuation][-subject.positions - 1 :], len(continuation)))
    scores = [Score(0.0, False)] * len(rows)
    # The longest first: a batch that is too large for the device fails at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for start in range(0, len(order), subject.batch_size):
        chosen = order[start : start + subject.batch_size]
        shape = (subject.batch_size, padded(len(rows[chosen[0]][0]) - 1))
        ids, targets, scored = np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape, bool)
        for row, i in enumerate(chosen):
            tokens, count = rows[i]
            length = len(tokens) - 1
            # Padding comes last, where causal attention does not see it from a real token.
            ids[row, :length], targets[row, :length] = tokens[:-1], tokens[1:]
            scored[row, length - count : length] = True
        sums, greedy = jax.device_get(
            _score(subject.model, subject.params, subject.factors, ids, targets, scored)
        )
        if not np.isfinite(sums).all():
            raise no_result("log-likelihoods")
        for row, i in enumerate(chosen):
            scores[i] = Score(float(sums[row]), bool(greedy[row]))
    return scores


@functools.partial(jax.jit, static_argnames="model")
def _score(
    model: LlamaForCausalLM,
    params: Mapping[str, Any],
    factors: Mapping[str, Any],
    ids: jax.Array,
    targets: jax.Array,
    scored: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sums of the scored targets' log-probabilities, and whether all are most likely: `[rows]`."""
    body, head = split_head(factors)
    hidden = apply(model, params, body, ids, method="hidden_states")
    rows, length = ids.shape
    width = min(max(CHUNK // rows, 1), length)

    def score(columns: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        states, target, counted = columns
        logits = apply(model, params, head, states, method="head").astype(jnp.float32)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        logprobs = picked - jax.nn.logsumexp(logits, axis=-1)
        sums = jnp.where(counted, logprobs, 0.0).sum(axis=-1)
        return sums, ((logits.argmax(axis=-1) == target) | ~counted).all(axis=-1)

    chunks = tuple(split_columns(x, width) for x in (hidden, targets, scored))
    sums, greedy = jax.lax.map(score, chunks)
    return sums.sum(axis=0), greedy.all(axis=0)
