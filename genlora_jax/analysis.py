"""What a delta looks like: pure functions of factors."""

import jax
import jax.numpy as jnp


def singular_values(a: jax.Array, b: jax.Array) -> jax.Array:
    """Singular values of the delta `A @ B`, largest first, without forming it.

    Args:
        a: `[..., d_in, r]`.
        b: `[..., r, d_out]`.

    Returns:
        Float32 `[..., min(r, d_in, d_out)]`.
    """
    left = jnp.linalg.qr(a.astype(jnp.float32), mode="r")
    right = jnp.linalg.qr(b.astype(jnp.float32).swapaxes(-1, -2), mode="r")
    core = jnp.matmul(left, right.swapaxes(-1, -2), precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.svd(core, compute_uv=False)


def effective_rank(values: jax.Array) -> jax.Array:
    """Exponential of the entropy of normalised singular values (Roy and Vetterli, 2007).

    It is k for k equal values, and 0 where all are zero.

    Args:
        values: Singular values `[..., k]`.

    Returns:
        `[...]`, float32.
    """
    total = values.sum(axis=-1, keepdims=True)
    share = values / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0).sum(-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)
