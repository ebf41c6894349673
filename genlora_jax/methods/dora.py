"""DoRA (arXiv 2402.09353): LoRA decides a kernel's direction, a magnitude a column its length."""

import jax
import jax.numpy as jnp

from genlora_jax.config import DoRAConfig
from genlora_jax.factors import column_norm
from genlora_jax.methods import lora
from genlora_jax.methods.method import Kernels, Tree
from genlora_jax.targets import AdapterSpec, Target


def init(
    cfg: DoRAConfig, key: jax.Array, target: Target, spec: AdapterSpec, kernels: Kernels
) -> tuple[Tree, Tree]:
    """LoRA's factors, and the norms of the base's columns."""
    trainable, frozen = lora.init(cfg, key, target, spec, kernels)
    norms = jnp.concatenate([column_norm(kernel) for kernel in kernels])
    return trainable | {"magnitudes": {target.name: norms}}, frozen


def factors(cfg: DoRAConfig, groups: Tree, target: Target, spec: AdapterSpec) -> Tree:
    """LoRA's, and the magnitudes."""
    own = groups["magnitudes"][target.name]
    return lora.factors(cfg, groups, target, spec) | {"magnitude": own}
