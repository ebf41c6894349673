"""The one place where a frozen kernel is read: from what the base holds to what multiplies."""

from typing import Any

import jax


def read_kernel(stored: Any, dtype: Any) -> jax.Array:
    """The array that multiplies.

    Injection, merging, DoRA and HiRA read kernels here and nowhere else, so that a base which
    stores its kernels in another form needs to change nothing but this function.

    Args:
        stored: What the base's tree of parameters holds for the kernel, `[..., d_in, d_out]`.
        dtype: Of the result.

    Returns:
        The kernel `[..., d_in, d_out]`.
    """
    return stored.astype(dtype)
