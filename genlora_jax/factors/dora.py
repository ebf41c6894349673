"""DoRA's factors (arXiv 2402.09353): a product, and the norm of each column of the sum."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from genlora_jax.factors.kind import DenseCall, Kind, Leaves, exact_matmul
from genlora_jax.factors.low_rank import low_rank_change, low_rank_singular_values


def column_norm(kernel: jax.Array) -> jax.Array:
    """Norms of a kernel's columns, `[..., d_in, d_out]` -> `[..., d_out]`, float32."""
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(-2))


def adapted_column_norm(kernel: jax.Array, leaves: Leaves) -> jax.Array:
    """`column_norm` of the kernel plus its delta, without forming their sum.

    The square for `w + A b` is that for `w`, plus `2 (A^T w) b`, plus `b (A^T A) b`: products of r
    rows, exact to float32 rounding unless the delta undoes the kernel.
    """
    w, a, b = (x.astype(jnp.float32) for x in (kernel, leaves["a"], leaves["b"]))
    cross = 2 * exact_matmul(a.mT, w)
    gram = exact_matmul(exact_matmul(a.mT, a), b)
    square = jnp.square(w).sum(-2) + ((cross + gram) * b).sum(-2)
    return jnp.sqrt(jnp.maximum(square, 0.0))


def column_scale(magnitude: jax.Array, norm: jax.Array) -> jax.Array:
    """The factor that brings columns of this norm to this magnitude, float32.

    It is never 0: a magnitude of 0 belongs to a layer that is not adapted.
    """
    return jnp.where(magnitude == 0, 1.0, magnitude / jnp.where(norm > 0, norm, 1.0))


def _row(values: jax.Array, y: jax.Array) -> jax.Array:
    """One value a column, in the dtype and with the rank of outputs y."""
    return jnp.expand_dims(values.astype(y.dtype), range(y.ndim - 1))


class DoRA(Kind):
    """As LoRA, with `magnitude` `[..., d_out]`."""

    name = "DoRA"
    axes: ClassVar = {"a": ("in", "rank"), "b": ("rank", "out"), "magnitude": ("out",)}
    scaled = "b"
    option = "DoRA"
    in_float32 = True  # norms need it
    peft: ClassVar = {
        "a": ("lora_A.weight", True),
        "b": ("lora_B.weight", True),
        "magnitude": ("lora_magnitude_vector", False),
    }
    peft_dora = True

    def output(self, call: DenseCall, leaves: Leaves) -> jax.Array:
        change = low_rank_change(call, leaves)
        if call.dropped:  # as in PEFT, the dropped inputs' part of the output is rescaled
            read = jax.checkpoint(
                lambda x: call.times(x, call.kernel(x.dtype)), prevent_cse=call.prevent_cse
            )
            base = read(call.x)
        else:
            base = call.y if call.bias is None else call.y - _row(call.bias, call.y)
        # A constant to the gradient, as in the paper's section 4.3.
        norm = jax.lax.stop_gradient(adapted_column_norm(call.kernel(jnp.float32), leaves))
        scale = column_scale(leaves["magnitude"], norm)
        # Not `scale * (base + change)`: in bfloat16 a scale near 1 would be rounded to 1.
        return call.y + _row(scale - 1, call.y) * base + _row(scale, call.y) * change

    def merge(self, kernel: jax.Array, leaves: Leaves) -> jax.Array:
        whole = kernel + exact_matmul(leaves["a"], leaves["b"])
        return whole * column_scale(leaves["magnitude"], column_norm(whole))[..., None, :]

    def unmerge(self, kernel: jax.Array, leaves: Leaves) -> jax.Array:
        raise ValueError(
            "was merged with a magnitude (DoRA), which leaves no trace of the kernel's own norms; "
            "load the base again"
        )

    def singular_values(self, leaves: Leaves) -> jax.Array:
        return low_rank_singular_values(leaves["a"], leaves["b"])


DORA = DoRA()
