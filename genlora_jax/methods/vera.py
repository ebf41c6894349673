"""VeRA (arXiv 2310.11454): random factors common to all kernels, scaled by trained vectors."""

import jax
import jax.numpy as jnp

from genlora_jax.config import VeRAConfig
from genlora_jax.generators import seeded_uniform
from genlora_jax.methods.method import Kernels, Tree
from genlora_jax.targets import AdapterSpec, Target


def init(
    cfg: VeRAConfig, key: jax.Array, target: Target, spec: AdapterSpec, kernels: Kernels
) -> tuple[Tree, Tree]:
    """The vectors d, which scale A's columns, and b, which scale B's."""
    d = jnp.full((target.depth, cfg.rank), cfg.d_initial, jnp.float32)
    b = jnp.zeros((target.depth, target.d_out), jnp.float32)
    return {"vectors": {target.name: {"d": d, "b": b}}}, {}


def projections(cfg: VeRAConfig, spec: AdapterSpec) -> tuple[jax.Array, jax.Array]:
    """The random A `[d_in, r]` and B `[r, d_out]` of the largest sizes that a target has.

    Kaiming-uniform as in PEFT, from the adapter's seed.
    """
    d_in = max(target.d_in for target in spec.targets)
    d_out = max(target.d_out for target in spec.targets)
    a = seeded_uniform(spec.seed, "vera/a", (d_in, cfg.rank), (6 / d_in) ** 0.5)
    b = seeded_uniform(spec.seed, "vera/b", (cfg.rank, d_out), (6 / cfg.rank) ** 0.5)
    return a, b


def factors(cfg: VeRAConfig, groups: Tree, target: Target, spec: AdapterSpec) -> Tree:
    """The target's share of the projections, with both vectors multiplied into B."""
    a, b = projections(cfg, spec)
    vectors = groups["vectors"][target.name]
    return {
        "a": jnp.broadcast_to(a[: target.d_in], (target.depth, target.d_in, cfg.rank)),
        "b": vectors["d"][:, :, None] * b[:, : target.d_out] * vectors["b"][:, None, :],
    }
