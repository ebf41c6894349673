"""DoRA (arXiv 2402.09353): LoRA decides a kernel's direction, a magnitude a column its length."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from genlora_jax.base.kernel import read_kernel
from genlora_jax.factors.dora import column_norm
from genlora_jax.factors.kind import Leaves
from genlora_jax.methods.config import Groups, Kernels
from genlora_jax.methods.lora import LoRAConfig
from genlora_jax.targets import Target
from genlora_jax.validation import require


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """DoRA (arXiv 2402.09353): LoRA, and a trained magnitude for each column of the kernel."""

    reads_base: ClassVar[bool] = True
    starts_from_peft: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        require(not self.hadamard, "DoRA adds its delta to the kernel: leave hadamard out")

    def init(
        self, key: jax.Array, target: Target, targets: tuple[Target, ...], kernels: Kernels
    ) -> tuple[Groups, Groups]:
        """LoRA's factors, and the norms of the base's columns."""
        trainable, frozen = super().init(key, target, targets, kernels)
        # A layer at a time: a quantised kernel is dequantised for it.
        norms = jnp.concatenate(
            [
                jax.lax.map(lambda kernel: column_norm(read_kernel(kernel, jnp.float32)), stack)
                for stack in kernels
            ]
        )
        return trainable | {"magnitudes": {target.name: norms}}, frozen

    def factors(self, groups: Groups, target: Target, targets: tuple[Target, ...]) -> Leaves:
        """LoRA's, and the magnitudes."""
        magnitude = groups["magnitudes"][target.name]
        return super().factors(groups, target, targets) | {"magnitude": magnitude}
