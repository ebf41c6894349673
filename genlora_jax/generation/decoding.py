"""Decoding: greedy or sampled continuation of prompts, with a key-value cache."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from genlora_jax.inject import apply
from genlora_jax.models.llama import LlamaForCausalLM
from genlora_jax.validation import no_result, require, require_float, require_int

WIDTH = 16  # prompts are padded to a multiple, so that few lengths are compiled


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
    width: int = 0,
) -> list[list[int]]:
    """Continues prompts, all in one batch.

    Args:
        model: The model.
        params: Its parameters, base or merged.
        prompts: Token ids, at least one a prompt.
        factors: An adapter's factors to inject.
        max_new_tokens: Longest continuation.
        stop: Token ids that end one; they are not returned.
        temperature: 0 for greedy, else softmax temperature.
        top_p: Sample from the most likely tokens of this total probability.
        key: PRNG key; needed to sample.
        width: Tokens to which prompts are padded at least; calls of one width compile once.

    Returns:
        The continuations' token ids.

    Raises:
        FloatingPointError: If the model's logits are not finite.
        ValueError: If a prompt is empty, sampling has no key, or an option has no such value.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("decoding needs prompts of at least one token each")
    check_sampling(max_new_tokens, temperature, top_p)
    if temperature > 0 and key is None:
        raise ValueError("sampling (temperature > 0) needs a key")
    width = max(width, -(-max(map(len, prompts)) // WIDTH) * WIDTH)
    ids = np.zeros((len(prompts), width), np.int32)
    real = np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all end at one slot
        ids[row, width - len(prompt) :] = prompt
        real[row, width - len(prompt) :] = True
    new, finite = jax.device_get(
        _decode(
            model,
            params,
            factors or {},
            ids,
            real,
            jnp.array(list(stop) or [-1]),
            key if key is not None else jax.random.key(0),
            temperature,
            top_p,
            max_new_tokens=max_new_tokens,
            sampled=temperature > 0,
        )
    )
    if not finite:
        raise no_result("logits")
    return [list(itertools.takewhile(lambda i: i not in stop, row)) for row in new.tolist()]


def _pick(
    logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array, sampled: bool
) -> jax.Array:
    """The next token of each row: `[batch, vocab]` -> `[batch]`."""
    if not sampled:
        return logits.argmax(axis=-1)
    logits = logits.astype(jnp.float32) / temperature
    order = jnp.argsort(-logits, axis=-1)
    probability = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    outside = probability.cumsum(axis=-1) - probability >= top_p  # never the most likely token
    ranked = jnp.where(outside, -jnp.inf, jnp.take_along_axis(logits, order, axis=-1))
    chosen = jax.random.categorical(key, ranked)
    return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0]


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises ValueError that names the option of decoding that has no such value."""
    require_int("max_new_tokens", max_new_tokens, 1)
    require_float("temperature", temperature, 0.0)
    require(0 < top_p <= 1, f"top_p must lie above 0 and be at most 1, got {top_p}")


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampled"))
def _decode(
    model: LlamaForCausalLM,
    params: Any,
    factors: Any,
    ids: jax.Array,
    real: jax.Array,
    stop: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    max_new_tokens: int,
    sampled: bool,
) -> tuple[jax.Array, jax.Array]:
    """Prefill, then a loop that ends when every row has stopped.

    Returns:
        The tokens, `[batch, max_new_tokens]`, and whether all logits were finite.
    """
    batch, width = ids.shape
    visible = jnp.concatenate([real, jnp.ones((batch, max_new_tokens), bool)], axis=1)
    lengths = real.sum(axis=1)
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)

    def forward(tokens: Any, positions: Any, start: Any, cache: Any) -> tuple[Any, Any, Any]:
        logits, cache = apply(
            model, params, factors, tokens, positions, visible, start, cache, method="decode"
        )
        return logits, jnp.isfinite(logits).all(), cache

    def choose(logits: jax.Array, index: Any) -> jax.Array:
        picked = _pick(logits, jax.random.fold_in(key, index), temperature, top_p, sampled)
        return picked.astype(jnp.int32)

    cache = model.init_cache(batch, width + max_new_tokens)
    logits, finite, cache = forward(ids, positions, 0, cache)
    first = choose(logits, 0)
    out = jnp.full((batch, max_new_tokens), stop[0], jnp.int32).at[:, 0].set(first)

    def unfinished(carry: Any) -> jax.Array:
        index, _, done, finite, _, _ = carry
        return (index < max_new_tokens) & ~done.all() & finite

    def advance(carry: Any) -> Any:
        index, token, done, _, out, cache = carry
        position = (lengths + index - 1)[:, None]
        logits, finite, cache = forward(token[:, None], position, width + index - 1, cache)
        token = jnp.where(done, stop[0], choose(logits, index))
        out = lax.dynamic_update_slice_in_dim(out, token[:, None], index, axis=1)
        return index + 1, token, done | jnp.isin(token, stop), finite, out, cache

    carry = (1, first, jnp.isin(first, stop), finite, out, cache)
    *_, finite, out, _ = lax.while_loop(unfinished, advance, carry)
    return out, finite
