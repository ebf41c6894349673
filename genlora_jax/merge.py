"""Merging: adds the delta `A @ B` to the base's kernels, in float32, cast last."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax import merge_kernel

Path = tuple[str, ...]


def merge(params: Mapping[str, Any], factors: Mapping[str, Any], *, donate: bool = False) -> Any:
    """The base's parameters with the factors' deltas added to their kernels.

    Args:
        params: The base's parameters, of any float dtype.
        factors: Tree that mirrors `params`, with `a` `[..., d_in, r]` and `b` `[..., r, d_out]`
            at adapted modules.
        donate: Reuse the memory of the adapted kernels: `params` is unusable afterwards.

    Returns:
        A new tree. Kernels without factors are those of `params`, not copies.

    Raises:
        ValueError: If the factors do not fit the base's kernels.
    """
    return _add(params, factors, 1.0, donate)


def unmerge(merged: Mapping[str, Any], factors: Mapping[str, Any], *, donate: bool = False) -> Any:
    """Inverse of `merge`, up to rounding.

    A float32 base comes back to float32 rounding; a bfloat16 one to one rounding of the merged
    kernel, half of 2^-7 of its magnitude at most, since the merge itself was rounded to that.

    Args:
        merged: Result of `merge`.
        factors: The factors that were merged.
        donate: As for `merge`.

    Returns:
        The base's parameters.
    """
    return _add(merged, factors, -1.0, donate)


def _add(params: Mapping[str, Any], factors: Mapping[str, Any], sign: float, donate: bool) -> Any:
    flat = flatten_dict(dict(params))
    kernels, sides = pair_kernels(flat, factors)
    # A kernel a program: each needs memory of its own only while it runs, and the parameters
    # without factors are neither copied nor donated.
    merged = {
        path: _merge_one(kernel, *sides[path], sign, donate) for path, kernel in kernels.items()
    }
    return unflatten_dict(flat | merged)


def _merge_one(kernel: Any, a: Any, b: Any, sign: float, donate: bool) -> Any:
    platform = _platform(kernel)
    if platform == "cpu" and kernel.ndim == 3:
        # In one program XLA would copy a whole bfloat16 stack on CPUs before it writes to it.
        kernel = kernel if donate else jnp.copy(kernel)
        for i in range(kernel.shape[0]):
            kernel = _write_layer(kernel, _merge_layer(kernel, a, b, i, sign), i)
        return kernel
    program = _merge_donating if donate else _merge_copying
    return program(kernel, a, b, sign, platform == "gpu")


def _platform(kernel: Any) -> str | None:
    """The platform of a concrete array on one device; None for what XLA has to partition."""
    if not isinstance(kernel, jax.Array) or isinstance(kernel, jax.core.Tracer):
        return None
    devices = kernel.devices()
    return next(iter(devices)).platform if len(devices) == 1 else None


def pair_kernels(
    flat: Mapping[Path, Any], factors: Mapping[str, Any]
) -> tuple[dict[Path, Any], dict[Path, tuple[Any, Any]]]:
    """Matches factors with the kernels that they belong to.

    Args:
        flat: Flattened parameters.
        factors: Tree of factors.

    Returns:
        Kernels and (a, b), both by the kernels' paths.

    Raises:
        ValueError: If a kernel is missing or of another shape.
    """
    sides: dict[Path, dict[str, Any]] = {}
    for path, leaf in flatten_dict(dict(factors)).items():
        sides.setdefault((*path[:-1], "kernel"), {})[path[-1]] = leaf
    kernels, pairs = {}, {}
    for path, pair in sides.items():
        name = ".".join(path[:-1])
        if path not in flat:
            raise ValueError(f"factors for {name}, which has no kernel in these parameters")
        if set(pair) != {"a", "b"}:
            raise ValueError(f"factors of {name} hold {sorted(pair)}, not a and b")
        a, b = pair["a"], pair["b"]
        shape = (*a.shape[:-1], b.shape[-1])
        if shape != flat[path].shape or a.shape[-1] != b.shape[-2]:
            raise ValueError(
                f"factors of {name} have shapes {a.shape} and {b.shape}; "
                f"the kernel has {flat[path].shape}"
            )
        kernels[path], pairs[path] = flat[path], (a, b)
    return kernels, pairs


def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array, sign: float) -> jax.Array:
    delta = jnp.matmul(
        a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return (kernel.astype(jnp.float32) + sign * delta).astype(kernel.dtype)


def _merge(
    kernel: jax.Array, a: jax.Array, b: jax.Array, sign: float, on_one_gpu: bool
) -> jax.Array:
    if on_one_gpu and merge_kernel.fits(kernel.shape):
        return merge_kernel.add_product(kernel, a, b, sign=sign)
    if kernel.ndim == 2:
        return _sum(kernel, a, b, sign)

    # A layer at a time, in place: the float32 delta of a whole stack would outweigh the model.
    def layer(i: jax.Array, kernel: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_index_in_dim(kernel, i, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(kernel, _sum(own, a[i], b[i], sign), i, 0)

    return jax.lax.fori_loop(0, kernel.shape[0], layer, kernel)


@functools.partial(jax.jit, static_argnames="sign")
def _merge_layer(
    kernel: jax.Array, a: jax.Array, b: jax.Array, i: jax.Array, sign: float
) -> jax.Array:
    return _sum(kernel[i], a[i], b[i], sign)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(kernel: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(kernel, layer, i, 0)


_STATIC = ("sign", "on_one_gpu")
_merge_copying = functools.partial(jax.jit, static_argnames=_STATIC)(_merge)
_merge_donating = functools.partial(jax.jit, static_argnames=_STATIC, donate_argnums=0)(_merge)
