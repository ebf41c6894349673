"""Sine-LoRA (arXiv 2403.19243): the sine of a product of low rank, which has a high one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from genlora_jax.factors.kind import Leaves, exact_matmul
from genlora_jax.methods.config import Groups, Kernels, LowRankConfig
from genlora_jax.methods.lora import LoRAConfig
from genlora_jax.targets import Target
from genlora_jax.validation import require_float


@dataclass(frozen=True, kw_only=True)
class SineLoRAConfig(LowRankConfig):
    """Sine-LoRA (arXiv 2403.19243): the delta is `scale * sin(omega A B) / sqrt(d_in)`.

    The delta is formed whole, so that a step takes as much memory and time as full fine-tuning
    less its optimizer.

    Attributes:
        omega: Frequency of the sine.
    """

    rank: int = 8
    omega: float = 200.0

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        require_float("omega", self.omega, 0.0, above=True)

    def init(
        self, key: jax.Array, target: Target, targets: tuple[Target, ...], kernels: Kernels
    ) -> tuple[Groups, Groups]:
        """LoRA's: a random A, and a B of zeros."""
        return LoRAConfig(rank=self.rank).init(key, target, targets, kernels)

    def factors(self, groups: Groups, target: Target, targets: tuple[Target, ...]) -> Leaves:
        """The whole delta."""
        sides = groups["factors"][target.name]
        sine = jnp.sin(self.omega * exact_matmul(sides["a"], sides["b"]))
        return {"delta": self.scale / target.d_in**0.5 * sine}
