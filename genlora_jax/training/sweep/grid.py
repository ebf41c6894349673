"""The recipe of a sweep: a recipe of fine-tuning, and the grid of members."""

import dataclasses
import itertools
from dataclasses import dataclass, field

from genlora_jax.training.recipe import Recipe
from genlora_jax.training.sweep.members import Member

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
            if getattr(self, name) == []:
                raise ValueError(f"grid.{name} is empty: give values, or leave it out")
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
        grid: What the members have of their own.
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
        if self.steps_per_call < 1:
            raise ValueError(f"steps_per_call must be at least 1, got {self.steps_per_call}")
        for name in ("resume", "distributed", "wandb"):
            if getattr(self.train, name):
                raise ValueError(f"train.{name}: a sweep has no such thing; leave it out")
        if self.data.eval is None:
            raise ValueError("data.eval is missing: a sweep needs it to tell which member is best")


def choose_members(recipe: SweepRecipe) -> list[Member]:
    """The members of a recipe's grid.

    Raises:
        ValueError: If a value cannot be or means nothing to the method, or two members are alike.
    """
    defaults = {
        "learning_rate": recipe.optim.learning_rate,
        "generator_ratio": recipe.optim.generator_ratio,
        "seed": recipe.train.seed,
        "alpha": getattr(recipe.adapter, "alpha", None),
    }
    named = recipe.grid.members
    rated = recipe.grid.generator_ratio or any("generator_ratio" in m for m in named or [])
    if rated and not recipe.adapter.has_generators:
        method = type(recipe.adapter).__name__
        raise ValueError(f"grid.generator_ratio means nothing to {method}: leave it out")
    if named is None:
        lists = {name: getattr(recipe.grid, name) or [value] for name, value in defaults.items()}
        named = [dict(zip(lists, v, strict=True)) for v in itertools.product(*lists.values())]
    members: list[Member] = []
    for values in named:
        try:
            member = Member(**(defaults | values))  # type: ignore[arg-type]
            member.config(recipe.adapter)
        except ValueError as error:
            raise ValueError(f"grid: {error}") from None
        if member in members:
            raise ValueError(f"grid: {member} is there twice")
        members.append(member)
    return members
