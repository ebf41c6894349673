"""GenLoRA (arXiv 2602.05709): factors generated from a latent a side."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genlora_jax import generators
from genlora_jax.config import GenLoRAConfig
from genlora_jax.methods.method import Kernels, Tree
from genlora_jax.targets import AdapterSpec, Target


def init(
    cfg: GenLoRAConfig, key: jax.Array, target: Target, spec: AdapterSpec, kernels: Kernels
) -> tuple[Tree, Tree]:
    """Side B's generators are zero, so that the delta is."""
    m = cfg.latents_per_side
    lengths = {"a": target.d_in, "b": target.d_out}
    if cfg.side_a == "seeded":
        del lengths["a"]
    rows = 1 if cfg.share_latents else target.depth
    sets = 1 if cfg.share_generators else target.depth
    shapes: dict[Any, tuple[int, ...]] = {}
    if cfg.latents == "trained":
        shapes |= {("latents", side): (rows, m * n) for side, n in lengths.items()}
    if "a" in lengths:
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
        centers = generators.fixed_centers(cfg, cfg.seed, f"{_generators_of(cfg, target)}/{side}")
        if cfg.joint and cfg.trainable_centers:
            for name, value in centers.items():
                weights[side][name] = jnp.broadcast_to(value, (sets, *value.shape))
        if cfg.latents == "seeded":
            z = _seeded_latents(cfg, target, side, cfg.seed)
        else:
            z = latents[side] = cfg.latent_std * normals.pop(("latents", side))
        if side == "a":
            # A set serves all layers, or one; the only row of shared latents serves every set.
            one_each = not cfg.share_generators
            served = jnp.broadcast_to(z, (sets, m * n))[:, None] if one_each else z[None]
            own = {part: normal for part, normal in normals.items() if isinstance(part, str)}
            scale = functools.partial(generators.init_weights, cfg, centers=centers)
            weights[side] |= jax.vmap(lambda noise, z, scale=scale: scale(noise, z))(own, served)
    groups: Tree = {"generators": {_generators_of(cfg, target): weights}}
    for side, z in latents.items():
        name = _latents_of(cfg, target, spec, side)
        groups.setdefault("latents", {}).setdefault(name, {})[side] = z
    if cfg.gates:
        groups["gates"] = {target.name: jnp.ones((target.depth, cfg.rank), jnp.float32)}
    return groups, {}


def factors(cfg: GenLoRAConfig, groups: Tree, target: Target, spec: AdapterSpec) -> Tree:
    """The bases that the generators make of the latents, B's transposed; A may be random."""
    sides = {}
    generator = _generators_of(cfg, target)
    for side in groups["generators"][generator]:
        if cfg.latents == "seeded":
            z = _seeded_latents(cfg, target, side, spec.seed)
        else:
            z = groups["latents"][_latents_of(cfg, target, spec, side)][side]
        weights = groups["generators"][generator][side]
        fixed = (
            {}
            if cfg.trainable_centers
            else generators.fixed_centers(cfg, spec.seed, f"{generator}/{side}")
        )

        def basis(row: jax.Array, own: Tree, fixed: Tree = fixed) -> jax.Array:
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
    if cfg.gates:
        sides["b"] = sides["b"] * groups["gates"][target.name][:, :, None]
    if cfg.side_a == "seeded":
        normal = generators.seeded_normal(
            spec.seed, f"{target.name}/a", (target.depth, target.d_in, cfg.rank)
        )
        sides["a"] = normal / math.sqrt(target.d_in)
    elif cfg.share_across_targets:
        # They were scaled to variance 1 / d_in for the first target's side A.
        sides["a"] = sides["a"] * math.sqrt(spec.targets[0].d_in / target.d_in)
    return sides


def _generators_of(cfg: GenLoRAConfig, target: Target) -> str:
    """The name under which a target's generators are stored."""
    return "shared" if cfg.share_across_targets else target.name


def _latents_of(cfg: GenLoRAConfig, target: Target, spec: AdapterSpec, side: str) -> str:
    """The name under which the latents of a target's side are stored."""
    if side == "a" and cfg.share_inputs:
        readers = [own for own in spec.targets if own.input == target.input]
        if len(readers) > 1:
            parent = target.name.rpartition(".")[0]
            return f"{parent}.{'+'.join(own.name.rpartition('.')[2] for own in readers)}"
    return target.name


def _normals(key: jax.Array, shapes: dict[Any, tuple[int, ...]]) -> dict[Any, jax.Array]:
    """N(0, 1) numbers in several shapes, drawn at once: one sampler is one to compile."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    flat = jax.random.normal(key, (sum(sizes),), jnp.float32)
    parts = jnp.split(flat, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _seeded_latents(cfg: GenLoRAConfig, target: Target, side: str, seed: int) -> jax.Array:
    n = cfg.latents_per_side * (target.d_in if side == "a" else target.d_out)
    count = 1 if cfg.share_latents else target.depth
    normal = generators.seeded_normal(seed, f"{target.name}/{side}/latents", (count, n))
    return cfg.latent_std * normal
