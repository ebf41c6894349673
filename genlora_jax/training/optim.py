"""The optimizer: AdamW with warm-up and cosine decay, rates of their own for some groups."""

from dataclasses import dataclass
from typing import Any

import jax
import optax

Number = float | jax.Array


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of the optimizer.

    Attributes:
        learning_rate: Peak rate of whatever has no other.
        generator_ratio: The generators' rate over the latents' (GenLoRA).
        b_ratio: The rate of B over that of A, where factors are trained as they are (LoRA, DoRA,
            PiSSA); LoRA+ (arXiv 2402.12354) has 2 to 16.
        warmup: Share of the steps in which the rate rises from 0.
        final_ratio: The rate that the cosine ends at, one step after the last, over the peak.
        weight_decay: Decoupled weight decay.
        clip: Largest global norm of the gradient; None for no limit.
        b1: Adam's decay of the first moment.
        b2: Adam's decay of the second moment.
        eps: Added to the root of Adam's second moment.
    """

    learning_rate: float = 2e-3
    generator_ratio: float = 0.3
    b_ratio: float = 1.0
    warmup: float = 0.05
    final_ratio: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        for field in ("learning_rate", "generator_ratio", "b_ratio", "eps"):
            if not getattr(self, field) > 0:
                raise ValueError(f"optim.{field} must be positive, got {getattr(self, field)}")
        for field in ("warmup", "final_ratio"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"optim.{field} must lie in [0, 1], got {getattr(self, field)}")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay must not be negative, got {self.weight_decay}")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"optim.{field} must lie in [0, 1), got {getattr(self, field)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"optim.clip must be positive, got {self.clip}")


def learning_rate_schedule(
    cfg: OptimConfig, steps: int, *, peak: Number | None = None
) -> optax.Schedule:
    """Linear warm-up, then a cosine towards `final_ratio` of the peak; no step is at rate 0.

    Args:
        cfg: Settings.
        steps: Length of the run.
        peak: Peak rate, which may be traced; by default the config's.
    """
    warmup = max(round(cfg.warmup * steps), 1)
    share = optax.warmup_cosine_decay_schedule(
        init_value=1.0 / warmup,
        peak_value=1.0,
        warmup_steps=warmup - 1,
        decay_steps=max(steps, warmup),
        end_value=cfg.final_ratio,
    )
    peak = cfg.learning_rate if peak is None else peak
    return lambda count: peak * share(count)


def make_optimizer(
    cfg: OptimConfig,
    steps: int,
    *,
    learning_rate: Number | None = None,
    generator_ratio: Number | None = None,
) -> optax.GradientTransformation:
    """The optimizer of an adapter's `trainable` tree, whose top level names the groups.

    Args:
        cfg: Settings.
        steps: Length of the run, for the schedule.
        learning_rate: Instead of the config's; it may be traced.
        generator_ratio: Instead of the config's; it may be traced.

    Returns:
        The optimizer. Its `init` raises ValueError if `b_ratio` is given for an adapter without
        factors.
    """
    clip = optax.identity() if cfg.clip is None else optax.clip_by_global_norm(cfg.clip)
    own_ratio = cfg.generator_ratio if generator_ratio is None else generator_ratio
    ratios = {"generators": own_ratio, "b": cfg.b_ratio, "rest": 1.0}

    def labels(trainable: dict[str, Any]) -> dict[str, Any]:
        if cfg.b_ratio != 1.0 and "factors" not in trainable:
            raise ValueError("optim.b_ratio: this adapter has no factor B of its own to train")
        groups: dict[str, Any] = dict.fromkeys(trainable, "rest")
        if "generators" in trainable:
            groups["generators"] = "generators"
        if "factors" in trainable:
            groups["factors"] = {
                name: {side: "b" if side == "b" else "rest" for side in sides}
                for name, sides in trainable["factors"].items()
            }
        return groups

    return optax.chain(
        clip,
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(cfg, steps, peak=learning_rate)),
        optax.partition({name: optax.scale(ratio) for name, ratio in ratios.items()}, labels),
    )
