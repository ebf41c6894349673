"""The one place where a frozen kernel is read: what the base stores becomes what multiplies."""

from typing import Any

import jax


def read_kernel(stored: Any, dtype: Any) -> jax.Array:
    """The array that multiplies, from the leaf that the base stores.

    Injection, merging, DoRA and HiRA read kernels here and nowhere else. A base that stores its
    kernels in another form thus changes this function alone.

    Args:
        stored: The kernel's leaf in the base's tree of parameters, `[..., d_in, d_out]`.
        dtype: Dtype of the result.

    Returns:
        The kernel `[..., d_in, d_out]`.
    """
    return stored.astype(dtype)
