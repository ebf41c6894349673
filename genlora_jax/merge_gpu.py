"""Merging on GPUs: reads and writes each kernel once, in place.

XLA multiplies A and B into memory and adds the result in a second pass; here a tile of the product
lives in registers only, so that the time is near that of copying the kernels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

TILE = 64  # rows and columns of the kernel at a time
STEPS = (32, 16)  # columns of A at a time: 32, but 16 where 32 would be mostly padding
# Float32 to the last bits on matrix units: each operand as a sum of three bfloat16 parts.
PRECISION = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6


def fits(shape: tuple[int, ...]) -> bool:
    """Whether kernels of this shape can be cut into tiles."""
    return len(shape) in (2, 3) and all(n % TILE == 0 for n in shape[-2:])


@functools.partial(jax.jit, static_argnames=("sign", "interpret"), inline=True)
def add_product(
    kernel: jax.Array, a: jax.Array, b: jax.Array, *, sign: float = 1.0, interpret: bool = False
) -> jax.Array:
    """`kernel + sign * a @ b` in float32, rounded once to the kernel's dtype, in its memory.

    Args:
        kernel: `[layers, d_in, d_out]` or `[d_in, d_out]`; multiples of `TILE`.
        a: `[..., d_in, r]`.
        b: `[..., r, d_out]`.
        sign: 1 or -1.
        interpret: Run as plain JAX, on any device.

    Returns:
        An array like `kernel`; donate that to spare a copy.
    """
    if kernel.ndim == 2:
        whole = add_product(kernel[None], a[None], b[None], sign=sign, interpret=interpret)
        return whole[0]
    layers, n, m = kernel.shape
    step = STEPS[0] if a.shape[-1] > STEPS[1] else STEPS[1]
    missing = -a.shape[-1] % step
    a = jnp.pad(a.astype(jnp.float32), ((0, 0), (0, 0), (0, missing)))
    b = jnp.pad(b.astype(jnp.float32), ((0, 0), (0, missing), (0, 0)))
    rank = a.shape[-1]
    tile = pl.BlockSpec((None, TILE, TILE), lambda j, i, layer: (layer, i, j))
    return pl.pallas_call(
        functools.partial(_tile, rank=rank, step=step, sign=sign),
        grid=(m // TILE, n // TILE, layers),
        in_specs=[
            tile,
            pl.BlockSpec((None, TILE, rank), lambda j, i, layer: (layer, i, 0)),
            pl.BlockSpec((None, rank, TILE), lambda j, i, layer: (layer, 0, j)),
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(kernel.shape, kernel.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(kernel, a, b)


def _tile(
    kernel: jax.Ref, a: jax.Ref, b: jax.Ref, out: jax.Ref, *, rank: int, step: int, sign: float
) -> None:
    total = jnp.zeros((TILE, TILE), jnp.float32)
    for start in range(0, rank, step):
        part = pl.ds(start, step)
        total += jnp.dot(a[:, part], b[part, :], precision=PRECISION)
    out[...] = (kernel[...].astype(jnp.float32) + sign * total).astype(out.dtype)
