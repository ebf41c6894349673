"""Factors: what an adapter stands for at one module. A kind a file; this is their table."""

from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.factors.delta import DELTA
from genlora_jax.factors.dora import DORA
from genlora_jax.factors.hira import HIRA
from genlora_jax.factors.kind import Kind, Leaves
from genlora_jax.factors.low_rank import LOW_RANK

KINDS: tuple[Kind, ...] = (LOW_RANK, DORA, HIRA, DELTA)
LEAVES = tuple(dict.fromkeys(leaf for kind in KINDS for leaf in kind.axes))
SCALED = {kind.scaled for kind in KINDS if kind.scaled}
_BY_LEAVES = {frozenset(kind.axes): kind for kind in KINDS}


def kind_of(leaves: Mapping[str, Any], module: str) -> Kind:
    """The kind of a module's factors.

    Raises:
        ValueError: If they are those of no kind; names the module.
    """
    if (kind := _BY_LEAVES.get(frozenset(leaves))) is None:
        kinds = "; ".join(f"{', '.join(kind.axes)} ({kind.name})" for kind in KINDS)
        raise ValueError(f"factors of {module} hold {sorted(leaves)}; there are {kinds}")
    return kind


def by_module(factors: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[Kind, Leaves]]:
    """The kind and the leaves of each adapted module, by its path.

    Raises:
        ValueError: If a module's leaves are those of no kind.
    """
    modules: dict[tuple[str, ...], Leaves] = {}
    for path, leaf in flatten_dict(dict(factors)).items():
        modules.setdefault(path[:-1], {})[path[-1]] = leaf
    return {path: (kind_of(leaves, ".".join(path)), leaves) for path, leaves in modules.items()}


def refuse_uncombinable(factors: Mapping[str, Any], what: str) -> None:
    """Raises ValueError if some factors are of a kind that cannot be combined."""
    for path, (kind, leaves) in by_module(factors).items():
        if not kind.combines:
            extra = next(leaf for leaf in leaves if leaf not in LOW_RANK.axes)
            raise ValueError(
                f"{what} takes A and B alone; {'.'.join(path)} has a {extra} ({kind.option}): "
                "merge it into the base instead"
            )


def in_dtype(factors: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """A tree of factors in the dtype in which layers use them."""
    flat: dict[tuple[str, ...], jax.Array] = {}
    for path, (kind, leaves) in by_module(factors).items():
        for leaf, value in leaves.items():
            flat[(*path, leaf)] = value if kind.in_float32 else value.astype(dtype)
    return unflatten_dict(flat)
