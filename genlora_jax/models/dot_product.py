"""Attention of `jax.nn`, and a form of it whose `vmap` makes one larger batch.

JAX's batching rule of cuDNN attention refuses a mask that is the same for all heads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

Array = jax.Array


def plain_attention(q: Array, k: Array, v: Array, mask: Array | None, implementation: Any) -> Array:
    """`jax.nn.dot_product_attention`, causal where there is no mask; as `attention.attend`."""
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=mask is None, implementation=implementation
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_as_one_batch(
    q: Array, k: Array, v: Array, mask: Array | None, implementation: str = "cudnn"
) -> Array:
    """Attention whose `vmap` makes one larger batch of rows.

    The backward pass runs the forward pass again, which `remat` does anyway.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: `[batch, length, kv_heads, head_dim]`.
        v: Like k.
        mask: As for `attention.attend`.
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
        attention = functools.partial(plain_attention, mask=mask, implementation=implementation)
        # The backward pass runs it in this form. Under remat the compiler then sees one call.
        return jax.vjp(attention, q, k, v)[0]

    return _fold_vmap_into_rows(run)(q, k, v, mask), (q, k, v, mask)


def _one_batch_backward(implementation: str, residuals: Any, d_out: Array) -> Any:
    def run(q: Array, k: Array, v: Array, mask: Array | None, d_out: Array) -> Any:
        attention = functools.partial(plain_attention, mask=mask, implementation=implementation)
        return jax.vjp(attention, q, k, v)[1](d_out)

    return (*_fold_vmap_into_rows(run)(*residuals, d_out), None)


attend_as_one_batch.defvjp(_one_batch_forward, _one_batch_backward)


def _fold_vmap_into_rows(function: Any) -> Any:
    """A function of arrays `[rows, ...]` that under `vmap` is called once, with all rows."""
    wrapped = custom_vmap(function)

    @wrapped.def_vmap
    def rule(size: int, batched: Any, *operands: Any) -> Any:
        def fold(x: Array, has_axis: bool) -> Array:
            x = x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = wrapped(*jax.tree.map(fold, operands, tuple(batched)))
        unfolded = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return unfolded, jax.tree.map(lambda _: True, out)

    return wrapped
