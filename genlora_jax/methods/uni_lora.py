"""Uni-LoRA (arXiv 2506.00799): every element of every A and B is one of few trained numbers."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from genlora_jax.factors.kind import Leaves
from genlora_jax.methods.config import Groups, Kernels, LowRankConfig
from genlora_jax.seeded_random import seeded_uniform
from genlora_jax.targets import Target
from genlora_jax.validation import require, require_float, require_int


@dataclass(frozen=True, kw_only=True)
class UniLoRAConfig(LowRankConfig):
    """Uni-LoRA (arXiv 2506.00799): one vector, whose elements all of A and B are made of.

    Each element of each A and B is an element of the vector, drawn with the seed, over the root of
    how often that one is drawn. What the initial vector makes is taken off, so that the delta is
    zero at first, as in PiSSA; PEFT's Uni-LoRA begins beside the base.

    Attributes:
        size: Length of the vector, which is all that is trained; at most the elements of all A
            and B.
        bound: The vector is at first uniform in [-bound, bound].
    """

    rank: int = 4
    alpha: float | None = None
    size: int = 131_072
    bound: float = 0.02

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        require_int("size", self.size, 1)
        require_float("bound", self.bound, 0.0, above=True)

    def init(
        self, key: jax.Array, target: Target, targets: tuple[Target, ...], kernels: Kernels
    ) -> tuple[Groups, Groups]:
        """The vector, which all targets share, and the same kept.

        Raises:
            ValueError: If it is longer than all of A and B, of whose elements it is made.
        """
        elements = sum(self.lora_size(other) for other in targets)
        require(
            self.size <= elements,
            f"size {self.size:,} exceeds the {elements:,} elements of all A and B of rank "
            f"{self.rank}: nothing would use the rest; give size at most {elements}",
        )
        theta = jax.random.uniform(key, (self.size,), jnp.float32, -self.bound, self.bound)
        return {"vectors": {"shared": theta}}, {"initial": {"shared": theta}}

    def factors(self, groups: Groups, target: Target, targets: tuple[Target, ...]) -> Leaves:
        """`[A, -A0]` and `[B; B0]`."""
        now, start = groups["vectors"]["shared"], groups["initial"]["shared"]
        root = jax.lax.rsqrt(jnp.maximum(self.counts(targets), 1.0))
        a, b = (
            jnp.concatenate([(now * root)[drawn], (sign * start * root)[drawn]], axis=2)
            for sign, drawn in ((-1.0, self.drawn(target, "a")), (1.0, self.drawn(target, "b")))
        )
        return self.scaled(a, b.swapaxes(1, 2))

    def drawn(self, target: Target, side: Literal["a", "b"]) -> jax.Array:
        """Which element of the vector each element of a side is, `[L, n, r]`."""
        shape = (target.depth, target.lengths[side], self.rank)
        uniform = seeded_uniform(self.seed, f"{target.name}/{side}/drawn", shape, 0.5)
        places = ((uniform + 0.5) * self.size).astype(jnp.int32)
        return jnp.minimum(places, self.size - 1)

    def counts(self, targets: tuple[Target, ...]) -> jax.Array:
        """How often each element of the vector is drawn, `[size]`."""
        total = jnp.zeros(self.size, jnp.float32)
        for target in targets:
            for side in target.lengths:
                total = total.at[self.drawn(target, side).ravel()].add(1.0)
        return total
