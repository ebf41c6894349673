"""Products with a matrix, plain or wide: how a CPU multiplies bfloat16 at its full rate."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Instructions that multiply bfloat16, as Linux calls them. Without them a wide product is slower
# than one of operands converted to float32.
INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}
CPU_INFO = Path("/proc/cpuinfo")
Axes = tuple[int, ...]


def multiplies_wide(dtype: Any, platform: str) -> bool:
    """Whether `wide_product` is the faster one for a dtype on a platform."""
    return platform == "cpu" and jnp.dtype(dtype) == jnp.bfloat16 and _has_instructions(CPU_INFO)


@functools.cache
def _has_instructions(file: Path) -> bool:
    try:
        return not INSTRUCTIONS.isdisjoint(file.read_text().split())
    except OSError:  # not Linux
        return False


def matrix_product(
    x: jax.Array, kernel: jax.Array, axis: int = 0, *, wide: bool = False
) -> jax.Array:
    """`x` `[..., n]` times a kernel `[d_in, d_out]` of the same dtype, over an axis of n.

    `wide` sums in float32, see `wide_product`.
    """
    if wide:
        return wide_product(x, kernel, axis)
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def wide_product(x: jax.Array, kernel: jax.Array, axis: int = 0) -> jax.Array:
    """`matrix_product` of bfloat16, summed in float32 and rounded after, as its gradient is.

    XLA for CPUs uses their instructions for bfloat16 only if the result is float32; else it
    converts the operands to float32 first. JAX's own gradient would have an operand in float32.
    It has no forward mode.
    """
    return _contract(x, kernel, (x.ndim - 1,), (axis,))


def _contract(x: jax.Array, y: jax.Array, of_x: Axes, of_y: Axes) -> jax.Array:
    dimensions = ((of_x, of_y), ((), ()))
    wide = jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
    return wide.astype(x.dtype)


# A scan stacks what its backward pass needs. XLA for CPUs writes float32 into a stack in place, but
# rewrites a whole stack of bfloat16, through float32, at every layer.
def keeping_float32(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function, with a gradient that keeps its inputs in float32.

    The gradient computes the function again, as `jax.checkpoint` would.
    """
    kept = jax.custom_vjp(function)

    def forward(*arrays: jax.Array) -> tuple[jax.Array, Any]:
        return function(*arrays), [x.astype(jnp.float32) for x in arrays]

    def backward(arrays: Any, gradient: jax.Array) -> Any:
        return jax.vjp(function, *(x.astype(gradient.dtype) for x in arrays))[1](gradient)

    kept.defvjp(forward, backward)
    return kept


def _forward(x: jax.Array, kernel: jax.Array, axis: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return wide_product(x, kernel, axis), (x.astype(jnp.float32), kernel)


def _backward(axis: int, kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    x, kernel = kept[0].astype(gradient.dtype), kept[1]
    tokens = tuple(range(x.ndim - 1))
    of_x = _contract(gradient, kernel, (x.ndim - 1,), (1 - axis,))
    # The first is transposed, so the narrower comes first: one side of an adapter is narrow.
    x_first = x.shape[-1] <= gradient.shape[-1]
    first, second = (x, gradient) if x_first else (gradient, x)
    of_kernel = _contract(first, second, tokens, tokens)
    return of_x, of_kernel if x_first == (axis == 0) else of_kernel.T


wide_product.defvjp(_forward, _backward)
