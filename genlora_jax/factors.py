"""What factors are at one module.

A and B, perhaps with a magnitude; A and B of a gain that multiplies the kernel; or a whole delta.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

LEAVES = ("a", "b", "magnitude", "gain_a", "gain_b", "delta")
KINDS = ({"a", "b"}, {"a", "b", "magnitude"}, {"gain_a", "gain_b"}, {"delta"})
SCALED = ("b", "gain_b")  # what carries the scale
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
                "magnitude, nor gain_a and gain_b, nor a delta alone"
            )
    return modules


def refuse_other_than_products(factors: Mapping[str, Any], what: str) -> None:
    """Raises ValueError if some factors are more than A and B, the only ones that `what` takes."""
    for path, own in by_module(factors).items():
        for leaf, method in (
            ("magnitude", "DoRA"),
            ("gain_a", "hadamard=True"),
            ("delta", "full fine-tuning"),
        ):
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
    rank = side_a(own).shape[-1]
    a, b = (*lead, d_in, rank), (*lead, rank, d_out)
    expected = {"a": a, "b": b, "magnitude": (*lead, d_out), "gain_a": a, "gain_b": b}
    return all(leaf.shape == expected[name] for name, leaf in own.items())


def side_a(own: Module) -> Any:
    """A module's A, `[..., d_in, r]`, of its delta or of its gain."""
    return own["gain_a" if "gain_a" in own else "a"]


def describe(own: Module) -> str:
    """The shapes of a module's leaves, in words."""
    return " and ".join(str(own[leaf].shape) for leaf in LEAVES if leaf in own)


def in_dtype(factors: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """A tree of factors in the dtype in which layers use them; norms need float32 (magnitudes)."""
    flat = {
        (*path, leaf): value if "magnitude" in own else value.astype(dtype)
        for path, own in by_module(factors).items()
        for leaf, value in own.items()
    }
    return unflatten_dict(flat)


def adapted(kernel: jax.Array, own: Module) -> jax.Array:
    """A kernel with a module's factors in it, float32."""
    whole = kernel.astype(jnp.float32)
    if "gain_a" in own:
        return whole * (1 + _product(own["gain_a"], own["gain_b"]))
    whole += _delta(own)
    if "magnitude" in own:
        whole *= column_scale(own["magnitude"], column_norm(whole))
    return whole


def base_of(kernel: jax.Array, own: Module) -> jax.Array:
    """Inverse of `adapted`, but for magnitudes, and for elements that became 0 and stay so."""
    whole = kernel.astype(jnp.float32)
    if "gain_a" in own:
        gain = 1 + _product(own["gain_a"], own["gain_b"])
        return whole / jnp.where(gain == 0, 1.0, gain)
    return whole - _delta(own)


def _delta(own: Module) -> jax.Array:
    if "delta" in own:
        return own["delta"].astype(jnp.float32)
    return _product(own["a"], own["b"])


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=EXACT)


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
