"""Full fine-tuning: a delta for every value of the kernel."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from genlora_jax.factors.kind import Leaves
from genlora_jax.methods.config import AdapterConfig, Groups, Kernels
from genlora_jax.targets import Target


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """Full fine-tuning: a whole delta for every target."""

    def init(
        self, key: jax.Array, target: Target, targets: tuple[Target, ...], kernels: Kernels
    ) -> tuple[Groups, Groups]:
        """Zeros."""
        zeros = jnp.zeros((target.depth, target.d_in, target.d_out), jnp.float32)
        return {"deltas": {target.name: zeros}}, {}

    def factors(self, groups: Groups, target: Target, targets: tuple[Target, ...]) -> Leaves:
        """The delta as it is."""
        return {"delta": groups["deltas"][target.name]}
