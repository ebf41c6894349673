"""FP8: kernels in e4m3, products of them in FP8 too, forward and for the input's gradient.

The base is frozen, so its products need no gradient of the kernel, and two of the three products
of training are all there are. What multiplies is scaled as it comes: inputs in e4m3, the outputs'
gradients in e5m2, which reaches further and is coarser (arXiv 2209.05433).

Rounding was measured to cost accuracy in the forward product only (`fp8` in `train/benchmarks`).
`Fp8Backward` therefore leaves that product as it is.

All scales are of a whole tensor and powers of two. They then change no mantissa: a kernel and what
it stands for in bfloat16 are the same numbers, a row's result hardly depends on the rows beside
it, and XLA folds the scale into cuBLASLt's product. Scales of rows or channels would gain no
precision, only range, of which e4m3 has 15 binary orders, and cost a pass over the outputs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from genlora_jax.base.products import matrix_product
from genlora_jax.base.stored import StoredKernel

# Gradients in e4m3 came little nearer to float32's (cosine 0.974, not 0.970, at equal losses), and
# e5m2 keeps small ones beside large ones.
INPUT, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
# DEFAULT lets tensor cores accumulate in fewer bits than float32, which cost no accuracy.
PRECISION = jax.lax.Precision.DEFAULT
# All products by cuBLASLt: XLA's choice of kernels made a step 7 % slower, and its compilation
# three times as long.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
ADA = 8.9  # compute capability of the first GPUs that multiply FP8
SMALLEST = 1e-30  # a tensor of zeros is divided by this
EXPONENT = 0x7F800000  # bits of a float32
Product = Callable[[jax.Array, Any], jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale"],
    meta_fields=["dtype"],
)
@dataclass(frozen=True)
class Fp8(StoredKernel):
    """A kernel in FP8.

    Attributes:
        codes: e4m3 `[..., d_out, d_in]`: the forward product contracts the last axis, as tensor
            cores do. The backward product transposes them each time.
        scale: Float32 `[...]`, a power of two, by which codes are multiplied.
        dtype: Of the parameters that are not quantised.
    """

    name = "fp8"
    axes: ClassVar = {"codes": ("out", "in"), "scale": ()}
    dequantises: ClassVar = False

    codes: Any
    scale: Any
    dtype: Any

    @classmethod
    def of(cls, kernel: jax.Array, dtype: Any) -> "Fp8":
        """A kernel in this form."""
        codes, scale = scaled(kernel, INPUT)
        return cls(codes.mT, scale[..., 0, 0], dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, d_out, d_in = self.codes.shape
        return (*lead, d_in, d_out)

    def dequantised(self) -> jax.Array:
        return self.codes.mT.astype(jnp.float32) * self.scale[..., None, None]

    def times(self, x: jax.Array, *, prevent_cse: bool, wide: bool = False) -> jax.Array:
        """`x @ kernel`, in FP8. There is no gradient of the kernel: it is None, as is int8's."""
        # Of two axes, as cuBLASLt's are: XLA does not find the scale behind a reshape.
        flat = x.reshape(-1, x.shape[-1])
        return _multiply(flat, self).reshape(*x.shape[:-1], -1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "scale"],
    meta_fields=["dtype"],
)
@dataclass(frozen=True)
class Fp8Backward(StoredKernel):
    """A kernel in floats, which FP8 multiplies for the input's gradient alone.

    Attributes:
        kernel: `[..., d_in, d_out]`. It is rounded to e4m3 each time a gradient comes.
        scale: Float32 `[...]`, a power of two, by which its codes are multiplied.
        dtype: Of the parameters that are not quantised.
    """

    name = "fp8_backward"
    axes: ClassVar = {"kernel": ("in", "out"), "scale": ()}
    dequantises: ClassVar = False
    rounds: ClassVar = False

    kernel: Any
    scale: Any
    dtype: Any

    @classmethod
    def of(cls, kernel: jax.Array, dtype: Any) -> "Fp8Backward":
        """A kernel in this form."""
        kernel = kernel.astype(dtype)
        return cls(kernel, scaled(kernel, INPUT)[1][..., 0, 0], dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.kernel.shape)

    def dequantised(self) -> jax.Array:
        return self.kernel.astype(jnp.float32)

    def times(self, x: jax.Array, *, prevent_cse: bool, wide: bool = False) -> jax.Array:
        """`x @ kernel`, whose gradient is in FP8. There is none of the kernel."""
        flat = x.reshape(-1, x.shape[-1])
        return _multiply_floats[wide](flat, self).reshape(*x.shape[:-1], self.shape[-1])


