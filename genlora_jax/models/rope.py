"""Rotary position embeddings."""

import math

import jax
import jax.numpy as jnp

from genlora_jax.models.config import LlamaConfig

Array = jax.Array


def rope_frequencies(cfg: LlamaConfig) -> Array:
    """Float32 rotary frequencies in radians a position, `[rotary_dim / 2]`.

    With `rope_scaling`, wavelengths longer than `original / low_freq_factor` are stretched by
    `factor`, and those shorter than `original / high_freq_factor` are kept. Those between are
    interpolated.
    """
    half = jnp.arange(0, cfg.rotary_dim, 2, dtype=jnp.float32) / cfg.rotary_dim
    frequency = 1.0 / cfg.rope_theta**half
    scaling = cfg.rope_scaling
    if scaling is None:
        return frequency
    periods = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((periods - low) / (high - low), 0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / scaling.factor)


def rotary(cfg: LlamaConfig, positions: Array) -> tuple[Array, Array]:
    """Float32 cosines and sines `[batch, length, 1, rotary_dim / 2]` of positions."""
    angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(cfg)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates the first `rotary_dim` values of each head, `[batch, length, heads, head_dim]`.

    Value i and value i + rotary_dim / 2 are the two coordinates of one rotation. The values beyond
    `rotary_dim` stay as they are.
    """
    cos, sin = rope
    size = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in rotated), x[..., size:]], axis=-1)
