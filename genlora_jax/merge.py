"""Merging: brings the factors into the base's kernels, in float32, cast last."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax import merge_kernel
from genlora_jax.factors import Module, adapted, base_of, by_module, describe, fits

Path = tuple[str, ...]


def merge(params: Mapping[str, Any], factors: Mapping[str, Any], *, donate: bool = False) -> Any:
    """The base's parameters with the factors' deltas added to their kernels.

    Where there are magnitudes (DoRA), the columns of the sums are then brought to these; where
    there is a gain (`hadamard=True`), the kernel's elements are multiplied with 1 and that.

    Args:
        params: The base's parameters, of any float dtype.
        factors: Tree that mirrors `params`, as `generate_factors` returns it.
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
    kernel, half of 2^-7 of its magnitude at most, since the merge itself was rounded to that. What
    a gain (`hadamard=True`) of exactly -1 made 0 stays 0.

    Args:
        merged: Result of `merge`.
        factors: The factors that were merged.
        donate: As for `merge`.

    Returns:
        The base's parameters.

    Raises:
        ValueError: If the factors do not fit the kernels, or hold magnitudes.
    """
    for path, own in by_module(factors).items():
        if "magnitude" in own:
            raise ValueError(
                f"unmerge: {'.'.join(path)} was merged with a magnitude (DoRA), which leaves no "
                "trace of the kernel's own norms; load the base again"
            )
    return _add(merged, factors, -1.0, donate)


def _add(params: Mapping[str, Any], factors: Mapping[str, Any], sign: float, donate: bool) -> Any:
    flat = flatten_dict(dict(params))
    pairs = pair_kernels(flat, factors)
    # A kernel a program: each needs memory of its own only while it runs, and the parameters
    # without factors are neither copied nor donated.
    merged = {path: _merge_one(kernel, own, sign, donate) for path, (kernel, own) in pairs.items()}
    return unflatten_dict(flat | merged)


def _merge_one(kernel: Any, own: Module, sign: float, donate: bool) -> Any:
    platform = _platform(kernel)
    if platform == "cpu" and kernel.ndim == 3:
        # In one program XLA would copy a whole bfloat16 stack on CPUs before it writes to it.
        kernel = kernel if donate else jnp.copy(kernel)
        for i in range(kernel.shape[0]):
            kernel = _write_layer(kernel, _merge_layer(kernel, own, i, sign), i)
        return kernel
    program = _merge_donating if donate else _merge_copying
    return program(kernel, own, sign, platform == "gpu")


def _platform(kernel: Any) -> str | None:
    """The platform of a concrete array on one device; None for what XLA has to partition."""
    if not isinstance(kernel, jax.Array) or isinstance(kernel, jax.core.Tracer):
        return None
    devices = kernel.devices()
    return next(iter(devices)).platform if len(devices) == 1 else None


def pair_kernels(
    flat: Mapping[Path, Any], factors: Mapping[str, Any]
) -> dict[Path, tuple[Any, Module]]:
    """Matches factors with the kernels that they belong to.

    Args:
        flat: Flattened parameters.
        factors: Tree of factors.

    Returns:
        A kernel and its factors, by the kernel's path.

    Raises:
        ValueError: If a kernel is missing or of another shape.
    """
    pairs = {}
    for module, own in by_module(factors).items():
        path, name = (*module, "kernel"), ".".join(module)
        if path not in flat:
            raise ValueError(f"factors for {name}, which has no kernel in these parameters")
        if not fits(own, flat[path].shape):
            raise ValueError(
                f"factors of {name} have shapes {describe(own)}; the kernel has {flat[path].shape}"
            )
        pairs[path] = (flat[path], own)
    return pairs


def _changed(kernel: jax.Array, own: Module, sign: float) -> jax.Array:
    return (adapted if sign > 0 else base_of)(kernel, own).astype(kernel.dtype)


def _layer(own: Module, i: Any) -> Module:
    return {leaf: value[i] for leaf, value in own.items()}


def _merge(kernel: jax.Array, own: Module, sign: float, on_one_gpu: bool) -> jax.Array:
    if on_one_gpu and set(own) == {"a", "b"} and merge_kernel.fits(kernel.shape):
        return merge_kernel.add_product(kernel, own["a"], own["b"], sign=sign)
    if kernel.ndim == 2:
        return _changed(kernel, own, sign)

    # A layer at a time, in place: the float32 delta of a whole stack would outweigh the model.
    def layer(i: jax.Array, kernel: jax.Array) -> jax.Array:
        before = jax.lax.dynamic_index_in_dim(kernel, i, keepdims=False)
        after = _changed(before, _layer(own, i), sign)
        return jax.lax.dynamic_update_index_in_dim(kernel, after, i, 0)

    return jax.lax.fori_loop(0, kernel.shape[0], layer, kernel)


@functools.partial(jax.jit, static_argnames="sign")
def _merge_layer(kernel: jax.Array, own: Module, i: jax.Array, sign: float) -> jax.Array:
    return _changed(kernel[i], _layer(own, i), sign)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(kernel: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(kernel, layer, i, 0)


_STATIC = ("sign", "on_one_gpu")
_merge_copying = functools.partial(jax.jit, static_argnames=_STATIC)(_merge)
_merge_donating = functools.partial(jax.jit, static_argnames=_STATIC, donate_argnums=0)(_merge)
