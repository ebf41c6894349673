"""NF4 with double quantisation (QLoRA, arXiv 2305.14314), with bitsandbytes' values.

A block of 64 inputs of an output has 16 levels, the quantiles of a normal distribution, and the
block's largest magnitude for a scale. These scales, minus their mean, are quantised too: in blocks
of 256, by 8-bit numbers of a sign, an exponent and a fraction.

bitsandbytes cuts the flat weight `[out, in]` into blocks. Where 64 divides `d_in`, those are the
blocks here. Where it does not, theirs run on into the next output, and ours end with the output.
Scales take the nearest 8-bit number, as in its CUDA kernels; on CPUs it looks that up in a coarse
table, and one scale in 600 differs.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genlora_jax.base.nibbles import HALF, RUN, lookup, pack, unpack
from genlora_jax.base.stored import StoredKernel, block_absmax

BLOCK = RUN
NESTED_BLOCK = 256
SMALLEST = 1e-38  # a block of zeros is divided by this
# Appendix E of the paper.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _dynamic_levels() -> np.ndarray:
    """The 256 levels of the scales (arXiv 2110.02861), sorted.

    Seven decades, each with twice the levels of the one below it: the middles of equal parts of
    [0.1, 1], times the decade. Besides 0 and 1. All are rounded where bitsandbytes rounds.
    """
    levels = [np.float32(0.0), np.float32(1.0)]
    low, high = np.float32(0.1), np.float32(1.0)
    for decade in range(7):
        parts = 2**decade
        step = float((high - low) / np.float32(parts))
        i = np.arange(parts + 1)
        edges = np.where(  # from both ends, as PyTorch does
            i < (parts + 1) // 2, float(low) + step * i, 1 - step * (parts - i)
        ).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        levels += [*middles, *-middles]
    return np.sort(np.array(levels, np.float32))


SCALES = _dynamic_levels()


def _nearest(values: jax.Array, levels: np.ndarray) -> jax.Array:
    """The index of the nearest of 16 levels, uint8; of two equally near, the lower."""
    middles = (levels[:-1] + levels[1:]) / np.float32(2)
    return sum((values > middle).astype(jnp.uint8) for middle in middles)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested", "offset"],
    meta_fields=["d_in", "dtype"],
)
@dataclass(frozen=True)
class NF4(StoredKernel):
    """A kernel in NF4.

    Attributes:
        codes: Bytes of `nibbles`, `[..., blocks * 32, d_out]`.
        absmax: `[..., blocks, d_out]`: uint8, or float32 if it is not quantised in turn.
        nested: Float32 `[..., n]`: the scale of each 256 scales, an output's after the other's.
        offset: Float32 `[...]`: the mean of the scales. Both None if scales are not quantised.
        d_in: Inputs of the kernel.
        dtype: Of the parameters that are not quantised.
    """

    name = "nf4"
    axes: ClassVar = {
        "codes": ("in", "out"),
        "absmax": ("in", "out"),
        "nested": ("other",),
        "offset": (),
    }

    codes: Any
    absmax: Any
    nested: Any
    offset: Any
    d_in: int
    dtype: Any

    @classmethod
    def of(cls, kernel: jax.Array, dtype: Any) -> "NF4":
        """A kernel in this form."""
        blocks, absmax = block_absmax(kernel, BLOCK)
        inverse = (1 / jnp.maximum(absmax, SMALLEST))[..., None, :]
        low, high = (
            _nearest(jnp.clip(half.astype(jnp.float32) * inverse, -1, 1), LEVELS)
            for half in (blocks[..., :HALF, :], blocks[..., HALF:, :])
        )
        codes, nested, offset = quantised_scales(absmax)
        return cls(pack(low, high), codes, nested, offset, kernel.shape[-2], dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, _, d_out = self.codes.shape
        return (*lead, self.d_in, d_out)

    def dequantised(self) -> jax.Array:
        scales = self.absmax
        if self.nested is not None:
            scales = dequantised_scales(self.absmax, self.nested, self.offset)
        blocks = lookup(unpack(self.codes), LEVELS.tolist()) * scales[..., None, :]
        kernel = blocks.reshape(*blocks.shape[:-3], -1, blocks.shape[-1])
        return kernel[..., : self.d_in, :]


def quantised_scales(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales `[..., blocks, d_out]` as 8-bit codes, with the scales of these and their mean."""
    blocks, d_out = absmax.shape[-2:]
    flat = absmax.mT.reshape(*absmax.shape[:-2], -1)  # an output after the other
    offset = flat.mean(axis=-1)
    flat = flat - offset[..., None]
    missing = -flat.shape[-1] % NESTED_BLOCK
    padded = jnp.pad(flat, [*[(0, 0)] * (flat.ndim - 1), (0, missing)])
    rows = padded.reshape(*flat.shape[:-1], -1, NESTED_BLOCK)
    nested = jnp.abs(rows).max(axis=-1)
    scaled = jnp.where(nested > 0, 1 / nested, 0.0)[..., None] * rows
    middles = jnp.asarray((SCALES[:-1] + SCALES[1:]) / np.float32(2))
    codes = jnp.searchsorted(middles, scaled).astype(jnp.uint8)
    codes = codes.reshape(padded.shape)[..., : flat.shape[-1]]
    return codes.reshape(*absmax.shape[:-2], d_out, blocks).mT, nested, offset


def dequantised_scales(codes: jax.Array, nested: jax.Array, offset: jax.Array) -> jax.Array:
    """Inverse of `quantised_scales`: float32 `[..., blocks, d_out]`."""
    blocks, d_out = codes.shape[-2:]
    each = jnp.repeat(nested, NESTED_BLOCK, axis=-1)[..., : blocks * d_out]
    each = each.reshape(*codes.shape[:-2], d_out, blocks).mT
    scales = jnp.asarray(SCALES)[codes] * each
    # The bound does nothing but keep the product and the sum from being rounded as one.
    scales = jnp.minimum(scales, jnp.finfo(jnp.float32).max)
    return scales + offset[..., None, None]
