"""LoRA (arXiv 2106.09685): the factors are what is trained."""

import jax
import jax.numpy as jnp

from genlora_jax.config import LoRAConfig
from genlora_jax.methods.method import Kernels, Tree
from genlora_jax.targets import AdapterSpec, Target


def init(
    cfg: LoRAConfig, key: jax.Array, target: Target, spec: AdapterSpec, kernels: Kernels
) -> tuple[Tree, Tree]:
    """A random A, and a B of zeros."""
    shape = (target.depth, target.d_in, cfg.rank)
    bound = target.d_in**-0.5  # as PEFT: Kaiming-uniform with a = sqrt(5)
    a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    b = jnp.zeros((target.depth, cfg.rank, target.d_out), jnp.float32)
    return {"factors": {target.name: {"a": a, "b": b}}}, {}


def factors(cfg: LoRAConfig, groups: Tree, target: Target, spec: AdapterSpec) -> Tree:
    """The factors as they are."""
    return dict(groups["factors"][target.name])
