"""Families of basis functions: from normalised latent values to features."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

GRID = 2.0  # normalised latents are about N(0, 1): the scalar families cover [-GRID, GRID]


@dataclass(frozen=True)
class Family:
    """A family of K scalar functions.

    Attributes:
        features: `(t [...], K, bandwidth) -> [..., K]`.
        has_bandwidth: Whether it heeds the bandwidth.
    """

    features: Callable[[jax.Array, int, float | None], jax.Array]
    has_bandwidth: bool = False


def _with_rank(x: jax.Array, rank: int) -> jax.Array:
    """The same values with axes of size 1 in front."""
    return jnp.expand_dims(x, range(rank - x.ndim))


def gaussian_rbf(
    t: jax.Array,
    centers: jax.Array,
    width: jax.Array,
    projection: jax.Array | None = None,
    *,
    relative: bool = False,
) -> jax.Array:
    """Gaussian RBFs on R^g: `[..., g]`, centres `[K, g]`, widths `[K]` -> `[..., K]`.

    `phi_k(t) = exp(-|t - c_k|^2 / (g h_k^2))`, so `0 < phi <= 1` and its gradient is at most
    `sqrt(2 / (e g)) / h_k` (Prop. 3.2). With a projection they are RBFs on R^d of `P_k t`.
    `relative`, each is divided by its largest value over the first axis, so that narrow ones do
    not vanish far from their centres.
    """
    exponent = -mean_squares(t, centers, projection) / _with_rank(jnp.square(width), t.ndim)
    if relative:
        exponent -= jax.lax.stop_gradient(exponent.max(axis=0, keepdims=True))
    return jnp.exp(exponent)


def mean_squares(
    t: jax.Array, centers: jax.Array, projection: jax.Array | None = None
) -> jax.Array:
    """Squared distances to centres over the number of dimensions: `[..., g]` -> `[..., K]`.

    Args:
        t: Groups.
        centers: `[K, g]`, or `[K, d]` with a projection.
        projection: `[K, g, d]`; distances are then those of `P_k t` from `c_k`.
    """
    x = t[..., None, :]
    if projection is not None:
        x = jnp.einsum("...g,kgd->...kd", t, projection, precision=jax.lax.Precision.HIGHEST)
    return jnp.square(x - _with_rank(centers, t.ndim + 1)).mean(-1)


def _grid(count: int) -> tuple[jax.Array, float]:
    """K points on [-GRID, GRID] and their spacing (the point 0 and 1 when K = 1)."""
    if count == 1:
        return jnp.zeros(1, jnp.float32), 1.0
    return jnp.linspace(-GRID, GRID, count, dtype=jnp.float32), 2 * GRID / (count - 1)


def _rbf(t: jax.Array, count: int, bandwidth: float | None) -> jax.Array:
    """Gaussian RBFs, one on each point of the grid."""
    centers, spacing = _grid(count)
    distance = t[..., None] - _with_rank(centers, t.ndim + 1)
    return jnp.exp(-jnp.square(distance / (bandwidth or spacing)))


def _bspline(t: jax.Array, count: int, bandwidth: float | None) -> jax.Array:
    """Uniform cubic B-splines, one on each point of the grid, four spacings wide."""
    centers, spacing = _grid(count)
    u = jnp.abs(t[..., None] - _with_rank(centers, t.ndim + 1)) / (bandwidth or spacing)
    inner = 2 / 3 - jnp.square(u) + u**3 / 2
    outer = jnp.maximum(2 - u, 0.0) ** 3 / 6
    return jnp.where(u < 1, inner, outer)


def _fourier(t: jax.Array, count: int, bandwidth: float | None) -> jax.Array:
    """sin, cos of one, two, ... half periods on [-GRID, GRID]."""
    k = _with_rank(jnp.arange(count), t.ndim + 1)
    phase = (k // 2 + 1).astype(jnp.float32) * (math.pi / (2 * GRID)) * t[..., None]
    return jnp.where(k % 2 == 0, jnp.sin(phase), jnp.cos(phase))


def _chebyshev(t: jax.Array, count: int, bandwidth: float | None) -> jax.Array:
    """T_1 ... T_K of tanh(t), which lies in the interval that they are made for."""
    x = jnp.tanh(t)
    values = [jnp.ones_like(x), x]
    while len(values) <= count:
        values.append(2 * x * values[-1] - values[-2])
    return jnp.stack(values[1:], axis=-1)


# What `basis` can be. A new family is one function and one line here. Groupwise, `rbf` is not this
# one but `gaussian_rbf` on whole groups.
FAMILIES: dict[str, Family] = {
    "rbf": Family(_rbf, has_bandwidth=True),
    "fourier": Family(_fourier),
    "chebyshev": Family(_chebyshev),
    "bspline": Family(_bspline, has_bandwidth=True),
}