def scaled(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Matrices in FP8, each with its own scale.

    Args:
        x: `[..., m, n]`.
        dtype: An FP8 type.

    Returns:
        Codes `[..., m, n]`, and the scales `[..., 1, 1]`, float32, by which they are multiplied.
        Of a matrix with a NaN or an infinity, the scale is NaN: on GPUs, codes saturate.
    """
    largest = jnp.abs(x).max(axis=(-2, -1), keepdims=True).astype(jnp.float32)
    room = jnp.float32(jnp.finfo(dtype).max) / jnp.maximum(largest, SMALLEST)
    bits = jax.lax.bitcast_convert_type(room, jnp.int32) & EXPONENT  # no fraction: a power of two
    factor = jax.lax.bitcast_convert_type(bits, jnp.float32)
    scale = jnp.where(largest < jnp.inf, 1 / factor, jnp.nan)
    return (x.astype(jnp.float32) * factor).astype(dtype), scale


def _product(x: jax.Array, codes: jax.Array, scale: jax.Array, fp8: Any, axis: int) -> jax.Array:
    """`x` `[m, n]` in an FP8 type, times codes, of which an axis is contracted; `[m, k]`."""
    operand, scale_of_x = scaled(x, fp8)
    # float16 would not hold the sums of codes.
    wide = jnp.float32 if x.dtype == jnp.float16 else x.dtype
    dimensions = (((1,), (axis,)), ((), ()))
    y = jax.lax.dot_general(
        operand, codes, dimensions, precision=PRECISION, preferred_element_type=wide
    )
    return (y * (scale_of_x * scale)[0, 0].astype(wide)).astype(x.dtype)


def _linear(forward: Product, backward: Product) -> Product:
    """Two products with a kernel, each the gradient of the other; returns the first.

    JAX would differentiate the rounding of a gradient, too, and second derivatives would lack
    terms. There is no gradient of the kernel.
    """

    def pair(one: Any, other: Any) -> None:
        one.defvjp(
            lambda x, kernel: (one(x, kernel), kernel),
            lambda kernel, gradient: (other(gradient, kernel), None),
        )

    ahead, back = jax.custom_vjp(forward), jax.custom_vjp(backward)
    pair(ahead, back)
    pair(back, ahead)
    return ahead


def _float_product(wide: bool, x: jax.Array, stored: Fp8Backward) -> jax.Array:
    return matrix_product(x, stored.kernel.astype(x.dtype), wide=wide)


def _float_gradient(gradient: jax.Array, stored: Fp8Backward) -> jax.Array:
    # Codes wait for the gradient: made ahead of their use, all layers' take half a base's memory.
    gradient, stored = jax.lax.optimization_barrier((gradient, stored))
    codes = (stored.kernel.astype(jnp.float32) / stored.scale).astype(INPUT)
    return _product(gradient, codes, stored.scale, GRADIENT, 1)


_multiply = _linear(
    lambda x, stored: _product(x, stored.codes, stored.scale, INPUT, 1),
    lambda gradient, stored: _product(gradient, stored.codes, stored.scale, GRADIENT, 0),
)
_multiply_floats = {
    wide: _linear(functools.partial(_float_product, wide), _float_gradient)
    for wide in (False, True)
}


def refuse_without_fp8(form: str, platform: str, capability: str | None, kind: str) -> None:
    """Raises ValueError if a device has no products in FP8. CPUs emulate them, for tests."""
    try:
        supported = float(capability or 0) >= ADA
    except ValueError:  # AMD's are names
        supported = False
    if platform != "cpu" and not supported:
        raise ValueError(
            f"base_dtype {form} needs an NVIDIA GPU that multiplies FP8 (Ada, Hopper or later); "
            f"this is {kind}. Take bf16, or int8 for less memory"
        )
