"""Softmax attention with grouped key-value heads: XLA's, cuDNN's, the TPU's, and one for CPUs."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh

from genlora_jax.models import splash

Attention = Literal["auto", "xla", "cudnn", "cudnn_vmap", "blocks", "splash"]
Array = jax.Array

# Queries a block: few enough for their scores to fit a core's cache, and no more than this many
# blocks a row, since each is compiled.
BLOCK, MOST_BLOCKS = 32, 16


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    implementation: Attention,
    *,
    segments: Array | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Softmax attention.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: `[batch, slots, kv_heads, head_dim]`.
        v: As k.
        mask: Bool `[batch or 1, 1, length, slots]`, True where a query sees a key, and False
            wherever a key comes after its query; None for just that.
        implementation: `"xla"`; `"cudnn"` (GPUs, even lengths, half precision); `"cudnn_vmap"`
            (the same under `vmap`, see `attend_as_one_batch`); `"splash"` (TPUs, lengths in
            multiples of 128; elsewhere interpreted, for tests); `"blocks"` (see
            `attend_in_blocks`); `"auto"`: `"splash"` on TPUs where it can be, `"blocks"` on a
            CPU, else `"xla"`.
        segments: Int `[batch, length]` if the mask says no more than that tokens see what comes
            before them in their own segment.
        mesh: Devices over which batch and heads are cut.

    Returns:
        `[batch, length, heads, head_dim]`.

    Raises:
        ValueError: If splash attention is asked for and does not suit.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    suits = segments is not None and splash.suits(q, k, mesh)
    if implementation == "auto":
        implementation = "blocks" if platform == "cpu" and mesh is None else "xla"
        if platform == "tpu" and suits:
            implementation = "splash"
    if q.shape[1] != k.shape[1]:  # with a key-value cache; a handful of queries at most
        implementation = "xla"
    if implementation == "splash":
        if not suits or segments is None:
            raise ValueError(
                f"attention splash takes no {q.shape[0]} rows of {q.shape[1]} tokens and "
                f"{k.shape[2]} heads here (multiples of {splash.LANES} tokens, of the mesh's "
                "sizes, and no sliding window): take auto"
            )
        return splash.splash(q, k, v, segments, mesh, interpret=platform != "tpu")
    if implementation == "blocks":
        return attend_in_blocks(q, k, v, mask)
    if implementation == "cudnn_vmap":
        return attend_as_one_batch(q, k, v, mask)
    return _attend_plainly(q, k, v, mask, implementation)


def _attend_plainly(q: Array, k: Array, v: Array, mask: Array | None, implementation: Any) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=mask is None, implementation=implementation
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_as_one_batch(
    q: Array, k: Array, v: Array, mask: Array | None, implementation: str = "cudnn"
) -> Array:
    """Attention whose `vmap` makes one larger batch of rows.

    cuDNN's own batching takes no mask that is the same for all heads. The backward pass runs the
    forward kernel again, which `remat` does anyway.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: `[batch, length, kv_heads, head_dim]`.
        v: As k.
        mask: As for `attend`.
        implementation: As for `jax.nn.dot_product_attention`.

    Returns:
        `[batch, length, heads, head_dim]`.
    """
    return _one_batch_forward(q, k, v, mask, implementation)[0]


def _one_batch_forward(
    q: Array, k: Array, v: Array, mask: Array | None, implementation: str
) -> tuple[Array, Any]:
    if mask is not None:
        mask = jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))

    def run(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        attention = functools.partial(_attend_plainly, mask=mask, implementation=implementation)
        # As the backward pass runs it, so that under remat the compiler sees one call, not two.
        return jax.vjp(attention, q, k, v)[0]

    return _rows_together(run)(q, k, v, mask), (q, k, v, mask)


def _one_batch_backward(implementation: str, residuals: Any, d_out: Array) -> Any:
    def run(q: Array, k: Array, v: Array, mask: Array | None, d_out: Array) -> Any:
        attention = functools.partial(_attend_plainly, mask=mask, implementation=implementation)
        return jax.vjp(attention, q, k, v)[1](d_out)

    return (*_rows_together(run)(*residuals, d_out), None)


attend_as_one_batch.defvjp(_one_batch_forward, _one_batch_backward)


def _rows_together(function: Any) -> Any:
    """A function of arrays `[rows, ...]` that under `vmap` is called once, with all rows."""
    wrapped = custom_vmap(function)

    @wrapped.def_vmap
    def rule(size: int, batched: Any, *operands: Any) -> Any:
        def merge(x: Array, has: bool) -> Array:
            x = x if has else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = wrapped(*jax.tree.map(merge, operands, tuple(batched)))
        apart = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return apart, jax.tree.map(lambda _: True, out)

    return wrapped


def attend_in_blocks(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention a row and a block of queries at a time, each against the keys up to its last.

    Whole scores are several times a CPU's cache, and half of them are masked. Here they stay in
    the cache, the masked half is skipped, and the backward pass recomputes them.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: `[batch, length, kv_heads, head_dim]`.
        v: As k.
        mask: As for `attend`.

    Returns:
        `[batch, length, heads, head_dim]`.
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
        within = functools.partial(
            jax.lax.slice_in_dim, start_index=start, limit_index=stop, axis=2
        )
        weights = jnp.exp(_scores(q, k, mask, start, stop) - within(norm))
        d_v = d_v.at[:, :stop].add(
            _product("grts,grtd->gsd", weights.astype(v.dtype), within(d_out))
        )
        d_weights = _product("grtd,gsd->grts", within(d_out), v[:, :stop])
        d_scores = (weights * (d_weights - within(dot)) * scale).astype(q.dtype)
        d_qs.append(_product("grts,gsd->grtd", d_scores, k[:, :stop]))
        d_k = d_k.at[:, :stop].add(_product("grts,grtd->gsd", d_scores, within(q)))
    d_q = jnp.concatenate(d_qs, axis=2).astype(q.dtype)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_row.defvjp(_row_forward, _row_backward)
