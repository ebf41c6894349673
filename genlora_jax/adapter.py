"""The adapter: what is trained, and the factors that it stands for.

`generate_factors` is the only source of A and B: injection, merging and export all start there.
"""

import functools
import hashlib
import math
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax import generators
from genlora_jax.config import AdapterConfig, GenLoRAConfig, LoRAConfig
from genlora_jax.targets import Target, find_targets, split_layer

Tree = dict[str, Any]
Sides = dict[str, Any]  # {"a": ..., "b": ...}


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The static part of an adapter: hashable, no arrays.

    Attributes:
        targets: What is adapted and where it lies in the base.
        seed: Seed of what is rebuilt rather than stored.
        fingerprint: Digest of the names and sizes of all the base's parameters.
    """

    targets: tuple[Target, ...]
    seed: int
    fingerprint: str


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["trainable", "frozen"],
    meta_fields=["spec"],
)
@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A pytree: what is trained, what is kept but not trained, and a static part.

    Attributes:
        trainable: Float32 leaves. GenLoRA: `latents/TARGET/{a,b}` `[L, n]` and
            `generators/TARGET/{a,b}/...` `[S, ...]`, where S is 1 if all layers share one, else
            L. LoRA: `factors/TARGET/{a,b}`, `[L, d_in, r]` and `[L, r, d_out]`.
        frozen: Leaves that cannot be rebuilt from the seed; no gradient reaches them.
        spec: The static part.
    """

    trainable: Tree
    frozen: Tree
    spec: AdapterSpec

    def replace(self, **fields: Any) -> "Adapter":
        """This adapter with other values in some fields."""
        return replace(self, **fields)


def base_fingerprint(params: Mapping[str, Any]) -> str:
    """Digest of the names and sizes of a base's parameters, the same for scanned and unrolled."""
    sizes: dict[str, int] = {}
    for path, leaf in flatten_dict(dict(params)).items():
        name, _ = split_layer(path)
        sizes[name] = sizes.get(name, 0) + int(np.prod(leaf.shape))
    return hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:16]


def adapter_spec(cfg: AdapterConfig, params: Mapping[str, Any]) -> AdapterSpec:
    """The static part of the adapter that a config makes on a base.

    Raises:
        ValueError: If the config's targets do not fit the base.
    """
    return AdapterSpec(
        targets=find_targets(cfg, params), seed=cfg.seed, fingerprint=base_fingerprint(params)
    )


def init_adapter(cfg: AdapterConfig, key: jax.Array, params: Mapping[str, Any]) -> Adapter:
    """A new adapter whose delta is exactly zero.

    Args:
        cfg: Method and settings.
        key: PRNG key of the trained values.
        params: The base's parameters; only names and shapes matter, so the result of
            `jax.eval_shape` will do.

    Returns:
        The adapter, float32.

    Raises:
        ValueError: If a target pattern matches nothing or a layer does not exist.
    """
    spec = adapter_spec(cfg, params)
    _warn_unattainable(cfg, spec)
    return init_from_spec(cfg, key, spec)


@functools.partial(jax.jit, static_argnames=("cfg", "spec"))
def init_from_spec(cfg: AdapterConfig, key: jax.Array, spec: AdapterSpec) -> Adapter:
    """`init_adapter` for targets that are known already."""
    trainable: Tree = {}
    for target in spec.targets:
        target_key = jax.random.fold_in(key, zlib.crc32(target.name.encode()))
        for group, sides in _init_target(cfg, target_key, target).items():
            trainable.setdefault(group, {})[target.name] = sides
    return Adapter(trainable=trainable, frozen={}, spec=spec)


@functools.partial(jax.jit, static_argnames="cfg")
def generate_factors(cfg: AdapterConfig, adapter: Adapter) -> Tree:
    """The low-rank factors of every adapted kernel.

    Pure; works under `jit`, `grad` and `vmap` over the adapter's leaves.

    Args:
        cfg: The config that the adapter was made with.
        adapter: The adapter.

    Returns:
        A tree that mirrors the base's: at each adapted module `{"a": [..., d_in, r],
        "b": [..., r, d_out]}`, float32, with the scale folded into b. Under `nn.scan` the
        leading axis is the layer; layers that are not adapted have zeros.
    """
    flat: dict[tuple[str, ...], jax.Array] = {}
    for target in adapter.spec.targets:
        parts = {group: tree[target.name] for group, tree in adapter.trainable.items()}
        sides = _target_factors(cfg, parts, target, adapter.spec.seed)
        sides["b"] = sides["b"] * cfg.scale
        start = 0
        for kernel in target.kernels:
            stop = start + len(kernel.layers)
            for side, value in sides.items():
                flat[(*kernel.path, side)] = _place(value[start:stop], kernel.stack, kernel.layers)
            start = stop
    return unflatten_dict(flat)


def count_parameters(adapter: Adapter) -> int:
    """Number of trained values."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter.trainable))


def _place(value: jax.Array, stack: int | None, layers: tuple[int, ...]) -> jax.Array:
    """One kernel's factors in the shape in which the base holds that kernel."""
    if stack is None:
        return value[0]
    if len(layers) == stack:
        return value
    return jnp.zeros((stack, *value.shape[1:]), value.dtype).at[jnp.array(layers)].set(value)


def _warn_unattainable(cfg: AdapterConfig, spec: AdapterSpec) -> None:
    """Warns where a rank is asked for that the factors cannot have."""
    for target in spec.targets:
        for n in (target.d_in, target.d_out):
            limit = min(n, attainable_rank(cfg, n))
            if cfg.rank > limit:
                warnings.warn(
                    f"rank {cfg.rank} exceeds {limit}, the rank that a side of length {n} of "
                    f"{target.name} can reach with these settings: parameters are wasted",
                    stacklevel=3,
                )
                return


