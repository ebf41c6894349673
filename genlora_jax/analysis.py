"""What an adapter costs and what its deltas look like: pure functions of factors."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from genlora_jax.adapter import Adapter
from genlora_jax.factors import LOW_RANK, by_module
from genlora_jax.factors.kind import exact_matmul
from genlora_jax.factors.low_rank import low_rank_singular_values
from genlora_jax.targets import Target

singular_values = low_rank_singular_values


def decompose(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Singular value decomposition `U diag(s) V^T` of the delta `A @ B`, without forming it.

    The largest element of each column of U is positive. The result thus depends on the delta
    alone, not on how it is split into A and B.

    Args:
        a: `[..., d_in, r]`.
        b: `[..., r, d_out]`.

    Returns:
        Float32 U `[..., d_in, k]`, s `[..., k]` (largest first) and V `[..., d_out, k]`, where k
        is min(r, d_in, d_out).
    """
    a, b = (jnp.asarray(side, jnp.float32) for side in (a, b))
    with jax.default_matmul_precision("highest"):
        return svd_of_product(jnp, a, b)


def svd_of_product(xp: Any, a: Any, b: Any) -> tuple[Any, Any, Any]:
    """`decompose` in the dtype of a and b, which are arrays of `xp`, NumPy or `jax.numpy`."""
    left, left_core = xp.linalg.qr(a)
    right, right_core = xp.linalg.qr(b.mT)
    u, s, vt = xp.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    u, v = left @ u, right @ vt.mT
    largest = xp.take_along_axis(u, xp.abs(u).argmax(-2, keepdims=True), axis=-2)
    sign = xp.where(largest < 0, -1.0, 1.0)
    return u * sign, s, v * sign


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


def stable_rank(values: jax.Array) -> jax.Array:
    """Squared Frobenius norm over squared spectral norm; 0 where all values are zero.

    Args:
        values: Singular values `[..., k]`, largest first.

    Returns:
        `[...]`, float32.
    """
    largest = values[..., :1]
    return jnp.square(values / jnp.where(largest > 0, largest, 1.0)).sum(-1)


def count_above(values: jax.Array, threshold: float = 0.01) -> jax.Array:
    """Number of singular values above a share of the largest: the rank for practical purposes.

    Args:
        values: Singular values `[..., k]`, largest first.
        threshold: The share of the largest.

    Returns:
        `[...]`, int32.
    """
    return (values > threshold * values[..., :1]).sum(-1, dtype=jnp.int32)


def subspace_overlap(
    first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
) -> dict[str, jax.Array]:
    """How much of one delta's top singular subspace another's contains (LoRA paper, section 7.2).

    `phi(i, j) = |U_i^T U'_j|_F^2 / min(i, j)` for the top i and top j singular vectors: 0 where
    the subspaces are orthogonal, 1 where one contains the other. It depends on the deltas alone.

    Args:
        first: `a` `[..., d_in, r]` and `b` `[..., r, d_out]` of one delta.
        second: The factors of another delta of the same shape, of any rank.

    Returns:
        `{"a": phi, "b": phi}` on the side of the inputs and of the outputs, float32 `[..., k, k']`
        with phi(i, j) at `[..., i - 1, j - 1]`.
    """
    u, _, v = decompose(*first)
    other_u, _, other_v = decompose(*second)
    overlap = {}
    for side, left, right in (("a", u, other_u), ("b", v, other_v)):
        cosines = exact_matmul(left.swapaxes(-1, -2), right)
        shared = jnp.square(cosines).cumsum(-1).cumsum(-2)
        i, j = (jnp.arange(1.0, size + 1) for size in shared.shape[-2:])
        smaller = jnp.minimum(i[:, None], j[None])
        overlap[side] = shared / jnp.broadcast_to(smaller, shared.shape)
    return overlap


def target_factors(factors: Mapping[str, Any], target: Target) -> tuple[jax.Array, jax.Array]:
    """The factors of a target, one layer after the other.

    Args:
        factors: Tree of factors.
        target: A target of the adapter or base that they belong to.

    Returns:
        `a` `[L, d_in, r]` and `b` `[L, r, d_out]`, padded with zeros to the largest rank.

    Raises:
        ValueError: If a layer of the target has no factors, or none that are A and B.
    """
    modules = by_module(factors)
    sides: dict[str, list[jax.Array]] = {"a": [], "b": []}
    for kernel in target.kernels:
        name = ".".join(kernel.path)
        if kernel.path not in modules:
            raise ValueError(f"no factors for {name}: leave it out of the targets")
        kind, leaves = modules[kernel.path]
        if not set(LOW_RANK.axes) <= set(leaves):
            raise ValueError(
                f"{name} has a {kind.option or kind.name} change, which is no product of A and B: "
                "its delta has no factors of that rank"
            )
        for side, layers in sides.items():
            value = jnp.asarray(leaves[side])
            layers.append(value[None] if kernel.stack is None else value[jnp.array(kernel.layers)])
    rank = max(a.shape[-1] for a in sides["a"])
    a = [jnp.pad(x, ((0, 0), (0, 0), (0, rank - x.shape[2]))) for x in sides["a"]]
    b = [jnp.pad(x, ((0, 0), (0, rank - x.shape[1]), (0, 0))) for x in sides["b"]]
    return jnp.concatenate(a), jnp.concatenate(b)


def parameters_by_target(adapter: Adapter) -> dict[str, int]:
    """Number of trained values by target; `shared` counts those that serve several targets."""
    counts = {target.name: 0 for target in adapter.spec.targets}
    for path, leaf in flatten_dict(adapter.trainable).items():
        name = next((part for part in path if part in counts), "shared")
        counts[name] = counts.get(name, 0) + leaf.size
    return counts
