"""LoRA of which one side is common to all layers of a target."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from genlora_jax.factors.kind import Leaves
from genlora_jax.methods.config import Groups, Kernels, LowRankConfig
from genlora_jax.targets import Target
from genlora_jax.validation import require_choice


@dataclass(frozen=True, kw_only=True)
class TiedLoRAConfig(LowRankConfig):
    """LoRA of which one side is common to all layers of a target.

    With B tied it is Lily (arXiv 2407.09946) with one B, which needs no router.

    Attributes:
        tied: The common side.
    """

    tied: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        require_choice("tied", self.tied, ("a", "b"))

    def init(
        self, key: jax.Array, target: Target, targets: tuple[Target, ...], kernels: Kernels
    ) -> tuple[Groups, Groups]:
        """A random A, and a B of zeros; the tied side has one layer."""
        depth = {"a": target.depth, "b": target.depth, self.tied: 1}
        bound = float(target.d_in**-0.5)  # as PEFT: Kaiming-uniform with a = sqrt(5)
        shape = (depth["a"], target.d_in, self.rank)
        a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        b = jnp.zeros((depth["b"], self.rank, target.d_out), jnp.float32)
        return {"factors": {target.name: {"a": a, "b": b}}}, {}

    def factors(self, groups: Groups, target: Target, targets: tuple[Target, ...]) -> Leaves:
        """The factors, the tied side repeated."""
        sides = groups["factors"][target.name]
        whole = {x: jnp.broadcast_to(v, (target.depth, *v.shape[1:])) for x, v in sides.items()}
        return self.scaled(**whole)
