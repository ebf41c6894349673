"""Int4: whole numbers from -7 to 7, and a scale for each group of an output's inputs."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from genlora_jax.base.nibbles import HALF, RUN, pack, unpack
from genlora_jax.base.stored import StoredKernel, block_absmax

GROUPS = (64, 128)
LARGEST = 7.0
ZERO = 8.0  # codes are stored plus this


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale"],
    meta_fields=["d_in", "group", "dtype"],
)
@dataclass(frozen=True)
class Int4(StoredKernel):
    """A kernel in int4.

    Attributes:
        codes: Bytes of `nibbles`, `[..., groups * group / 2, d_out]`.
        scale: Bfloat16 `[..., groups, d_out]`.
        d_in: Inputs of the kernel; where `group` does not divide it, the last group is shorter.
        group: Inputs that share a scale: 64 or 128.
        dtype: Of the parameters that are not quantised.
    """

    name = "int4"
    axes: ClassVar = {"codes": ("in", "out"), "scale": ("in", "out")}

    codes: Any
    scale: Any
    d_in: int
    group: int
    dtype: Any

    @classmethod
    def of(cls, kernel: jax.Array, dtype: Any, group: int = GROUPS[0]) -> "Int4":
        """A kernel in this form."""
        blocks, absmax = block_absmax(kernel, group)
        # The codes are those for the scale as it is stored.
        scale = (absmax / LARGEST).astype(jnp.bfloat16)
        wide = scale.astype(jnp.float32)
        inverse = jnp.where(wide > 0, 1 / wide, 0.0).repeat(group // RUN, axis=-2)[..., None, :]
        runs = blocks.reshape(*blocks.shape[:-3], -1, RUN, blocks.shape[-1])
        low, high = (
            jnp.clip(jnp.round(half.astype(jnp.float32) * inverse), -LARGEST, LARGEST) + ZERO
            for half in (runs[..., :HALF, :], runs[..., HALF:, :])
        )
        low, high = low.astype(jnp.uint8), high.astype(jnp.uint8)
        return cls(pack(low, high), scale, kernel.shape[-2], group, dtype)

    def store(self, kernel: jax.Array) -> "Int4":
        return self.of(kernel, self.dtype, self.group)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, _, d_out = self.codes.shape
        return (*lead, self.d_in, d_out)

    def dequantised(self) -> jax.Array:
        codes = unpack(self.codes).astype(jnp.float32) - ZERO
        groups = codes.reshape(*codes.shape[:-3], -1, self.group, codes.shape[-1])
        kernel = groups * self.scale.astype(jnp.float32)[..., None, :]
        kernel = kernel.reshape(*codes.shape[:-3], -1, codes.shape[-1])
        return kernel[..., : self.d_in, :]
