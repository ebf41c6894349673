"""The optimizer: AdamW with warm-up and cosine decay, and other rates for some groups."""

from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict

from genlora_jax.validation import require, require_float

Number = float | jax.Array


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of the optimizer.

    Attributes:
        learning_rate: Peak rate of all that no ratio below concerns.
        generator_ratio: The generators' rate over the latents' (GenLoRA).
        basis_ratio: The rate of the generators' basis functions (weights, centres and all) over
            that of their residual (GenLoRA).
        b_ratio: The rate of B over that of A, where factors themselves are trained (LoRA, DoRA,
            PiSSA, tied LoRA, Sine-LoRA); LoRA+ (arXiv 2402.12354) has 2 to 16.
        warmup: Share of the steps in which the rate rises from 0.
        final_ratio: The rate at which the cosine ends, one step after the last, over the peak.
        weight_decay: Decoupled weight decay.
        clip: Largest global norm of the gradient; None for no limit.
        b1: Adam's decay of the first moment.
        b2: Adam's decay of the second moment.
        eps: Added to the root of Adam's second moment.
    """

    learning_rate: float = 2e-3
    generator_ratio: float = 0.3
    basis_ratio: float = 1.0
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
        for name in ("learning_rate", "generator_ratio", "basis_ratio", "b_ratio", "eps"):
            require_float(f"optim.{name}", getattr(self, name), 0.0, above=True)
        require_float("optim.weight_decay", self.weight_decay, 0.0)
        for name in ("warmup", "final_ratio"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"optim.{name} must lie in [0, 1], got {share}")
        for name in ("b1", "b2"):
            decay = getattr(self, name)
            require(0 <= decay < 1, f"optim.{name} must lie in [0, 1), got {decay}")
        if self.clip is not None:
            require_float("optim.clip", self.clip, 0.0, above=True)


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
        factors, or `basis_ratio` for one without basis functions.
    """
    ratio = cfg.generator_ratio if generator_ratio is None else generator_ratio
    ratios = {"generators": ratio, "basis": ratio * cfg.basis_ratio, "b": cfg.b_ratio, "rest": 1.0}

    def labels(trainable: dict[str, Any]) -> dict[str, Any]:
        if cfg.b_ratio != 1.0 and "factors" not in trainable:
            raise ValueError("optim.b_ratio: this adapter has no factor B to train")
        leaves = flatten_dict(trainable.get("generators", {}))
        if cfg.basis_ratio != 1.0 and not any(path[-1] == "weights" for path in leaves):
            raise ValueError("optim.basis_ratio: this adapter has no basis functions: give kernels")

        def label(path: tuple[Any, ...], _: jax.Array) -> str:
            group, leaf = path[0].key, path[-1].key
            if group == "generators":
                return "generators" if leaf == "residual" else "basis"
            return "b" if (group, leaf) == ("factors", "b") else "rest"

        return jax.tree.map_with_path(label, trainable)

    return optax.chain(
        optax.identity() if cfg.clip is None else optax.clip_by_global_norm(cfg.clip),
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(cfg, steps, peak=learning_rate)),
        optax.partition({name: optax.scale(ratio) for name, ratio in ratios.items()}, labels),
    )
