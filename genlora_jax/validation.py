"""Checks of settings, each of which raises a ValueError that names the field, numbers and files."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = float(jnp.finfo(jnp.float32).max)


def require(condition: bool, message: str) -> None:
    """Raises ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_choice(field: str, value: object, choices: Collection[object]) -> None:
    """Raises ValueError unless a field has one of the values."""
    require(value in choices, f"{field} must be one of {tuple(choices)}, got {value!r}")


def require_int(field: str, value: object, least: int) -> None:
    """Raises ValueError unless a field is a whole number of at least this size, and of 32 bits."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole and least <= value <= LARGEST_INT  # type: ignore[operator]
    bounds = f">= {least}" if not whole or value < least else f"<= {LARGEST_INT}"  # type: ignore[operator]
    require(fits, f"{field} must be a whole number {bounds}, got {value!r:.40}")


def require_float(field: str, value: float, least: float, *, above: bool = False) -> None:
    """Raises ValueError unless a field is finite and at least (with `above`: above) a bound."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = fits and abs(value) <= LARGEST_FLOAT
    fits = fits and (value > least if above else value >= least)
    sign = ">" if above else ">="
    require(fits, f"{field} must be a finite number {sign} {least}, got {value!r:.40}")


@jax.jit
def all_finite(value: Any) -> jax.Array:
    """Whether an array holds neither NaN nor infinity: a scalar that stays on the devices."""
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.array(True)
    return jnp.isfinite(value).all()


def first_not_finite(tree: Any) -> str | None:
    """The name of the first array in a tree that holds a NaN or an infinity, or None.

    Arrays may be sharded. All are checked before the first answer is waited for.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    finite = jax.device_get([all_finite(leaf) for _, leaf in leaves])
    wrong = [path for (path, _), ok in zip(leaves, finite, strict=True) if not ok]
    return jax.tree_util.keystr(wrong[0], simple=True, separator=".") if wrong else None


def no_result(what: str) -> FloatingPointError:
    """The error of a model that gives NaN or infinities, of which `what` says."""
    return FloatingPointError(
        f"the model's {what} are not finite: base or adapter had diverged, or values overflow in "
        "the dtype of the computation (try float32)"
    )


def listed(names: Collection[str], most: int = 3) -> str:
    """Names in words: the first few, and how many more there are."""
    first, more = sorted(names)[:most], len(names) - most
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def refuse_pointer(file: Path, *, named: Path | None = None) -> None:
    """Raises ValueError if a file is what Git LFS leaves in the place of one it has not got.

    `named` is what the error calls it, if `file` is a copy.
    """
    named = named or file
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{named} is a Git LFS pointer, not the file itself: run `git lfs pull` in "
                f"{named.parent}"
            )
