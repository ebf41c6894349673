"""From a latent to basis vectors: normalise, evaluate basis functions, combine.

Everything here is one side of one layer: a latent `z: [n]` in, a basis `[n, r]` out. The method
`genlora_jax.methods.genlora` maps it over sides, layers and targets. All arithmetic is float32 at
the highest precision, so that training and merging generate the same basis.
"""

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from genlora_jax.basis_functions import FAMILIES, gaussian_rbf, mean_squares
from genlora_jax.seeded_random import seeded_normal
from genlora_jax.validation import require, require_float, require_int

if TYPE_CHECKING:  # the config's file imports this one
    from genlora_jax.methods.genlora import GenLoRAConfig

Generator = dict[str, jax.Array]
_ALIKE = 1e-12  # a variance that is rounding, of features whose largest value is about 1


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


def check_basis(cfg: "GenLoRAConfig") -> None:
    """Raises ValueError if a setting of the basis functions has nothing to act on."""
    if cfg.kernels == 0:
        require(cfg.residual, "residual=False needs kernels >= 1: nothing else generates")
        unused = {"basis": cfg.basis != "rbf", "bandwidth": cfg.bandwidth is not None}
        unused |= {"rbf_init": cfg.rbf_init > 0, "standardize": cfg.standardize}
        for field, given in unused.items():
            require(not given, f"{field} means nothing without basis functions: give kernels")
    if cfg.bandwidth is not None:
        require(
            FAMILIES[cfg.basis].has_bandwidth,
            f"bandwidth means nothing to basis={cfg.basis!r}: leave it out",
        )
    width: Any = cfg.bandwidth
    if width not in (None, "spread"):
        require_float("bandwidth", width, 0.0, above=True)
    if cfg.projection is not None:
        require_int("projection", cfg.projection, 1)
        within = cfg.projection <= cfg.group_size
        require(within, f"projection must be at most group_size, {cfg.group_size}")
    joint_alone = {
        'bandwidth="spread"': cfg.bandwidth == "spread",
        "projection": cfg.projection is not None,
        'centers="latents"': cfg.centers == "latents",
    }
    for setting, given in joint_alone.items():
        needs = 'needs kernels >= 1, basis="rbf" and generator="groupwise"'
        require(cfg.joint or not given, f"{setting} {needs}: it is for RBFs on whole groups")
    require(
        not cfg.standardize or cfg.generator == "groupwise",
        'standardize needs generator="groupwise": elementwise, every group has its own functions',
    )
    require(
        cfg.centers == "random" or cfg.trainable_centers,
        'centers="latents" needs trainable_centers=True: fixed centres are rebuilt from the seed',
    )


def check_side(cfg: "GenLoRAConfig", side: str, n: int) -> None:
    """Raises ValueError if features have but one group of a side's latent to vary over."""
    require(
        not cfg.standardize or n > cfg.group_size,
        f"standardize: {side} of length {n} is one group (group_size {cfg.group_size}), over which "
        "every feature would be 0; give a smaller group_size, or leave the module out",
    )


def check_centers(cfg: "GenLoRAConfig", side: str, layers: int, n: int) -> None:
    """Raises ValueError if a side's latents, `[layers, n]`, have fewer groups than centres."""
    count = layers * group_count(cfg, n)
    require(
        count >= cfg.kernels,
        f'centers="latents": {side} has {count} groups for {cfg.kernels} centres; '
        'give fewer kernels, a smaller group_size or centers="random"',
    )


def basis_features(cfg: "GenLoRAConfig", t: jax.Array, generator: Generator) -> jax.Array | None:
    """Values of the basis functions at normalised groups `t: [J, g]`.

    Returns:
        `[J, K]` for RBFs on R^g, `[J, g, K]` for scalar families, None for `kernels=0`.
    """
    if cfg.kernels == 0:
        return None
    if cfg.joint:
        phi = _rbfs(cfg, t, generator)
    else:
        width = None if isinstance(cfg.bandwidth, str) else cfg.bandwidth
        phi = FAMILIES[cfg.basis].features(t, cfg.kernels, width)
    return _standardized(phi) if cfg.standardize else phi


def _rbfs(cfg: "GenLoRAConfig", t: jax.Array, generator: Generator) -> jax.Array:
    centers, projection = generator["centers"], generator.get("projection")
    width = jnp.exp(generator["log_width"])
    if isinstance(cfg.bandwidth, str):  # "spread"
        variance = mean_squares(t, centers, projection).var(axis=0)
        width *= jnp.where(variance > 0, variance, 1.0) ** 0.25
    else:
        width *= cfg.bandwidth or math.sqrt(2)
    return gaussian_rbf(t, centers, width, projection, relative=cfg.standardize)


def _standardized(phi: jax.Array) -> jax.Array:
    """Features `[J, ...]` with mean 0 and variance 1 over the groups; 0 where all are alike."""
    phi -= phi.mean(axis=0, keepdims=True)
    variance = jnp.square(phi).mean(axis=0, keepdims=True)
    return phi * jax.lax.rsqrt(jnp.where(variance > _ALIKE, variance, 1.0))


def generate(cfg: "GenLoRAConfig", z: jax.Array, generator: Generator) -> jax.Array:
    """The basis that the generators make of one latent.

    Args:
        cfg: Settings of the generator.
        z: Latent `[n]`.
        generator: `weights` `[r, F, g]` (`[r, J, K]` elementwise), `residual` `[r, g, g]`
            (`[r, J]` elementwise), `centers` `[K, g]` (`[K, d]` with a `projection`
            `[K, g, d]`) and `log_width` `[K]`; those that `cfg` asks for.

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
    """Centres `[K, g]` drawn from N(0, 1) and log-widths of 0, from the config's seed.

    With `cfg.projection`, centres `[K, d]` and directions `[K, g, d]` too.
    """
    count, g, d = cfg.kernels, cfg.group_size, cfg.projection
    drawn = {
        "centers": seeded_normal(cfg.seed, f"{name}/centers", (count, d or g)),
        "log_width": jnp.zeros(count, jnp.float32),
    }
    if d is not None:  # what they make of N(0, 1) is N(0, 1)
        directions = seeded_normal(cfg.seed, f"{name}/projection", (count, g, d))
        drawn["projection"] = directions / math.sqrt(g)
    return drawn


def centers_at_groups(cfg: "GenLoRAConfig", name: str, z: jax.Array, drawn: Generator) -> Generator:
    """The same with centres at groups of latents `z: [L, n]`, which the config's seed chooses.

    There are at least as many groups, see `check_centers`.
    """
    count = z.shape[0] * group_count(cfg, z.shape[1])
    groups = jax.vmap(lambda row: normalize_latent(cfg, row))(z).reshape(count, cfg.group_size)
    order = jnp.argsort(seeded_normal(cfg.seed, f"{name}/groups", (count,)))
    chosen = groups[order[: cfg.kernels]]
    if cfg.projection is not None:
        chosen = jnp.einsum(
            "kg,kgd->kd", chosen, drawn["projection"], precision=jax.lax.Precision.HIGHEST
        )
    return drawn | {"centers": chosen}


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
        centers: `fixed_centers(...)`, or `centers_at_groups(...)`.

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
