"""The one place where a frozen kernel is read: what the base stores becomes what multiplies."""

from typing import Any

import jax

from genlora_jax.base.products import matrix_product
from genlora_jax.base.stored import StoredKernel


def read_kernel(stored: Any, dtype: Any) -> jax.Array:
    """The array that multiplies, from the leaf that the base stores.

    The model, injection, merging, DoRA and HiRA read kernels here and nowhere else.

    Args:
        stored: The kernel's leaf in the base's tree of parameters, `[..., d_in, d_out]`: an array,
            or a `StoredKernel`.
        dtype: Dtype of the result.

    Returns:
        The kernel `[..., d_in, d_out]`.
    """
    kernel: jax.Array = stored.astype(dtype)
    return kernel


def store_kernel(kernel: jax.Array, like: Any) -> Any:
    """Inverse of `read_kernel`, up to rounding: a kernel in the form of another leaf."""
    return like.store(kernel) if isinstance(like, StoredKernel) else kernel.astype(like.dtype)


def product(
    x: jax.Array, stored: Any, *, prevent_cse: bool = False, wide: bool = False
) -> jax.Array:
    """`x @ kernel` in the dtype of x.

    Args:
        x: `[..., d_in]`.
        stored: As for `read_kernel`, `[d_in, d_out]`.
        prevent_cse: True where layers are unrolled: XLA would otherwise merge the forward and
            backward dequantisation, or make them early, and keep the float kernel.
        wide: Whether to sum in float32, see `wide_product`.
    """
    if isinstance(stored, StoredKernel):
        return stored.times(x, prevent_cse=prevent_cse, wide=wide)
    return matrix_product(x, read_kernel(stored, x.dtype), wide=wide)
