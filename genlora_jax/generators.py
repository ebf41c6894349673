"""From a latent to basis vectors: normalise, evaluate basis functions, combine.

Everything here is one side of one layer: a latent `z: [n]` in, a basis `[n, r]` out. Where a side
has m latents, z is `[m n]`, one after the other, and a group has m g values. Sides, layers
and targets are mapped over by `genlora_jax.adapter`. All arithmetic is float32 at the highest
precision, for a basis that differs between training and merging is a bug nobody finds.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from genlora_jax.config import GenLoRAConfig

Generator = dict[str, jax.Array]
GRID = 2.0  # normalised latents are about N(0, 1): the scalar families cover [-GRID, GRID]


def seeded_normal(seed: int, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Float32 N(0, 1) numbers that depend on `seed` and `name` alone.

    The key's implementation and bit layout are pinned, so the numbers are the same in every
    process whatever `jax_default_prng_impl` or `jax_threefry_partitionable` say: they are rebuilt
    from the seed and never stored.
    """
    with jax.threefry_partitionable(True):
        return jax.random.normal(_pinned_key(seed, name), shape, jnp.float32)


def seeded_uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> jax.Array:
    """Like `seeded_normal`, uniform on [-bound, bound)."""
    with jax.threefry_partitionable(True):
        return jax.random.uniform(_pinned_key(seed, name), shape, jnp.float32, -bound, bound)


