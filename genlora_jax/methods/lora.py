"""LoRA (arXiv 2106.09685): the factors are what is trained."""

import jax
import jax.numpy as jnp

from genlora_jax.config import LoRAConfig
from genlora_jax.generators import seeded_uniform
from genlora_jax.methods.method import Kernels, Tree
from genlora_jax.targets import AdapterSpec, Target


def init(
    cfg: LoRAConfig, key: jax.Array, target: Target, spec: AdapterSpec, kernels: Kernels
) -> tuple[Tree, Tree]:
    """A random A, and a B of zeros."""
    sides = {"b": jnp.zeros((target.depth, cfg.rank, target.d_out), jnp.float32)}
    if cfg.side_a == "trained":
        shape = (target.depth, target.d_in, cfg.rank)
        bound = _bound(target)
        sides["a"] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return {"factors": {target.name: sides}}, {}


def factors(cfg: LoRAConfig, groups: Tree, target: Target, spec: AdapterSpec) -> Tree:
    """The factors as they are."""
    own = dict(groups["factors"][target.name])
    if cfg.side_a == "seeded":
        shape = (target.depth, target.d_in, cfg.rank)
        own["a"] = seeded_uniform(spec.seed, f"{target.name}/a", shape, _bound(target))
    return own


def _bound(target: Target) -> float:
    return float(target.d_in**-0.5)  # as PEFT: Kaiming-uniform with a = sqrt(5)
