"""NOLA (arXiv 2310.02556): A and B are sums of random matrices, whose weights are trained."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from genlora_jax.factors.kind import EXACT, Leaves
from genlora_jax.methods.config import Groups, Kernels, LowRankConfig
from genlora_jax.seeded_random import seeded_uniform
from genlora_jax.targets import Target
from genlora_jax.validation import require_int


@dataclass(frozen=True, kw_only=True)
class NOLAConfig(LowRankConfig):
    """NOLA (arXiv 2310.02556): `A = sum_i alpha_i A_i` and `B = sum_j beta_j B_j`.

    The random matrices are common to all layers of a target and rebuilt from the seed.

    Attributes:
        count: Number of random matrices on either side.
    """

    rank: int = 8
    count: int = 256

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        require_int("count", self.count, 1)

    def init(
        self, key: jax.Array, target: Target, targets: tuple[Target, ...], kernels: Kernels
    ) -> tuple[Groups, Groups]:
        """Random weights for A, and zeros for B."""
        shape = (target.depth, self.count)
        weights = {"a": jax.random.normal(key, shape) / self.count**0.5, "b": jnp.zeros(shape)}
        return {"mixtures": {target.name: weights}}, {}

    def factors(self, groups: Groups, target: Target, targets: tuple[Target, ...]) -> Leaves:
        """The two sums."""
        weights = groups["mixtures"][target.name]
        a, b = (
            jnp.einsum("lk,knr->lnr", weights[side], self.matrices(target, side), precision=EXACT)
            for side in target.lengths
        )
        return self.scaled(a, b.swapaxes(1, 2))

    def matrices(self, target: Target, side: Literal["a", "b"]) -> jax.Array:
        """The random matrices of one side, `[count, n, r]`, uniform as LoRA's A is."""
        shape = (self.count, target.lengths[side], self.rank)
        bound = float(target.d_in**-0.5)
        return seeded_uniform(self.seed, f"{target.name}/{side}/nola", shape, bound)
