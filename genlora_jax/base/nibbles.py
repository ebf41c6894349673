"""Numbers of four bits, two in a byte, and the sixteen values that they stand for."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# A byte holds inputs i and i + 32 of a run of 64: both halves are then whole tiles of a TPU, and
# whole rows anywhere, so that unpacking moves nothing between lanes.
RUN = 64
HALF = RUN // 2


def pack(low: jax.Array, high: jax.Array) -> jax.Array:
    """Bytes `[..., runs * HALF, n]` of the codes of each run's halves, `[..., runs, HALF, n]`."""
    packed = low | (high << 4)
    return packed.reshape(*packed.shape[:-3], -1, packed.shape[-1])


def unpack(packed: jax.Array) -> jax.Array:
    """Codes `[..., runs, RUN, n]` of bytes `[..., runs * HALF, n]`."""
    runs = packed.reshape(*packed.shape[:-2], -1, HALF, packed.shape[-1])
    return jnp.concatenate([runs & 15, runs >> 4], axis=-2)


def lookup(codes: jax.Array, table: Sequence[float]) -> jax.Array:
    """The value of each code, float32, from a table of 16.

    Selections, a bit at a time: no chip gathers from a table as fast.
    """
    values = [jnp.float32(value) for value in table]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        values = [
            jnp.where(odd, second, first)
            for first, second in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]
