"""From a latent to basis vectors: normalise, evaluate basis functions, combine.

Everything here is one side of one layer: a latent `z: [n]` in, a basis `[n, r]` out. The method
`genlora_jax.methods.genlora` maps it over sides, layers and targets. All arithmetic is float32 at
the highest precision, so that training and merging generate the same basis.
"""

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from genlora_jax.basis_functions import FAMILIES, gaussian_rbf
from genlora_jax.seeded_random import seeded_normal

if TYPE_CHECKING:  # the config's file imports this one
    from genlora_jax.methods.genlora import GenLoRAConfig

Generator = dict[str, jax.Array]


def group_count(cfg: "GenLoRAConfig", n: int) -> int:
    """Number J of groups of a latent of length n; the last one may be padded."""
    return -(-n // cfg.group_size)


def normalize_latent(cfg: "GenLoRAConfig", z: jax.Array) -> jax.Array:
    """Normalises a latent and splits it into groups: `[n]` -> `[J, g]`.

    The padding of the last group is zero and takes no part in the statistics.
    """
    n, g = z.shape[0], cfg.group_size
    groups = group_count(cfg, n)

    def split(values: jax.Array) -> jax.Array:
        return jnp.pad(values, (0, groups * g - n)).reshape(groups, g)

    t = split(z.astype(jnp.float32))
    if cfg.normalize == "none":
        return t
    axis = 1 if cfg.normalize == "group" else None
    inside = split(jnp.ones(n, bool))
    mean = t.mean(axis=axis, keepdims=True, where=inside)
    power = t.var(axis=axis, keepdims=True, where=inside) + cfg.eps
    # With eps = 0, equal elements (a lone one in the last group, say) would be 0 / 0.
    varied = power > 0
    t = (t - mean) * jax.lax.rsqrt(jnp.where(varied, power, 1.0))
    return jnp.where(inside & varied, t, 0.0)


def basis_features(cfg: "GenLoRAConfig", t: jax.Array, generator: Generator) -> jax.Array | None:
    """Values of the basis functions at normalised groups `t: [J, g]`.

    Returns:
        `[J, K]` for RBFs on R^g, `[J, g, K]` for scalar families, None for `kernels=0`.
    """
    if cfg.kernels == 0:
        return None
    if cfg.joint:
        width = cfg.bandwidth or math.sqrt(2)
        return gaussian_rbf(t, generator["centers"], width * jnp.exp(generator["log_width"]))
    return FAMILIES[cfg.basis].features(t, cfg.kernels, cfg.bandwidth)


def generate(cfg: "GenLoRAConfig", z: jax.Array, generator: Generator) -> jax.Array:
    """The basis that the generators make of one latent.

    Args:
        cfg: Settings of the generator.
        z: Latent `[n]`.
        generator: `weights` `[r, F, g]` (`[r, J, K]` elementwise), `residual` `[r, g, g]`
            (`[r, J]` elementwise), `centers` `[K, g]` and `log_width` `[K]`; those that `cfg`
            asks for.

    Returns:
        Float32 basis `[n, r]`: column i is generator i's output over all groups.
    """
    t = normalize_latent(cfg, z)
    phi = basis_features(cfg, t, generator)
    groupwise = cfg.generator == "groupwise"
    features, weights = [], []
    if phi is not None:
        features.append(phi.reshape(t.shape[0], -1) if groupwise else phi)
        weights.append(generator["weights"])
    if cfg.residual:
        features.append(t if groupwise else t[..., None])
        weights.append(generator["residual"] if groupwise else generator["residual"][..., None])
    # All generators and both parts in one product: [W; V] applied to [phi(t), t].
    product, axis = ("jf,rfm->jmr", 1) if groupwise else ("jmf,rjf->jmr", 2)
    basis = jnp.einsum(
        product,
        jnp.concatenate(features, axis=-1),
        jnp.concatenate(weights, axis=axis),
        precision=jax.lax.Precision.HIGHEST,
    )
    basis = basis.reshape(-1, cfg.rank)[: z.shape[0]]
    return basis - basis.mean(axis=0, keepdims=True) if cfg.center_basis else basis


def fixed_centers(cfg: "GenLoRAConfig", name: str) -> Generator:
    """Centres `[K, g]` drawn from N(0, 1) and log-widths of 0, from the config's seed."""
    return {
        "centers": seeded_normal(cfg.seed, f"{name}/centers", (cfg.kernels, cfg.group_size)),
        "log_width": jnp.zeros(cfg.kernels, jnp.float32),
    }


def weight_shapes(cfg: "GenLoRAConfig", n: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the generators' weights of one side of length n; see `generate`."""
    g, k, groups = cfg.group_size, cfg.kernels, group_count(cfg, n)
    shapes: dict[str, tuple[int, ...]]
    if cfg.generator == "groupwise":
        shapes = {"weights": (cfg.rank, k if cfg.joint else g * k, g), "residual": (cfg.rank, g, g)}
    else:
        shapes = {"weights": (cfg.rank, groups, k), "residual": (cfg.rank, groups)}
    used = {"weights": k > 0, "residual": cfg.residual}
    return {part: shape for part, shape in shapes.items() if used[part]}


def init_shares(cfg: "GenLoRAConfig") -> dict[str, float]:
    """Share of side A's initial variance that each part of the generators carries."""
    basis = 0.0 if cfg.kernels == 0 else cfg.rbf_init if cfg.residual else 1.0
    return {"weights": basis, "residual": 1.0 - basis}


def init_weights(
    cfg: "GenLoRAConfig", normals: Generator, z: jax.Array, centers: Generator
) -> Generator:
    """Scales random weights so that every element of the basis has variance `1 / n`.

    Args:
        cfg: Settings of the generator.
        normals: N(0, 1) numbers in the weights' shapes, for the parts that have a share.
        z: Latents `[L, n]` that these generators will serve.
        centers: `fixed_centers(...)`.

    Returns:
        The weights.
    """
    count, n, g = *z.shape, cfg.group_size
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
