"""The factor of full fine-tuning and of Sine-LoRA: the whole delta."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from genlora_jax.factors.kind import DenseCall, Kind, Leaves


class Delta(Kind):
    """`delta` `[..., d_in, d_out]`."""

    name = "full fine-tuning or Sine-LoRA"
    axes: ClassVar = {"delta": ("in", "out")}
    scaled = "delta"
    option = name

    def output(self, call: DenseCall, leaves: Leaves) -> jax.Array:
        return call.y + call.times(call.x, leaves["delta"].astype(call.x.dtype))

    def merge(self, kernel: jax.Array, leaves: Leaves) -> jax.Array:
        return kernel + leaves["delta"].astype(jnp.float32)

    def unmerge(self, kernel: jax.Array, leaves: Leaves) -> jax.Array:
        return kernel - leaves["delta"].astype(jnp.float32)

    def singular_values(self, leaves: Leaves) -> jax.Array:
        return jnp.linalg.svd(leaves["delta"], compute_uv=False)

    def stored_values(self, leaves: Leaves) -> int:
        return int(leaves["delta"].size)


DELTA = Delta()
