"""The members of a sweep, and the recipe whose grid names them."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

from genlora_jax.methods.config import AdapterConfig
from genlora_jax.training.recipe import Recipe
from genlora_jax.validation import require, require_float, require_int


@dataclass(frozen=True, kw_only=True)
class Member:
    """The numbers in which a member of a sweep differs from the others.

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
        require_float("learning_rate", self.learning_rate, 0.0, above=True)
        require_float("generator_ratio", self.generator_ratio, 0.0, above=True)
        require_int("seed", self.seed, 0)
        if self.alpha is not None:
            require_float("alpha", self.alpha, 0.0, above=True)

    def config(self, cfg: AdapterConfig) -> AdapterConfig:
        """The sweep's config with this member's alpha.

        Raises:
            ValueError: If there is an alpha, and the method has none.
        """
        return cfg if self.alpha is None else cfg.with_alpha(self.alpha)


FIELDS = tuple(field.name for field in dataclasses.fields(Member))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The members: every combination of the lists, or those named one by one.

    Attributes:
        learning_rate: Values of `optim.learning_rate`.
        generator_ratio: Values of `optim.generator_ratio`.
        seed: Values of `train.seed`.
        alpha: Values of `adapter.alpha`.
        members: Instead of lists, members of any of these fields; the recipe has the others.
    """

    learning_rate: list[float] | None = None
    generator_ratio: list[float] | None = None
    seed: list[int] | None = None
    alpha: list[float] | None = None
    members: list[dict[str, int | float]] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        for name in (*FIELDS, "members"):
            empty = getattr(self, name) == []
            require(not empty, f"grid.{name} is empty: give values, or leave it out")
        lists = [name for name in FIELDS if getattr(self, name) is not None]
        if self.members and lists:
            raise ValueError(f"grid.members and grid.{lists[0]}: give either members or lists")
        for number, member in enumerate(self.members or [], 1):
            if unknown := sorted(set(member) - set(FIELDS)):
                raise ValueError(
                    f"grid.members: member {number} has an unknown field {unknown[0]}; "
                    f"fields are {', '.join(FIELDS)}"
                )


@dataclass(frozen=True, kw_only=True)
class SweepRecipe(Recipe):
    """A recipe and the grid to sweep.

    Attributes:
        grid: The members.
        members_per_pass: Members whose activations are in memory at a time; divides their number,
            and is a multiple of `mesh.data`. Null for all.
        steps_per_call: Most steps in one call of the device.
    """

    grid: Grid = field(default_factory=Grid)
    members_per_pass: int | None = None
    steps_per_call: int = 16

    def __post_init__(self) -> None:
        """Raises ValueError that names the fields at fault."""
        super().__post_init__()
        require_int("steps_per_call", self.steps_per_call, 1)
        require(
            self.model.remat != "auto",
            "model.remat auto: a sweep does not choose; give dots or full, or leave it out",
        )
        for name in ("resume", "distributed", "wandb"):
            given = getattr(self.train, name)
            require(not given, f"train.{name}: a sweep has no such thing; leave it out")
        if self.data.eval is None:
            raise ValueError("data.eval is missing: a sweep needs it to tell which member is best")

    def members(self) -> list[Member]:
        """The members of the grid.

        Raises:
            ValueError: If a value cannot be or means nothing to the method, or two are alike.
        """
        defaults: dict[str, Any] = {
            "learning_rate": self.optim.learning_rate,
            "generator_ratio": self.optim.generator_ratio,
            "seed": self.train.seed,
            "alpha": getattr(self.adapter, "alpha", None),
        }
        rows = self.grid.members
        if rows is None:
            lists = {name: getattr(self.grid, name) for name in FIELDS}
            lists = {name: values for name, values in lists.items() if values is not None}
            rows = [
                dict(zip(lists, row, strict=True)) for row in itertools.product(*lists.values())
            ]
        if any("generator_ratio" in row for row in rows) and not self.adapter.has_generators:
            method = type(self.adapter).__name__
            raise ValueError(f"grid.generator_ratio means nothing to {method}: leave it out")
        members: list[Member] = []
        for row in rows:
            try:
                member = Member(**defaults | row)
                member.config(self.adapter)
            except ValueError as error:
                raise ValueError(f"grid: {error}") from None
            if member in members:
                raise ValueError(f"grid: {member} is there twice")
            members.append(member)
        return members
