"""PiSSA (arXiv 2404.02948): LoRA that starts at the principal part of the kernel.

The paper takes that part off the base. Here the base stays and the delta is `A @ B - A0 @ B0`, of
twice the rank, so that an adapter serves, merges into and is exported for the base as it is.
"""

import jax
import jax.numpy as jnp

from genlora_jax.config import PiSSAConfig
from genlora_jax.methods.method import Kernels, Tree
from genlora_jax.targets import AdapterSpec, Target


def init(
    cfg: PiSSAConfig, key: jax.Array, target: Target, spec: AdapterSpec, kernels: Kernels
) -> tuple[Tree, Tree]:
    """A and B at the principal part, and the same kept; the scale is taken off both.

    Raises:
        ValueError: If a kernel has fewer singular values than the rank.
    """
    count = min(target.d_in, target.d_out)
    if cfg.rank > count:
        raise ValueError(f"rank {cfg.rank} exceeds {count}, the singular values of {target.name}")

    def principal(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        left, values, right = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(values[: cfg.rank] / cfg.scale)
        return left[:, : cfg.rank] * root, root[:, None] * right[: cfg.rank]

    # A layer at a time: a decomposition needs several times the kernel's memory.
    parts = [jax.lax.map(principal, kernel) for kernel in kernels]
    a, b = (jnp.concatenate(side) for side in zip(*parts, strict=True))
    sides = {target.name: {"a": a, "b": b}}
    return {"factors": sides}, {"principal": sides}


def factors(cfg: PiSSAConfig, groups: Tree, target: Target, spec: AdapterSpec) -> Tree:
    """`[A, -A0]` and `[B; B0]`."""
    own, start = groups["factors"][target.name], groups["principal"][target.name]
    return {
        "a": jnp.concatenate([own["a"], -start["a"]], axis=-1),
        "b": jnp.concatenate([own["b"], start["b"]], axis=-2),
    }
