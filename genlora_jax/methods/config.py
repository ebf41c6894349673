"""What the configs of all methods share, and what other code asks of any of them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax

from genlora_jax.factors.hira import as_gain
from genlora_jax.factors.kind import Leaves
from genlora_jax.targets import Target, TargetSelection
from genlora_jax.validation import require, require_choice, require_float, require_int

Groups = dict[str, Any]  # leaves by group and name: {group: {name: ...}}
Kernels = tuple[jax.Array, ...]  # a target's kernels in the base, [layers, d_in, d_out] each


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(TargetSelection):
    """What every method shares: which modules it adapts. A method is a subclass.

    Attributes:
        dropout: Probability with which an input of the adapter is zeroed in training.
        seed: Seed of whatever is rebuilt rather than stored.
    """

    # Whether the initial values are computed from the base's kernels, not just from their shapes.
    reads_base: ClassVar[bool] = False
    # Whether `optim.generator_ratio` means something.
    has_generators: ClassVar[bool] = False
    # Whether a PEFT LoRA adapter's factors can be its initial values.
    starts_from_peft: ClassVar[bool] = False

    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        for field in dataclasses.fields(self):
            if field.type is bool:
                require_choice(field.name, getattr(self, field.name), (True, False))
        require_float("dropout", self.dropout, 0.0)
        require(self.dropout < 1.0, f"dropout must be below 1, got {self.dropout!r}")
        require_int("seed", self.seed, 0)

    def init(
        self, key: jax.Array, target: Target, targets: tuple[Target, ...], kernels: Kernels
    ) -> tuple[Groups, Groups]:
        """What a target's adapter starts at; the delta it stands for is zero.

        Args:
            key: PRNG key of the target.
            target: The target, of L layers.
            targets: All targets of the adapter.
            kernels: The base's kernels, L layers in all, if the config `reads_base`; else empty.

        Returns:
            Leaves that are trained and leaves that are kept, float32. The name is the target's, or
            another one for what targets share: the first target that brings it gives its value.
        """
        raise self._no_method()

    def factors(self, groups: Groups, target: Target, targets: tuple[Target, ...]) -> Leaves:
        """The factors of a target over all of its layers.

        Args:
            groups: What `init` made for all targets, trained and kept.
            target: The target.
            targets: All targets of the adapter.

        Returns:
            Leaves of one of `genlora_jax.factors.KINDS`, `[L, ...]`, with the scale folded in.
        """
        raise self._no_method()

    def _no_method(self) -> ValueError:
        return ValueError(
            f"{type(self).__name__} is the config of no method; take LoRAConfig or another of "
            "genlora_jax.methods"
        )

    @property
    def scale(self) -> float:
        """The factor on the delta that `factors` folds in."""
        return 1.0

    @property
    def summary(self) -> str:
        """The method and its size in words."""
        return type(self).__name__

    def attainable_rank(self, n: int, side: Literal["a", "b"] = "a") -> int | None:
        """Largest rank that a side of length n can have; None if the method has no such limit."""
        return None

    def lora_size(self, target: Target) -> int | None:
        """Parameters of LoRA of the same rank on a target; None if there is no rank."""
        return None

    def with_alpha(self, alpha: float) -> "AdapterConfig":
        """The same config with another alpha.

        Raises:
            ValueError: If the method has none.
        """
        raise ValueError(f"alpha means nothing to {type(self).__name__}: leave it out")

    @classmethod
    def from_older(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this version for those that an earlier version stored.

        Raises:
            ValueError: If a setting is gone.
        """
        return dict(fields)

    def first_difference(self, other: "AdapterConfig") -> tuple[str, Any, Any] | None:
        """The first setting but dropout in which another config differs, and both values."""
        if type(self) is not type(other):
            return "method", type(self).__name__, type(other).__name__
        for field in dataclasses.fields(self):
            values = getattr(self, field.name), getattr(other, field.name)
            if field.name != "dropout" and values[0] != values[1]:
                return field.name, *values
        return None

    def check_is(self, other: "AdapterConfig") -> None:
        """Raises ValueError unless this is the config that an adapter was made with."""
        if found := self.first_difference(other):
            field, given, made = found
            raise ValueError(
                "this config is not the one that the adapter was made with: "
                f"{field} is {given!r}, not {made!r}"
            )


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """What the methods share whose delta is made of a product `A @ B`.

    Attributes:
        rank: Number of basis vectors on either side of a target's delta.
        alpha: The delta is scaled by `alpha / rank`, or by `alpha / sqrt(rank)` with
            `scaling="rslora"`; not at all if it is None.
        scaling: `"lora"` or `"rslora"` (arXiv 2312.03732).
    """

    rank: int = 32
    alpha: float | None = 16.0
    scaling: Literal["lora", "rslora"] = "lora"

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        require_int("rank", self.rank, 1)
        if self.alpha is not None:
            require_float("alpha", self.alpha, 0.0, above=True)
        require_choice("scaling", self.scaling, ("lora", "rslora"))

    @property
    def scale(self) -> float:
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @property
    def summary(self) -> str:
        return f"{type(self).__name__}, rank {self.rank}, scale {self.scale:g}"

    def lora_size(self, target: Target) -> int:
        return self.rank * target.depth * (target.d_in + target.d_out)

    def with_alpha(self, alpha: float) -> "LowRankConfig":
        return dataclasses.replace(self, alpha=alpha)

    def scaled(self, a: jax.Array, b: jax.Array) -> Leaves:
        """A and B as factors, with the scale folded into B."""
        return {"a": a, "b": b * self.scale}


@dataclass(frozen=True, kw_only=True)
class TwoSidedConfig(LowRankConfig):
    """What the methods share that make a basis on either side of each kernel: LoRA and GenLoRA.

    Attributes:
        side_a: `"trained"`, or `"seeded"` (as in LoRA-FA, arXiv 2308.03303): A is random, rebuilt
            from `seed` and never trained or stored.
        hadamard: The delta is `W * (A @ B)`, elementwise with the base's kernel W (HiRA, ICLR
            2025), which has a high rank at any rank of A and B.
    """

    side_a: Literal["trained", "seeded"] = "trained"
    hadamard: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        require_choice("side_a", self.side_a, ("trained", "seeded"))

    def attainable_rank(self, n: int, side: Literal["a", "b"] = "a") -> int:
        return n

    def scaled(self, a: jax.Array, b: jax.Array) -> Leaves:
        return as_gain(a, b * self.scale) if self.hadamard else super().scaled(a, b)
