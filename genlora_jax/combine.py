"""Several sets of factors as one: their deltas' weighted sum, or a choice for each row."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.factors import refuse_uncombinable


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
        ValueError: If there are no sets, a weight is missing, shapes disagree, or some factors are
            not A and B (DoRA, `hadamard=True`, a whole delta).
    """
    if not sets or len(sets) != len(weights):
        raise ValueError(f"combine needs a weight a set: {len(sets)} sets, {len(weights)} weights")
    found: dict[tuple[str, ...], list[jax.Array]] = {}
    for factors, weight in zip(sets, weights, strict=True):
        refuse_uncombinable(factors, "combine")
        for path, leaf in flatten_dict(dict(factors)).items():
            found.setdefault(path, []).append(leaf * weight if path[-1] == "b" else leaf)
    flat = {}
    for path, leaves in found.items():
        axis = -1 if path[-1] == "a" else -2
        _check_alike(path, leaves, axis)
        flat[path] = jnp.concatenate(leaves, axis=axis)
    return unflatten_dict(flat)


def stack(sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sets of factors side by side, for a batch in which each row has its own adapter.

    Ranks are padded with zeros to the largest, and a module that a set leaves alone gets zeros.

    Args:
        sets: Sets of factors for the same base.

    Returns:
        A tree that mirrors the base's, `a` `[..., sets, d_in, r]`, `b` `[..., sets, r, d_out]`;
        `gl.apply` takes it with `adapter_index`.

    Raises:
        ValueError: If there are no sets, shapes disagree, or some factors are not A and B.
    """
    if not sets:
        raise ValueError("stack needs at least one set of factors")
    for factors in sets:
        refuse_uncombinable(factors, "stack")
    trees = [flatten_dict(dict(factors)) for factors in sets]
    flat = {}
    for path in dict.fromkeys(path for tree in trees for path in tree):
        axis = -1 if path[-1] == "a" else -2
        found = [tree[path] for tree in trees if path in tree]
        _check_alike(path, found, axis)
        shape = list(found[0].shape)
        shape[axis] = max(leaf.shape[axis] for leaf in found)
        leaves = [_pad(tree.get(path), shape) for tree in trees]
        flat[path] = jnp.stack(leaves, axis=-3)
    return unflatten_dict(flat)


def _check_alike(path: tuple[str, ...], leaves: Sequence[jax.Array], axis: int) -> None:
    """Raises ValueError if leaves differ on another axis than that of the rank."""
    if len({(*leaf.shape[:axis], *leaf.shape[axis:][1:]) for leaf in leaves}) > 1:
        shapes = ", ".join(str(leaf.shape) for leaf in leaves)
        raise ValueError(f"{'.'.join(path)} differs between the sets in shape: {shapes}")


def _pad(leaf: jax.Array | None, shape: Sequence[int]) -> jax.Array:
    if leaf is None:
        return jnp.zeros(shape, jnp.float32)
    return jnp.pad(leaf, [(0, n - m) for n, m in zip(shape, leaf.shape, strict=True)])
