"""Decoding: greedy or sampled continuation of prompts, with a key-value cache.

A row of the batch whose text has ended takes the next prompt. A token's slot in the cache is its
position, so that a row's old keys are never seen: they are overwritten first. Prompts are read in
parts of one length, so that a data set needs two programs, whatever its prompts' lengths.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from genlora_jax.inject import apply
from genlora_jax.mesh import BATCH
from genlora_jax.models.layers import constrain
from genlora_jax.models.llama import LlamaForCausalLM
from genlora_jax.validation import no_result, require, require_float, require_int

SHORTEST = 64  # slots of a row
FREED = 8  # the share of rows, one in so many, that must have ended before others take their place
PART = 32  # tokens of a part of a prompt, at least
TOKENS = 256  # of the parts that are read at a time, about


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What the rows of a batch hold, without their keys and values.

    Attributes:
        tokens: Int `[rows, slots]`: each row's prompt, then its answer.
        length: Int `[rows]`: tokens so far.
        limit: Int `[rows]`: the length at which a row ends.
        done: Bool `[rows]`: rows that have ended, or never began.
        prompt: Int `[rows]`: which prompt a row continues.
        finite: Whether all logits of rows were.
    """

    tokens: Any
    length: Any
    limit: Any
    done: Any
    prompt: Any
    finite: Any

    @property
    def slots(self) -> int:
        """Tokens that a row has room for."""
        return self.tokens.shape[1]

    def place(self, row: int, prompt: int, prompts: Sequence[Sequence[int]], new: int) -> None:
        """Begins a prompt in a row, which ends after so many new tokens; arrays are NumPy's."""
        length = len(prompts[prompt])
        self.tokens[row, :length] = prompts[prompt]
        self.length[row], self.limit[row] = length, length + new
        self.done[row], self.prompt[row] = False, prompt


def decode(
    model: LlamaForCausalLM,
    params: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    factors: Mapping[str, Any] | None = None,
    max_new_tokens: int = 128,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    rows: int = 0,
) -> list[list[int]]:
    """Continues prompts.

    Args:
        model: The model.
        params: Its parameters, base or merged.
        prompts: Token ids, at least one a prompt.
        factors: An adapter's factors to inject.
        max_new_tokens: Longest continuation.
        stop: Token ids that end one; they are not returned.
        temperature: 0 for greedy, else softmax temperature.
        top_p: Sample from the most likely tokens of this total probability.
        key: PRNG key; needed to sample. What a prompt is continued with does not depend on `rows`,
            but for rounding (`fp8` has one scale for all rows).
        rows: How many prompts are continued at a time, or up to an eighth more; 0 for all of them.

    Returns:
        The continuations' token ids, in the order of the prompts.

    Raises:
        FloatingPointError: If the model's logits are not finite.
        ValueError: If a prompt is empty, sampling has no key, or an option has no such value.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("decoding needs prompts of at least one token each")
    check_sampling(max_new_tokens, temperature, top_p)
    if temperature > 0 and key is None:
        raise ValueError("sampling (temperature > 0) needs a key")
    sampling = {
        "stop": jnp.array(list(stop) or [-1]),
        "key": key if key is not None else jax.random.key(0),
        "temperature": temperature,
        "top_p": top_p,
    }
    ends, count = frozenset(stop), rows or len(prompts)
    ended = dict(
        _continue((model, params, factors or {}), prompts, max_new_tokens, count, sampling)
    )
    return [
        list(itertools.takewhile(lambda i: i not in ends, ended[i])) for i in range(len(prompts))
    ]


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises ValueError that names the option of decoding that has no such value."""
    require_int("max_new_tokens", max_new_tokens, 1)
    require_float("temperature", temperature, 0.0)
    require(0 < top_p <= 1, f"top_p must lie above 0 and be at most 1, got {top_p}")


