"""Attention for CPUs: a row and a block of queries at a time.

Whole scores are several times a CPU's cache, and half of them are masked. Here they stay in the
cache, the masked half is skipped, and the backward pass recomputes them.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

# Queries a block: few enough that their scores fit a core's cache. Blocks a row: few, since each
# of them is compiled.
BLOCK, MOST_BLOCKS = 64, 16


def attend_in_blocks(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention of a block of queries at a time, each block with the keys up to its last query.

    Arrays are as for `attention.attend`, with as many keys as queries.
    """
    length, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    q = q.reshape(*q.shape[:2], groups, heads // groups, q.shape[3]).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, 0], (q.shape[0], length, length))
    out = jax.lax.map(lambda row: _row(*row), (q, k, v, mask))
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape[0], length, heads, -1)


def _blocks(length: int) -> list[tuple[int, int]]:
    size = max(BLOCK, -(-length // MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _product(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, mask: Array | None, start: int, stop: int) -> Array:
    """Scaled and masked scores `[groups, repeats, stop - start, stop]`, float32."""
    scores = _product("grtd,gsd->grts", q[:, :, start:stop], k[:, :stop]) * q.shape[-1] ** -0.5
    if mask is None:
        visible = jnp.arange(stop)[None] <= jnp.arange(start, stop)[:, None]
    else:
        visible = mask[start:stop, :stop]
    return jnp.where(visible[None, None], scores, jnp.finfo(jnp.float32).min)


@jax.custom_vjp
def _row(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """One row of a batch: q `[groups, repeats, length, dim]`, k and v `[groups, length, dim]`."""
    return _row_forward(q, k, v, mask)[0]


def _row_forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Any]:
    outs, norms = [], []
    for start, stop in _blocks(q.shape[2]):
        scores = _scores(q, k, mask, start, stop)
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(axis=-1, keepdims=True)
        out = _product("grts,gsd->grtd", weights.astype(v.dtype), v[:, :stop]) / total
        outs.append(out.astype(q.dtype))
        norms.append(peak + jnp.log(total))
    out, norm = jnp.concatenate(outs, axis=2), jnp.concatenate(norms, axis=2)
    return out, (q, k, v, mask, out, norm)


def _row_backward(residuals: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, out, norm = residuals
    dot = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    scale = q.shape[-1] ** -0.5
    d_qs, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, stop in _blocks(q.shape[2]):
        rows = slice(start, stop)
        weights = jnp.exp(_scores(q, k, mask, start, stop) - norm[:, :, rows])
        d_v = d_v.at[:, :stop].add(
            _product("grts,grtd->gsd", weights.astype(v.dtype), d_out[:, :, rows])
        )
        d_weights = _product("grtd,gsd->grts", d_out[:, :, rows], v[:, :stop])
        d_scores = (weights * (d_weights - dot[:, :, rows]) * scale).astype(q.dtype)
        d_qs.append(_product("grts,gsd->grtd", d_scores, k[:, :stop]))
        d_k = d_k.at[:, :stop].add(_product("grts,grtd->gsd", d_scores, q[:, :, rows]))
    d_q = jnp.concatenate(d_qs, axis=2).astype(q.dtype)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_row.defvjp(_row_forward, _row_backward)
