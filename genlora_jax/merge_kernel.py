"""Merging on GPUs: reads and writes each kernel once, in place.

XLA multiplies A and B into memory and adds the result in a second pass; here a tile of the product
lives in registers only, so that the time is near that of copying the kernels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

TILE, STEP = 64, 16  # of the kernel; of the rank
# Float32 to the last bits on matrix units: each operand as a sum of three bfloat16 parts.
PRECISION = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6


def fits(shape: tuple[int, ...]) -> bool:
    """Whether kernels of this shape can be cut into tiles."""
    return len(shape) in (2, 3) and all(n % TILE == 0 for n in shape[-2:])


@functools.partial(jax.jit, static_argnames="interpret", inline=True)
def add_product(
    kernel: jax.Array, a: jax.Array, b: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`kernel + a @ b` in float32, rounded once to the kernel's dtype, in the kernel's memory.

    Args:
        kernel: `[layers, d_in, d_out]` or `[d_in, d_out]`; multiples of `TILE`.
        a: `[..., d_in, r]`.
        b: `[..., r, d_out]`.
        interpret: Run as plain JAX, on any device.

    Returns:
        An array like `kernel`; donate that to spare a copy.
    """
    if kernel.ndim == 2:
        return add_product(kernel[None], a[None], b[None], interpret=interpret)[0]
    layers, n, m = kernel.shape
    missing = -a.shape[-1] % STEP
    a = jnp.pad(a.astype(jnp.float32), ((0, 0), (0, 0), (0, missing)))
    b = jnp.pad(b.astype(jnp.float32), ((0, 0), (0, missing), (0, 0)))
    rank = a.shape[-1]
    tile = pl.BlockSpec((None, TILE, TILE), lambda j, i, layer: (layer, i, j))
    return pl.pallas_call(
        functools.partial(_tile, rank=rank),
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


def _tile(kernel: jax.Ref, a: jax.Ref, b: jax.Ref, out: jax.Ref, *, rank: int) -> None:
    total = jnp.zeros((TILE, TILE), jnp.float32)
    for start in range(0, rank, STEP):
        part = pl.ds(start, STEP)
        total += jnp.dot(a[:, part], b[part, :], precision=PRECISION)
    out[...] = (kernel[...].astype(jnp.float32) + total).astype(out.dtype)