def _continue(
    adapted: tuple[LlamaForCausalLM, Any, Any],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    count: int,
    sampling: Mapping[str, Any],
) -> Iterator[tuple[int, list[int]]]:
    """Prompts' numbers and the tokens that follow them, as they end.

    `adapted` is a model with its parameters and factors; `count` rows hold its texts.
    """
    # The longest first: a batch that is too large for the device fails at once.
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    sampled = sampling["temperature"] > 0
    least = max(1, count // FREED)
    part = _part_length(prompts, least)
    count = -(-count // least) * least  # what would be left over would wait for `least` free rows
    rows = _empty(count, _slots(len(prompts[waiting[-1]]) + max_new_tokens))
    cache = _make_cache(adapted[0], count, rows.slots)
    while waiting or not rows.done.all():
        while waiting and rows.done.sum() >= least:
            free = np.flatnonzero(rows.done)[:least]
            longest = len(prompts[waiting[-1]])
            for row in free[: len(waiting)]:
                rows.place(row, waiting.pop(), prompts, max_new_tokens)
            # The last token of a prompt is read as those of an answer are.
            for start in range(0, longest - 1, part):
                ids = np.zeros((least, part), np.int32)
                here = rows.tokens[free, start : start + part]
                ids[:, : here.shape[1]] = here
                cache = _read(*adapted, cache, ids, free, start)
        needed = [
            *rows.limit[~rows.done],
            *(len(prompts[i]) + max_new_tokens for i in waiting[-1:]),
        ]
        if 2 * (slots := _slots(int(max(needed)))) <= rows.slots:
            rows, cache = (
                replace(rows, tokens=rows.tokens[:, :slots]),
                _cut(adapted[0], cache, slots),
            )
        before = rows.done
        until = least if waiting else count
        state, cache = _advance(*adapted, rows, cache, until, **sampling, sampled=sampled)
        rows = jax.tree.map(np.array, jax.device_get(state))
        if not rows.finite:
            raise no_result("logits")
        for row in np.flatnonzero(rows.done & ~before):
            new = slice(rows.limit[row] - max_new_tokens, rows.length[row])
            yield int(rows.prompt[row]), rows.tokens[row, new].tolist()


def _empty(count: int, slots: int) -> Rows:
    """Rows without texts."""
    length, limit, prompt = np.ones((3, count), np.int32)
    tokens, done = np.zeros((count, slots), np.int32), np.ones(count, bool)
    return Rows(tokens, length, limit, done, prompt, np.array(True))


def _slots(length: int) -> int:
    """Slots for so many tokens: a power of two or three quarters of it, so that few compile."""
    power = max(SHORTEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > SHORTEST and length <= power * 3 // 4 else power


def _part_length(prompts: Sequence[Sequence[int]], rows: int) -> int:
    """Tokens of a part of a prompt: no more than a usual prompt, so that little is padding."""
    usual = sum(map(len, prompts)) // len(prompts)
    return max(PART, min(1 << (usual // 2).bit_length(), TOKENS // rows))


def _constrained(model: LlamaForCausalLM, cache: Any) -> Any:
    """A cache sharded by its rows and heads, in one way throughout: each other would compile."""
    axes = (None, BATCH, "tensor", None, None)
    return jax.tree.map(lambda leaf: constrain(model.mesh, leaf, *axes), cache)


@functools.partial(jax.jit, static_argnames=("model", "count", "slots"))
def _make_cache(model: LlamaForCausalLM, count: int, slots: int) -> Any:
    """An empty cache, of which no device ever holds more than its shard."""
    return _constrained(model, model.init_cache(count, slots))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _read(
    model: LlamaForCausalLM,
    params: Any,
    factors: Any,
    cache: Any,
    ids: jax.Array,
    rows: jax.Array,
    start: jax.Array,
) -> Any:
    """The cache with a part `ids` of the prompts of some rows in it, which begins at `start`."""
    some = jax.tree.map(lambda leaf: leaf[:, rows], cache)
    starts = jnp.full(ids.shape[:1], start)
    _, some = apply(model, params, factors, ids, starts, some, method="decode")
    cache = jax.tree.map(lambda leaf, new: leaf.at[:, rows].set(new), cache, some)
    return _constrained(model, cache)


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def _cut(model: LlamaForCausalLM, cache: Any, slots: int) -> Any:
    """The first slots of a cache."""
    return _constrained(model, jax.tree.map(lambda leaf: leaf[:, :, :, :slots], cache))


@functools.partial(jax.jit, static_argnames=("model", "sampled"), donate_argnames="cache")
def _advance(
    model: LlamaForCausalLM,
    params: Any,
    factors: Any,
    rows: Rows,
    cache: Any,
    until: jax.Array,
    *,
    stop: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    sampled: bool,
) -> tuple[Rows, Any]:
    """Adds tokens to all rows until so many of them are done."""
    each = jnp.arange(rows.done.size)

    def unfinished(carry: tuple[Rows, Any]) -> jax.Array:
        return (carry[0].done.sum() < until) & carry[0].finite

    def step(carry: tuple[Rows, Any]) -> tuple[Rows, Any]:
        rows, cache = carry
        last = rows.length - 1
        ids = rows.tokens[each, last][:, None]
        logits, cache = apply(model, params, factors, ids, last, cache, method="decode")
        if sampled:
            # A key for each token of each prompt: whichever row it has, and beside whatever others.
            keys = jax.vmap(lambda *at: jax.random.fold_in(jax.random.fold_in(key, at[0]), at[1]))
            token = _sample(logits, keys(rows.prompt, rows.length), temperature, top_p)
        else:
            token = logits.argmax(axis=-1)
        # Rows that are done write beyond the tokens, which drops it.
        at = jnp.where(rows.done, rows.tokens.shape[1], rows.length)
        length = jnp.where(rows.done, rows.length, rows.length + 1)
        new = Rows(
            tokens=rows.tokens.at[each, at].set(token.astype(jnp.int32), mode="drop"),
            length=length,
            limit=rows.limit,
            done=rows.done | jnp.isin(token, stop) | (length == rows.limit),
            prompt=rows.prompt,
            finite=(jnp.isfinite(logits).all(axis=-1) | rows.done).all(),
        )
        return new, cache

    state, cache = lax.while_loop(unfinished, step, (rows, cache))
    return state, _constrained(model, cache)


def _sample(logits: jax.Array, keys: jax.Array, temperature: Any, top_p: Any) -> jax.Array:
    """The next token of each row: `[rows, vocab]` -> `[rows]`."""
    logits = logits.astype(jnp.float32) / temperature
    order = jnp.argsort(-logits, axis=-1)
    probability = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    outside = probability.cumsum(axis=-1) - probability >= top_p  # never the most likely token
    ranked = jnp.where(outside, -jnp.inf, jnp.take_along_axis(logits, order, axis=-1))
    chosen = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0]