def _pinned_key(seed: int, name: str) -> jax.Array:
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def group_count(cfg: GenLoRAConfig, n: int) -> int:
    """Number J of groups of a latent of length n; the last one may be padded."""
    return -(-n // cfg.group_size)


def normalize_latent(cfg: GenLoRAConfig, z: jax.Array) -> jax.Array:
    """Normalises a latent and cuts it into groups: `[m n]` -> `[J, m g]`.

    The padding of the last group is zero and takes no part in the statistics.
    """
    m, g = cfg.latents_per_side, cfg.group_size
    n = z.shape[0] // m
    groups = group_count(cfg, n)

    def cut(values: jax.Array) -> jax.Array:
        padded = jnp.pad(values.reshape(m, n), ((0, 0), (0, groups * g - n)))
        return padded.reshape(m, groups, g).swapaxes(0, 1).reshape(groups, m * g)

    t = cut(z.astype(jnp.float32))
    if cfg.normalize == "none":
        return t
    axis = 1 if cfg.normalize == "group" else None
    inside = cut(jnp.ones(m * n, bool))
    mean = t.mean(axis=axis, keepdims=True, where=inside)
    power = t.var(axis=axis, keepdims=True, where=inside) + cfg.eps
    # With eps = 0, equal elements (a lone one in the last group, say) would be 0 / 0.
    varied = power > 0
    t = (t - mean) * jax.lax.rsqrt(jnp.where(varied, power, 1.0))
    return jnp.where(inside & varied, t, 0.0)


def gaussian_rbf(t: jax.Array, centers: jax.Array, width: jax.Array) -> jax.Array:
    """Gaussian RBFs on R^g: `[..., g]`, centres `[K, g]`, widths `[K]` -> `[..., K]`.

    `phi_k(t) = exp(-|t - c_k|^2 / (g h_k^2))`, so `0 < phi <= 1` and its gradient is at most
    `sqrt(2 / (e g)) / h_k` (Prop. 3.2).
    """
    distance = jnp.square(t[..., None, :] - centers).sum(-1)
    return jnp.exp(-distance / (t.shape[-1] * jnp.square(width)))


def _grid(kernels: int) -> tuple[jax.Array, float]:
    """K points on [-GRID, GRID] and their spacing (the point 0 and 1 when K = 1)."""
    if kernels == 1:
        return jnp.zeros(1, jnp.float32), 1.0
    return jnp.linspace(-GRID, GRID, kernels, dtype=jnp.float32), 2 * GRID / (kernels - 1)


def _rbf_grid(t: jax.Array, kernels: int, bandwidth: float | None) -> jax.Array:
    centers, spacing = _grid(kernels)
    return jnp.exp(-jnp.square((t[..., None] - centers) / (bandwidth or spacing)))


def _bspline(t: jax.Array, kernels: int, bandwidth: float | None) -> jax.Array:
    """Uniform cubic B-splines, one on each point of the grid, four spacings wide."""
    centers, spacing = _grid(kernels)
    u = jnp.abs(t[..., None] - centers) / (bandwidth or spacing)
    inner = 2 / 3 - jnp.square(u) + u**3 / 2
    outer = jnp.maximum(2 - u, 0.0) ** 3 / 6
    return jnp.where(u < 1, inner, outer)


def _fourier(t: jax.Array, kernels: int, bandwidth: float | None) -> jax.Array:
    """sin, cos of one, two, ... half periods on [-GRID, GRID]."""
    k = jnp.arange(kernels)
    phase = (k // 2 + 1).astype(jnp.float32) * (math.pi / (2 * GRID)) * t[..., None]
    return jnp.where(k % 2 == 0, jnp.sin(phase), jnp.cos(phase))


def _chebyshev(t: jax.Array, kernels: int, bandwidth: float | None) -> jax.Array:
    """T_1 ... T_K of tanh(t), which lies in the interval that they are made for."""
    x = jnp.tanh(t)
    values = [jnp.ones_like(x), x]
    while len(values) <= kernels:
        values.append(2 * x * values[-1] - values[-2])
    return jnp.stack(values[1:], axis=-1)


# Scalar families: (t [...], K, bandwidth) -> [..., K]. A new family is one function and one line
# here, and its name in `config.BASES`. "rbf" is here for the elementwise generator.
SCALAR_BASES: dict[str, Callable[[jax.Array, int, float | None], jax.Array]] = {
    "rbf": _rbf_grid,
    "rbf_grid": _rbf_grid,
    "fourier": _fourier,
    "chebyshev": _chebyshev,
    "bspline": _bspline,
}


def basis_features(cfg: GenLoRAConfig, t: jax.Array, generator: Generator) -> jax.Array | None:
    """Values of the basis functions at normalised groups `t: [J, g]`.

    Returns:
        `[J, K]` for RBFs on R^g, `[J, g, K]` for scalar families, None for `basis=None`.
    """
    if cfg.family is None:
        return None
    if cfg.joint:
        centers = generator["centers"]
        width = cfg.bandwidth or math.sqrt(2)
        return gaussian_rbf(t, centers, width * jnp.exp(generator["log_width"]))
    return SCALAR_BASES[cfg.family](t, cfg.basis_size, cfg.bandwidth)


def generate(cfg: GenLoRAConfig, z: jax.Array, generator: Generator) -> jax.Array:
    """The basis that the generators make of one latent (DESIGN: steps 1-4).

    Args:
        cfg: Settings of the generator.
        z: Latent `[m n]`.
        generator: `weights` `[r, F, g]` (`[r, J, K]` elementwise), `residual` `[r, m g, g]`
            (`[r, J]` elementwise), `centers` `[K, m g]` and `log_width` `[K]`; those that `cfg`
            asks for.

    Returns:
        Float32 basis `[n, r]`: column i is generator i's output over all groups.
    """
    t = normalize_latent(cfg, z)
    phi = basis_features(cfg, t, generator)
    features, weights = [], []
    if phi is not None:
        groupwise = cfg.generator == "groupwise"
        features.append(phi.reshape(t.shape[0], -1) if groupwise else phi)
        weights.append(generator["weights"])
    if cfg.residual:
        elementwise = cfg.generator == "elementwise"
        features.append(t[..., None] if elementwise else t)
        weights.append(generator["residual"][..., None] if elementwise else generator["residual"])
    # All generators and both parts in one product: [W; V] applied to [phi(t), t].
    if cfg.generator == "groupwise":
        product, axis = "jf,rfm->jmr", 1
    else:
        product, axis = "jmf,rjf->jmr", 2
    basis = jnp.einsum(
        product,
        jnp.concatenate(features, axis=-1),
        jnp.concatenate(weights, axis=axis),
        precision=jax.lax.Precision.HIGHEST,
    )
    basis = basis.reshape(-1, cfg.rank)[: z.shape[0] // cfg.latents_per_side]
    return basis - basis.mean(axis=0) if cfg.center_basis else basis


def fixed_centers(cfg: GenLoRAConfig, seed: int, name: str) -> Generator:
    """Centres `[K, m g]` drawn from N(0, 1) and log-widths of 0, from the adapter's seed."""
    return {
        "centers": seeded_normal(seed, f"{name}/centers", (cfg.basis_size, cfg.group_inputs)),
        "log_width": jnp.zeros(cfg.basis_size, jnp.float32),
    }


def weight_shapes(cfg: GenLoRAConfig, n: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the generators' weights of one side of length n; see `generate`."""
    g, k, groups, inputs = cfg.group_size, cfg.basis_size, group_count(cfg, n), cfg.group_inputs
    shapes: dict[str, tuple[int, ...]]
    if cfg.generator == "groupwise":
        features = k if cfg.joint else inputs * k
        shapes = {"weights": (cfg.rank, features, g), "residual": (cfg.rank, inputs, g)}
    else:
        shapes = {"weights": (cfg.rank, groups, k), "residual": (cfg.rank, groups)}
    used = {"weights": cfg.family is not None, "residual": cfg.residual}
    return {part: shape for part, shape in shapes.items() if used[part]}


def init_shares(cfg: GenLoRAConfig) -> dict[str, float]:
    """Share of side A's initial variance that each part of the generators carries."""
    basis = 0.0 if cfg.family is None else cfg.rbf_init if cfg.residual else 1.0
    return {"weights": basis, "residual": 1.0 - basis}


def init_weights(
    cfg: GenLoRAConfig, normals: Generator, z: jax.Array, centers: Generator
) -> Generator:
    """Scales random weights so that every element of the basis has variance `1 / n`.

    Args:
        cfg: Settings of the generator.
        normals: N(0, 1) numbers in the weights' shapes, for the parts that have a share.
        z: Latents `[L, m n]` that these generators will serve.
        centers: `fixed_centers(...)`.

    Returns:
        The weights.
    """
    count, n, g = z.shape[0], z.shape[1] // cfg.latents_per_side, cfg.group_size
    t = jax.vmap(lambda row: normalize_latent(cfg, row))(z)
    scaled = {}
    for part, normal in normals.items():
        values: Any = t
        if part == "weights":
            values = jax.vmap(lambda row: basis_features(cfg, row, centers))(t)
        if cfg.generator == "groupwise":
            values = values.reshape(count, t.shape[1], -1)
        else:
            values = values.reshape(count, t.shape[1] * g, -1)[:, :n]
        # An element is a sum of features times independent weights, so its variance is the
        # weights' variance times the sum of the squared features.
        power = jnp.square(values).sum(-1).mean()
        scaled[part] = normal * jnp.sqrt(init_shares(cfg)[part] / (n * jnp.maximum(power, 1e-12)))
    return scaled
