"""VeRA (arXiv 2310.11454): random factors common to all kernels, scaled by trained vectors."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from genlora_jax.factors.kind import Leaves
from genlora_jax.methods.config import Groups, Kernels, LowRankConfig
from genlora_jax.seeded_random import seeded_uniform
from genlora_jax.targets import Target
from genlora_jax.validation import require_float


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(LowRankConfig):
    """VeRA (arXiv 2310.11454): random factors common to all kernels, and trained vectors.

    Attributes:
        d_initial: What the vectors on the side of A start at; those on the side of B start at 0.
    """

    rank: int = 256
    alpha: float | None = None
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        require_float("d_initial", self.d_initial, 0.0, above=True)

    def init(
        self, key: jax.Array, target: Target, targets: tuple[Target, ...], kernels: Kernels
    ) -> tuple[Groups, Groups]:
        """The vectors d, which scale A's columns, and b, which scale B's."""
        d = jnp.full((target.depth, self.rank), self.d_initial, jnp.float32)
        b = jnp.zeros((target.depth, target.d_out), jnp.float32)
        return {"vectors": {target.name: {"d": d, "b": b}}}, {}

    def factors(self, groups: Groups, target: Target, targets: tuple[Target, ...]) -> Leaves:
        """The target's share of the projections, with both vectors multiplied into B."""
        a, b = self.projections(targets)
        vectors = groups["vectors"][target.name]
        return self.scaled(
            jnp.broadcast_to(a[: target.d_in], (target.depth, target.d_in, self.rank)),
            vectors["d"][:, :, None] * b[None, :, : target.d_out] * vectors["b"][:, None, :],
        )

    def projections(self, targets: tuple[Target, ...]) -> tuple[jax.Array, jax.Array]:
        """The random A `[d_in, r]` and B `[r, d_out]` of the largest sizes that a target has.

        Kaiming-uniform as in PEFT, from the config's seed.
        """
        d_in = max(target.d_in for target in targets)
        d_out = max(target.d_out for target in targets)
        a = seeded_uniform(self.seed, "vera/a", (d_in, self.rank), (6 / d_in) ** 0.5)
        b = seeded_uniform(self.seed, "vera/b", (self.rank, d_out), (6 / self.rank) ** 0.5)
        return a, b
