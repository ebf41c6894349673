"""What factors are at one module: A and B, perhaps with a magnitude, or a whole delta."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

LEAVES = ("a", "b", "magnitude", "delta")
KINDS = ({"a", "b"}, {"a", "b", "magnitude"}, {"delta"})
EXACT = jax.lax.Precision.HIGHEST
Module = dict[str, Any]


def by_module(factors: Mapping[str, Any]) -> dict[tuple[str, ...], Module]:
    """The leaves of each module, by its path.

    Raises:
        ValueError: If a module's leaves are no factors.
    """
    modules: dict[tuple[str, ...], Module] = {}
    for path, leaf in flatten_dict(dict(factors)).items():
        modules.setdefault(path[:-1], {})[path[-1]] = leaf
    for path, own in modules.items():
        if set(own) not in KINDS:
            raise ValueError(
                f"factors of {'.'.join(path)} hold {sorted(own)}, not a and b, nor these with a "
                "magnitude, nor a delta alone"
            )
    return modules


def refuse_other_than_products(factors: Mapping[str, Any], what: str) -> None:
    """Raises ValueError if some factors are more than A and B, the only ones that `what` takes."""
    for path, own in by_module(factors).items():
        for leaf, method in (("magnitude", "DoRA"), ("delta", "full fine-tuning")):
            if leaf in own:
                raise ValueError(
                    f"{what} takes A and B alone; {'.'.join(path)} has a {leaf} ({method}): "
                    "merge it into the base instead"
                )


def fits(own: Module, shape: tuple[int, ...]) -> bool:
    """Whether a module's leaves are those of a kernel of this shape."""
    *lead, d_in, d_out = shape
    if "delta" in own:
        return own["delta"].shape == tuple(shape)
    rank = own["a"].shape[-1]
    expected = {"a": (*lead, d_in, rank), "b": (*lead, rank, d_out), "magnitude": (*lead, d_out)}
    return all(leaf.shape == expected[name] for name, leaf in own.items())


def describe(own: Module) -> str:
    """The shapes of a module's leaves, in words."""
    return " and ".join(str(own[leaf].shape) for leaf in LEAVES if leaf in own)


def delta(own: Module) -> jax.Array:
    """The delta of a module, float32, before its magnitude."""
    if "delta" in own:
        return own["delta"].astype(jnp.float32)
    a, b = (own[side].astype(jnp.float32) for side in "ab")
    return jnp.matmul(a, b, precision=EXACT)


def column_norm(kernel: jax.Array) -> jax.Array:
    """Norms of a kernel's columns, `[..., d_in, d_out]` -> `[..., d_out]`, float32."""
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(-2))


def adapted_column_norm(kernel: jax.Array, own: Module) -> jax.Array:
    """`column_norm` of the kernel and its delta together, without forming their sum.

    The square for `w + A b` is that for `w`, plus `2 (A^T w) b`, plus `b (A^T A) b`: products of r
    rows, exact to float32 rounding unless the delta undoes the kernel.
    """
    w, a, b = (x.astype(jnp.float32) for x in (kernel, own["a"], own["b"]))
    cross = 2 * jnp.matmul(a.mT, w, precision=EXACT)
    gram = jnp.matmul(jnp.matmul(a.mT, a, precision=EXACT), b, precision=EXACT)
    square = jnp.square(w).sum(-2) + ((cross + gram) * b).sum(-2)
    return jnp.sqrt(jnp.maximum(square, 0.0))


def column_scale(magnitude: jax.Array, norm: jax.Array) -> jax.Array:
    """What columns of this norm are multiplied with to have this magnitude, float32.

    No column is multiplied with 0: a magnitude of 0 is that of a layer that is not adapted.
    """
    return jnp.where(magnitude == 0, 1.0, magnitude / jnp.where(norm > 0, norm, 1.0))
