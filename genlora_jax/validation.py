"""Checks of settings: each raises a ValueError that names the field at fault."""

import math
from collections.abc import Collection


def require(condition: bool, message: str) -> None:
    """Raises ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_choice(field: str, value: object, choices: Collection[object]) -> None:
    """Raises ValueError unless a field has one of the values."""
    require(value in choices, f"{field} must be one of {tuple(choices)}, got {value!r}")


def require_int(field: str, value: object, least: int) -> None:
    """Raises ValueError unless a field is a whole number of at least this size."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, f"{field} must be a whole number >= {least}, got {value!r}")  # type: ignore[operator]


def require_float(field: str, value: float, least: float, *, above: bool = False) -> None:
    """Raises ValueError unless a field is finite and at least (with `above`: above) a bound."""
    fits = isinstance(value, (int, float)) and math.isfinite(value)
    fits = fits and (value > least if above else value >= least)
    sign = ">" if above else ">="
    require(fits, f"{field} must be a finite number {sign} {least}, got {value!r}")
