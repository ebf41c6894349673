"""Random numbers that are rebuilt from a seed and never stored.

The key's implementation and bit layout are pinned, so the numbers are the same in every process
whatever `jax_default_prng_impl` or `jax_threefry_partitionable` say.
"""

import zlib

import jax
import jax.numpy as jnp


def seeded_normal(seed: int, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Float32 N(0, 1) numbers that depend on `seed` and `name` alone."""
    with jax.threefry_partitionable(True):
        return jax.random.normal(_pinned_key(seed, name), shape, jnp.float32)


def seeded_uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> jax.Array:
    """Like `seeded_normal`, uniform on [-bound, bound)."""
    with jax.threefry_partitionable(True):
        return jax.random.uniform(_pinned_key(seed, name), shape, jnp.float32, -bound, bound)


def _pinned_key(seed: int, name: str) -> jax.Array:
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