def attainable_rank(cfg: AdapterConfig, n: int) -> int:
    """Largest rank that a side of length n can have under a config."""
    if not isinstance(cfg, GenLoRAConfig):
        return n
    if cfg.attainable_rank is not None:
        return min(n, cfg.attainable_rank)
    features = (0 if cfg.basis is None else cfg.kernels) + cfg.residual
    return min(n, generators.group_count(cfg, n) * features)


# One pair of functions a method. `_init_target` returns {group: {"a": ..., "b": ...}};
# `_target_factors` takes these and returns A `[L, d_in, r]` and B `[L, r, d_out]`, unscaled.


@functools.singledispatch
def _init_target(cfg: AdapterConfig, key: jax.Array, target: Target) -> dict[str, Sides]:
    raise TypeError(f"no method for {type(cfg).__name__}")


@functools.singledispatch
def _target_factors(
    cfg: AdapterConfig, parts: dict[str, Sides], target: Target, seed: int
) -> Sides:
    raise TypeError(f"no method for {type(cfg).__name__}")


@_init_target.register
def _(cfg: LoRAConfig, key: jax.Array, target: Target) -> dict[str, Sides]:
    shape = (target.depth, target.d_in, cfg.rank)
    bound = target.d_in**-0.5  # as PEFT: Kaiming-uniform with a = sqrt(5)
    a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    b = jnp.zeros((target.depth, cfg.rank, target.d_out), jnp.float32)
    return {"factors": {"a": a, "b": b}}


@_target_factors.register
def _(cfg: LoRAConfig, parts: dict[str, Sides], target: Target, seed: int) -> Sides:
    return dict(parts["factors"])


def _seeded_latents(cfg: GenLoRAConfig, target: Target, side: str, seed: int) -> jax.Array:
    n = target.d_in if side == "a" else target.d_out
    count = 1 if cfg.share_latents else target.depth
    normal = generators.seeded_normal(seed, f"{target.name}/{side}/latents", (count, n))
    return cfg.latent_std * normal


@_init_target.register
def _(cfg: GenLoRAConfig, key: jax.Array, target: Target) -> dict[str, Sides]:
    lengths = {"a": target.d_in, "b": target.d_out}
    rows = 1 if cfg.share_latents else target.depth
    sets = 1 if cfg.share_generators else target.depth
    shapes: dict[Any, tuple[int, ...]] = {}
    if cfg.latents == "trained":
        shapes |= {("latents", side): (rows, n) for side, n in lengths.items()}
    for part, shape in generators.weight_shapes(cfg, target.d_in).items():
        if generators.init_shares(cfg)[part] > 0:
            shapes[part] = (sets, *shape)
    normals = _normals(key, shapes)

    latents, weights = {}, {}
    for side, n in lengths.items():
        weights[side] = {
            part: jnp.zeros((sets, *shape), jnp.float32)
            for part, shape in generators.weight_shapes(cfg, n).items()
        }
        centers = generators.fixed_centers(cfg, cfg.seed, f"{target.name}/{side}")
        if cfg.joint and cfg.trainable_centers:
            for name, value in centers.items():
                weights[side][name] = jnp.broadcast_to(value, (sets, *value.shape))
        if cfg.latents == "seeded":
            z = _seeded_latents(cfg, target, side, cfg.seed)
        else:
            z = latents[side] = cfg.latent_std * normals.pop(("latents", side))
        if side == "a":  # side B stays zero, so that the delta is
            # A set serves all layers, or one; the only row of shared latents serves every set.
            served = z[None] if cfg.share_generators else jnp.broadcast_to(z, (sets, n))[:, None]
            own = {part: normal for part, normal in normals.items() if isinstance(part, str)}
            scale = functools.partial(generators.init_weights, cfg, centers=centers)
            weights[side] |= jax.vmap(lambda noise, z, scale=scale: scale(noise, z))(own, served)
    return {"generators": weights} | ({"latents": latents} if latents else {})


def _normals(key: jax.Array, shapes: dict[Any, tuple[int, ...]]) -> dict[Any, jax.Array]:
    """N(0, 1) numbers in several shapes, drawn at once: one sampler is one to compile."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    flat = jax.random.normal(key, (sum(sizes),), jnp.float32)
    parts = jnp.split(flat, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


@_target_factors.register
def _(cfg: GenLoRAConfig, parts: dict[str, Sides], target: Target, seed: int) -> Sides:
    sides = {}
    for side in "ab":
        if cfg.latents == "seeded":
            z = _seeded_latents(cfg, target, side, seed)
        else:
            z = parts["latents"][side]
        weights = parts["generators"][side]
        fixed = (
            {}
            if cfg.trainable_centers
            else generators.fixed_centers(cfg, seed, f"{target.name}/{side}")
        )

        def basis(row: jax.Array, own: Sides, fixed: Sides = fixed) -> jax.Array:
            return generators.generate(cfg, row, fixed | own)

        # A shared operand is not mapped, so features are computed once per latent and a shared
        # set of generators is applied to all layers in one product.
        if cfg.share_generators:
            shared = jax.tree.map(lambda leaf: leaf[0], weights)
            mapped = jax.vmap(basis, in_axes=(0, None))(z, shared)
        elif cfg.share_latents:
            mapped = jax.vmap(basis, in_axes=(None, 0))(z[0], weights)
        else:
            mapped = jax.vmap(basis)(z, weights)
        sides[side] = mapped if side == "a" else mapped.swapaxes(-1, -2)
    return sides
