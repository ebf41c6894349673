"""Checksums of arrays, whole or sharded, and of JSON."""

import functools
import hashlib
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def checksums(leaves: Mapping[str, Any]) -> list[int]:
    """A checksum of each array, in order; the same however the array is sharded."""
    found: list[Any] = jax.device_get([_checksum(leaf) for leaf in leaves.values()])
    return [int(value) for value in found]


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """The sum of all elements' bits, each mixed with its place, modulo 2**32.

    No two values of an element at one place are mixed to the same, so that a change of one element
    is always seen. Whole numbers add up to the same in any order.
    """
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    whole = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, whole).astype(jnp.uint32)
    strides = [math.prod(leaf.shape[axis + 1 :]) % 2**32 for axis in range(leaf.ndim)]
    places = [
        jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride)
        for axis, stride in enumerate(strides)
    ]
    place = functools.reduce(operator.add, places, jnp.uint32(0))
    mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> jnp.uint32(15))) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> jnp.uint32(13)), dtype=jnp.uint32)


def json_digest(value: Any) -> str:
    """A digest of what JSON makes of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
