"""Members of a sweep: what each has of its own, and what became of it."""

import math
from dataclasses import dataclass

import jax
import numpy as np

from genlora_jax.adapter import Adapter
from genlora_jax.methods.config import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class Member:
    """What one member of a sweep has of its own; all else is the recipe's.

    Attributes:
        learning_rate: As `optim.learning_rate`.
        generator_ratio: As `optim.generator_ratio`.
        seed: As `train.seed`: of the adapter's initial values and of dropout.
        alpha: As `adapter.alpha`; None for the config's.
    """

    learning_rate: float
    generator_ratio: float
    seed: int
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        for name in ("learning_rate", "generator_ratio", "alpha"):
            value = getattr(self, name)
            if name == "alpha" and value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not whole or self.seed < 0:
            raise ValueError(f"seed must be a whole number >= 0, got {self.seed!r}")

    def config(self, cfg: AdapterConfig) -> AdapterConfig:
        """The sweep's config with this member's alpha.

        Raises:
            ValueError: If there is an alpha, and the method has none.
        """
        return cfg if self.alpha is None else cfg.with_alpha(self.alpha)


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What became of a sweep's members.

    Attributes:
        members: As they were given.
        loss: Training losses (nats), `[steps, members]`.
        grad_norm: Norms of the gradients before clipping, `[steps, members]`.
        eval_steps: Steps after which all were evaluated, `[evaluations]`.
        eval_loss: Their losses (nats), `[evaluations, members]`; NaN or infinite if diverged.
        best: Each member's adapter at its lowest evaluation loss, leaves `[members, ...]`;
            its initial one if no evaluation was finite.
        final: Their adapters after the last step.
    """

    members: tuple[Member, ...]
    loss: np.ndarray
    grad_norm: np.ndarray
    eval_steps: np.ndarray
    eval_loss: np.ndarray
    best: Adapter
    final: Adapter

    @property
    def diverged(self) -> np.ndarray:
        """First step at which a member's loss or gradient was not finite, `[members]`; 0: none."""
        bad = ~(np.isfinite(self.loss) & np.isfinite(self.grad_norm))
        first = np.where(bad.any(axis=0), bad.argmax(axis=0) + 1, 0)
        late = (first == 0) & ~np.isfinite(self.eval_loss[-1])  # the last step itself
        return np.where(late, len(self.loss), first)

    @property
    def best_loss(self) -> np.ndarray:
        """Lowest evaluation losses, `[members]`; infinite if none was finite."""
        return np.where(np.isfinite(self.eval_loss), self.eval_loss, np.inf).min(axis=0)

    @property
    def best_step(self) -> np.ndarray:
        """Steps of the lowest evaluation losses, `[members]`; 0 if none was finite."""
        finite = np.where(np.isfinite(self.eval_loss), self.eval_loss, np.inf)
        steps = self.eval_steps[finite.argmin(axis=0)]
        return np.where(np.isfinite(self.best_loss), steps, 0)

    @property
    def ranking(self) -> list[int]:
        """Indices of members by lowest evaluation loss, `best_loss`.

        One that diverged later keeps its place: its best adapter is from before.
        """
        return [int(i) for i in np.argsort(self.best_loss, kind="stable")]

    def adapter(self, index: int) -> Adapter:
        """One member's best adapter, with the config that the member's alpha makes."""
        adapter = jax.tree.map(lambda leaf: leaf[index], self.best)
        return adapter.with_config(self.members[index].config(adapter.config))
