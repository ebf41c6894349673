"""LoRA (arXiv 2106.09685): the factors are what is trained."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from genlora_jax.factors.kind import Leaves
from genlora_jax.methods.config import Groups, Kernels, TwoSidedConfig
from genlora_jax.seeded_random import seeded_uniform
from genlora_jax.targets import Target


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(TwoSidedConfig):
    """LoRA (arXiv 2106.09685): factors are stored and trained as they are."""

    starts_from_peft: ClassVar[bool] = True

    rank: int = 8

    def init(
        self, key: jax.Array, target: Target, targets: tuple[Target, ...], kernels: Kernels
    ) -> tuple[Groups, Groups]:
        """A random A, and a B of zeros."""
        sides = {"b": jnp.zeros((target.depth, self.rank, target.d_out), jnp.float32)}
        if self.side_a == "trained":
            shape = (target.depth, target.d_in, self.rank)
            bound = _bound(target)
            sides["a"] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        return {"factors": {target.name: sides}}, {}

    def factors(self, groups: Groups, target: Target, targets: tuple[Target, ...]) -> Leaves:
        """The factors as they are."""
        return self.scaled(**self.sides(groups, target))

    def sides(self, groups: Groups, target: Target) -> Leaves:
        """A and B, unscaled."""
        sides = dict(groups["factors"][target.name])
        if self.side_a == "seeded":
            shape = (target.depth, target.d_in, self.rank)
            sides["a"] = seeded_uniform(self.seed, f"{target.name}/a", shape, _bound(target))
        return sides


def _bound(target: Target) -> float:
    return float(target.d_in**-0.5)  # as PEFT: Kaiming-uniform with a = sqrt(5)
