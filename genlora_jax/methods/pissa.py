"""PiSSA (arXiv 2404.02948): LoRA that starts at the principal part of the kernel.

The paper takes that part off the base. Here the base stays and the delta is `A @ B - A0 @ B0`, of
twice the rank, so that an adapter serves, merges into and is exported for the base as it is.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from genlora_jax.base.kernel import read_kernel
from genlora_jax.factors.kind import Leaves
from genlora_jax.methods.config import Groups, Kernels
from genlora_jax.methods.lora import LoRAConfig
from genlora_jax.targets import Target
from genlora_jax.validation import require


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(LoRAConfig):
    """PiSSA (arXiv 2404.02948): LoRA that starts at the kernel's principal part.

    The base stays as it is: what A and B start at is kept and subtracted, so that the factors have
    twice the rank.
    """

    reads_base: ClassVar[bool] = True
    starts_from_peft: ClassVar[bool] = False

    alpha: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        require(
            self.side_a == "trained" and not self.hadamard,
            "PiSSA starts A at the kernel: leave side_a and hadamard out",
        )

    def init(
        self, key: jax.Array, target: Target, targets: tuple[Target, ...], kernels: Kernels
    ) -> tuple[Groups, Groups]:
        """A and B at the principal part, and the same kept; the scale is taken off both.

        Raises:
            ValueError: If a kernel has fewer singular values than the rank.
        """
        count = min(target.d_in, target.d_out)
        if self.rank > count:
            raise ValueError(
                f"rank {self.rank} exceeds {count}, the singular values of {target.name}"
            )

        def principal(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
            wide = read_kernel(kernel, jnp.float32)
            left, values, right = jnp.linalg.svd(wide, full_matrices=False)
            root = jnp.sqrt(values[: self.rank] / self.scale)
            return left[:, : self.rank] * root[None], root[:, None] * right[: self.rank]

        # A layer at a time: a decomposition needs several times the kernel's memory.
        parts = [jax.lax.map(principal, kernel) for kernel in kernels]
        a, b = (jnp.concatenate(side) for side in zip(*parts, strict=True))
        sides = {target.name: {"a": a, "b": b}}
        return {"factors": sides}, {"principal": sides}

    def factors(self, groups: Groups, target: Target, targets: tuple[Target, ...]) -> Leaves:
        """`[A, -A0]` and `[B; B0]`."""
        now, start = groups["factors"][target.name], groups["principal"][target.name]
        a = jnp.concatenate([now["a"], -start["a"]], axis=-1)
        b = jnp.concatenate([now["b"], start["b"]], axis=-2)
        return self.scaled(a, b)
