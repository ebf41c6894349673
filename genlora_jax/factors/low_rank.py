"""LoRA's factors: the delta is the product of A and B."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from genlora_jax.factors.kind import DenseCall, Kind, Leaves, exact_matmul


def low_rank_change(call: DenseCall, leaves: Leaves) -> jax.Array:
    """`x A B` in the dtype of the output, by way of the factors."""
    a, b = (leaves[leaf].astype(call.x.dtype) for leaf in ("a", "b"))
    if call.adapter_index is None:
        product = times if call.product is None else call.product
        return product(call.times(call.x, a), b)
    a, b = a[call.adapter_index], b[call.adapter_index]
    return jnp.einsum("n...i,nir,nro->n...o", call.x, a, b, optimize="optimal")


@jax.custom_vjp
def times(x: jax.Array, b: jax.Array) -> jax.Array:
    """`x @ b`, whose gradient of b transposes x, which is narrow, and not the output's gradient.

    JAX's own does the latter, and on CPUs that was a fifth of a step.
    """
    return x @ b


def _forward(x: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ b, (x, b)


def _backward(
    kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, b = kept
    tokens = tuple(range(x.ndim - 1))
    of_b = jax.lax.dot_general(x, gradient, ((tokens, tokens), ((), ())))
    return gradient @ b.T, of_b


times.defvjp(_forward, _backward)


def low_rank_singular_values(a: jax.Array, b: jax.Array) -> jax.Array:
    """Singular values of `A @ B`, largest first, without forming it.

    Args:
        a: `[..., d_in, r]`.
        b: `[..., r, d_out]`.

    Returns:
        Float32 `[..., min(r, d_in, d_out)]`.
    """
    left = jnp.linalg.qr(a.astype(jnp.float32), mode="r")
    right = jnp.linalg.qr(b.astype(jnp.float32).swapaxes(-1, -2), mode="r")
    core = exact_matmul(left, right.swapaxes(-1, -2))
    return jnp.linalg.svd(core, compute_uv=False)


class LowRank(Kind):
    """`a` `[..., d_in, r]` and `b` `[..., r, d_out]`; the scale is folded into b."""

    name = "LoRA"
    axes: ClassVar = {"a": ("in", "rank"), "b": ("rank", "out")}
    scaled = "b"
    combines = True
    peft: ClassVar = {"a": ("lora_A.weight", True), "b": ("lora_B.weight", True)}

    def output(self, call: DenseCall, leaves: Leaves) -> jax.Array:
        return call.y + low_rank_change(call, leaves)

    def merge(self, kernel: jax.Array, leaves: Leaves) -> jax.Array:
        return kernel + exact_matmul(leaves["a"], leaves["b"])

    def unmerge(self, kernel: jax.Array, leaves: Leaves) -> jax.Array:
        return kernel - exact_matmul(leaves["a"], leaves["b"])

    def singular_values(self, leaves: Leaves) -> jax.Array:
        return low_rank_singular_values(leaves["a"], leaves["b"])


LOW_RANK = LowRank()
