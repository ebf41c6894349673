"""HiRA's factors (ICLR 2025): the kernel's elements are multiplied with 1 plus a product."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from genlora_jax.factors.kind import DenseCall, Kind, Leaves, exact_matmul
from genlora_jax.factors.low_rank import low_rank_singular_values


def as_gain(a: jax.Array, b: jax.Array) -> Leaves:
    """A and B as factors of a gain: A times sqrt(d_in).

    Elements of `A @ B` are then as large for kernels of any width.
    """
    return {"gain_a": a * a.shape[-2] ** 0.5, "gain_b": b}


class HiRA(Kind):
    """`gain_a` `[..., d_in, r]` and `gain_b` `[..., r, d_out]`: `W (1 + gain_a @ gain_b)`."""

    name = "HiRA"
    axes: ClassVar = {"gain_a": ("in", "rank"), "gain_b": ("rank", "out")}
    scaled = "gain_b"
    option = "hadamard=True"
    peft: ClassVar = {"gain_a": ("hira_A", True), "gain_b": ("hira_B", True)}
    peft_type = "HIRA"

    def output(self, call: DenseCall, leaves: Leaves) -> jax.Array:
        a, b = (leaves[leaf].astype(call.x.dtype) for leaf in self.axes)

        def times_gained(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return call.times(x, call.kernel(x.dtype) * call.times(a, b))

        # Else every layer would keep a delta as large as its kernel for its backward pass. With
        # barriers against CSE, a sharded kernel would be all-gathered once more.
        times_gained = jax.checkpoint(times_gained, prevent_cse=call.prevent_cse)
        return call.y + times_gained(call.x, a, b)

    def merge(self, kernel: jax.Array, leaves: Leaves) -> jax.Array:
        return kernel * (1 + exact_matmul(leaves["gain_a"], leaves["gain_b"]))

    def unmerge(self, kernel: jax.Array, leaves: Leaves) -> jax.Array:
        gain = 1 + exact_matmul(leaves["gain_a"], leaves["gain_b"])
        return kernel / jnp.where(gain == 0, 1.0, gain)  # what became 0 stays 0

    def singular_values(self, leaves: Leaves) -> jax.Array:
        return low_rank_singular_values(leaves["gain_a"], leaves["gain_b"])

    def formed_values(self, leaves: Leaves) -> int:
        a, b = leaves["gain_a"], leaves["gain_b"]
        return int(a.size // a.shape[-1] * b.shape[-1])


HIRA = HiRA()
