"""Merging: brings the factors into the base's kernels, in float32, cast last."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.base.kernel import read_kernel
from genlora_jax.base.stored import StoredKernel
from genlora_jax.factors import LOW_RANK, by_module
from genlora_jax.factors.kind import Kind, Leaves
from genlora_jax.targets import kernel_path, refuse_other_than_dense


def merge(params: Mapping[str, Any], factors: Mapping[str, Any], *, donate: bool = False) -> Any:
    """The base's parameters with the factors merged into their kernels.

    LoRA's delta is added, and so is a whole one. DoRA then brings the columns of the sum to its
    magnitudes. HiRA (`hadamard=True`) multiplies the kernel's elements with 1 plus its gain.

    Args:
        params: The base's parameters, of any float dtype. A quantised kernel is dequantised: the
            result has an array of its `dtype` in its place, and so has that of `unmerge`.
        factors: Tree that mirrors `params`, as `generate_factors` returns it.
        donate: Reuse the memory of the adapted kernels: `params` is unusable afterwards.

    Returns:
        A new tree. Kernels without factors are those of `params`, not copies.

    Raises:
        ValueError: If the factors do not fit the base's kernels.
    """
    return _map_kernels(params, factors, "merge", donate)


def unmerge(merged: Mapping[str, Any], factors: Mapping[str, Any], *, donate: bool = False) -> Any:
    """Inverse of `merge`, up to rounding.

    A float32 base comes back to float32 rounding. A bfloat16 one comes back to one rounding of the
    merged kernel, at most half of 2^-7 of its magnitude, since the merge itself was rounded to
    that. Elements that a gain (`hadamard=True`) of exactly -1 made 0 stay 0.

    Args:
        merged: Result of `merge`.
        factors: The factors that were merged.
        donate: As for `merge`.

    Returns:
        The base's parameters.

    Raises:
        ValueError: If the factors do not fit the kernels, or are DoRA's.
    """
    return _map_kernels(merged, factors, "unmerge", donate)


def _map_kernels(
    params: Mapping[str, Any], factors: Mapping[str, Any], operation: str, donate: bool
) -> Any:
    flat = flatten_dict(dict(params))
    pairs = pair_kernels(flat, factors)
    changed = {}
    # A kernel a program: each needs memory of its own only while it runs, and the parameters
    # without factors are neither copied nor donated.
    for path, (kernel, kind, leaves) in pairs.items():
        try:
            changed[path] = _change_one(kernel, kind, leaves, operation, donate)
        except ValueError as error:
            raise ValueError(f"{operation}: {'.'.join(path[:-1])} {error}") from None
    return unflatten_dict(flat | changed)


def pair_kernels(
    flat: Mapping[tuple[str, ...], Any], factors: Mapping[str, Any]
) -> dict[tuple[str, ...], tuple[Any, Kind, Leaves]]:
    """Matches factors with the kernels that they belong to.

    Args:
        flat: Flattened parameters.
        factors: Tree of factors.

    Returns:
        A kernel, the kind of its factors and their leaves, by the kernel's path.

    Raises:
        ValueError: If a kernel is missing, of another shape, or not a Dense's.
    """
    pairs = {}
    for module, (kind, leaves) in by_module(factors).items():
        path, name = kernel_path(module), ".".join(module)
        if path not in flat:
            raise ValueError(f"factors for {name}, which has no kernel in these parameters")
        if not kind.fits(leaves, flat[path].shape):
            raise ValueError(
                f"factors of {name} have shapes {kind.describe(leaves)}; "
                f"the kernel has {flat[path].shape}"
            )
        refuse_other_than_dense(module, flat)
        pairs[path] = (flat[path], kind, leaves)
    return pairs


def _change_one(kernel: Any, kind: Kind, leaves: Leaves, operation: str, donate: bool) -> Any:
    platform, quantised = _platform(kernel), isinstance(kernel, StoredKernel)
    if platform == "cpu" and kernel.ndim == 3:
        # In one program XLA would copy a whole bfloat16 stack on CPUs before it writes to it.
        if quantised:
            changed = jnp.zeros(kernel.shape, kernel.dtype)
        else:
            changed = kernel = kernel if donate else jnp.copy(kernel)
        for i in range(kernel.shape[0]):
            layer = _change_layer(kernel if quantised else changed, leaves, i, kind, operation)
            changed = _write_layer(changed, layer, i)
        return changed
    program = _change_donating if donate and not quantised else _change_copying
    return program(kernel, leaves, kind, operation, platform == "gpu")


def _platform(kernel: Any) -> str | None:
    """The platform of a concrete array on one device; None for what XLA has to partition."""
    part = jax.tree.leaves(kernel)[0]
    if not isinstance(part, jax.Array) or isinstance(part, jax.core.Tracer):
        return None
    devices = part.devices()
    return next(iter(devices)).platform if len(devices) == 1 else None


def _changed(kernel: Any, leaves: Leaves, kind: Kind, operation: str) -> jax.Array:
    changed: jax.Array = getattr(kind, operation)(read_kernel(kernel, jnp.float32), leaves)
    return changed.astype(kernel.dtype)


def _layer(leaves: Leaves, i: Any) -> Leaves:
    return {leaf: value[i] for leaf, value in leaves.items()}


def _change(kernel: Any, leaves: Leaves, kind: Kind, operation: str, on_one_gpu: bool) -> jax.Array:
    quantised = isinstance(kernel, StoredKernel)
    if on_one_gpu and kind is LOW_RANK and not quantised:
        from genlora_jax import merge_gpu  # here, since Pallas takes a second to import

        if merge_gpu.fits(kernel.shape):
            sign = 1.0 if operation == "merge" else -1.0
            return merge_gpu.add_product(kernel, leaves["a"], leaves["b"], sign=sign)
    if kernel.ndim == 2:
        return _changed(kernel, leaves, kind, operation)

    # A layer at a time, in place: the float32 delta of a whole stack would outweigh the model.
    def layer(i: jax.Array, changed: jax.Array) -> jax.Array:
        before = kernel[i] if quantised else changed[i]
        after = _changed(before, _layer(leaves, i), kind, operation)
        return jax.lax.dynamic_update_index_in_dim(changed, after, i, 0)

    start = jnp.zeros(kernel.shape, kernel.dtype) if quantised else kernel
    return jax.lax.fori_loop(0, kernel.shape[0], layer, start)


@functools.partial(jax.jit, static_argnames=("kind", "operation"))
def _change_layer(
    kernel: Any, leaves: Leaves, i: jax.Array, kind: Kind, operation: str
) -> jax.Array:
    return _changed(kernel[i], _layer(leaves, i), kind, operation)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(kernel: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(kernel, layer, i, 0)


_STATIC = ("kind", "operation", "on_one_gpu")
_change_copying = functools.partial(jax.jit, static_argnames=_STATIC)(_change)
_change_donating = functools.partial(jax.jit, static_argnames=_STATIC, donate_argnums=0)(_change)
