"""Full fine-tuning: a delta for every value of the kernel."""

import jax
import jax.numpy as jnp

from genlora_jax.config import FullConfig
from genlora_jax.methods.method import Kernels, Tree
from genlora_jax.targets import AdapterSpec, Target


def init(
    cfg: FullConfig, key: jax.Array, target: Target, spec: AdapterSpec, kernels: Kernels
) -> tuple[Tree, Tree]:
    """Zeros."""
    zeros = jnp.zeros((target.depth, target.d_in, target.d_out), jnp.float32)
    return {"deltas": {target.name: zeros}}, {}


def factors(cfg: FullConfig, groups: Tree, target: Target, spec: AdapterSpec) -> Tree:
    """The delta as it is."""
    return {"delta": groups["deltas"][target.name]}
