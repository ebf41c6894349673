"""Int8: whole numbers up to 127, and a scale for each output."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from genlora_jax.base.stored import StoredKernel

LARGEST = 127.0


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "absmax"], meta_fields=["dtype"]
)
@dataclass(frozen=True)
class Int8(StoredKernel):
    """`codes` int8 `[..., d_in, d_out]`; `absmax` float32 `[..., d_out]`, each output's largest."""

    name = "int8"
    axes: ClassVar = {"codes": ("in", "out"), "absmax": ("out",)}

    codes: Any
    absmax: Any
    dtype: Any

    @classmethod
    def of(cls, kernel: jax.Array, dtype: Any) -> "Int8":
        """A kernel in this form."""
        absmax = jnp.abs(kernel).max(axis=-2).astype(jnp.float32)
        to_codes = jnp.where(absmax > 0, LARGEST / absmax, 0.0)[..., None, :]
        codes = jnp.round(kernel.astype(jnp.float32) * to_codes)
        return cls(codes.astype(jnp.int8), absmax, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantised(self) -> jax.Array:
        scale = self.absmax * jnp.float32(1 / LARGEST)
        return self.codes.astype(jnp.float32) * scale[..., None, :]
