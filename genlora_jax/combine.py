"""Sets of factors combined into one: sums and differences of deltas."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict


def combine(
    sets: Sequence[Mapping[str, Any]], weights: Sequence[float | jax.Array]
) -> dict[str, Any]:
    """One set of factors whose deltas are the weighted sum of the deltas of several.

    Exact: factors are put side by side, so that ranks add up. Pure; works under `jit`, also with
    traced weights.

    Args:
        sets: Sets of factors for the same base. A module need not be in all of them.
        weights: One number a set; a negative one subtracts.

    Returns:
        A tree that mirrors the base's, `a` `[..., d_in, sum of ranks]`, `b` `[..., sum, d_out]`.

    Raises:
        ValueError: If there are no sets, a weight is missing, or shapes disagree.
    """
    if not sets or len(sets) != len(weights):
        raise ValueError(f"combine needs a weight a set: {len(sets)} sets, {len(weights)} weights")
    found: dict[tuple[str, ...], list[jax.Array]] = {}
    for factors, weight in zip(sets, weights, strict=True):
        for path, leaf in flatten_dict(dict(factors)).items():
            found.setdefault(path, []).append(leaf * weight if path[-1] == "b" else leaf)
    flat = {}
    for path, leaves in found.items():
        axis = -1 if path[-1] == "a" else -2
        if len({(*leaf.shape[:axis], *leaf.shape[axis:][1:]) for leaf in leaves}) > 1:
            shapes = ", ".join(str(leaf.shape) for leaf in leaves)
            raise ValueError(f"{'.'.join(path)} differs between the sets in shape: {shapes}")
        flat[path] = jnp.concatenate(leaves, axis=axis)
    return unflatten_dict(flat)
