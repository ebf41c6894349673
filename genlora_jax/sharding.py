"""Which axis of a mesh shards which axis of an array.

Adapter and optimizer are small and therefore replicated. The whole deltas of full fine-tuning are
not: they are sharded like their kernels.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genlora_jax.base.stored import StoredKernel
from genlora_jax.factors import by_module
from genlora_jax.mesh import BATCH, batch_shards
from genlora_jax.targets import module_of

_IN, _OUT = ("fsdp", "tensor"), ("tensor", "fsdp")
# Pattern on a parameter's last two names -> axes of the mesh that shard its last dimensions. What
# no pattern names (norms, biases of outputs) is replicated.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(q|k|v|qkv|gate|up|gate_up)_proj\.kernel", _IN),
    (r"(o|down)_proj\.kernel", _OUT),
    (r"(q|k|v|qkv|gate|up|gate_up)_proj\.bias", ("tensor",)),
    (r"lm_head\.kernel", _IN),
    (r"embed_tokens\.embedding", _OUT),
)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device of the mesh."""
    return NamedSharding(mesh, P())


def param_specs(params: Mapping[str, Any]) -> Any:
    """How a base's parameters, arrays or shapes, are sharded: a tree of `PartitionSpec`s."""
    flat = flatten_dict(dict(params))
    return unflatten_dict({path: _leaf_spec(path, leaf) for path, leaf in flat.items()})


def _leaf_spec(path: tuple[str, ...], leaf: Any) -> Any:
    """The spec of an array; of a quantised kernel the specs of its parts, cut as kernels are."""
    spec = _spec(path, len(leaf.shape))
    if not isinstance(leaf, StoredKernel):
        return spec
    rows, columns = spec[-2:] if spec else (None, None)
    mesh_axes = {"in": rows, "out": columns, "other": None}
    parts = {}
    for name, part in leaf.parts().items():
        axes = [mesh_axes[axis] for axis in leaf.axes[name]]
        parts[name] = P(*(None,) * (len(part.shape) - len(axes)), *axes)
    return dataclasses.replace(leaf, **parts)  # type: ignore[type-var]


def factor_specs(factors: Mapping[str, Any]) -> Any:
    """How factors are sharded: inputs and outputs as in their kernel; the rank is replicated."""
    flat = {}
    for path, (kind, leaves) in by_module(factors).items():
        kernel = _spec((*path, "kernel"), 2)
        rows, columns = kernel if len(kernel) == 2 else (None, None)
        mesh_axes = {"in": rows, "out": columns, "rank": None}
        for leaf, value in leaves.items():
            axes = [mesh_axes[axis] for axis in kind.axes[leaf]]
            flat[(*path, leaf)] = P(*(None,) * (len(value.shape) - len(axes)), *axes)
    return unflatten_dict(flat)


def state_specs(state: Any) -> Any:
    """How an adapter, or what is kept for each of its arrays, is sharded.

    A target's whole deltas `[layers, d_in, d_out]` are sharded like its kernels. All else is
    replicated.

    Args:
        state: A tree in which adapters' trees occur: an adapter, an optimizer's state, or both.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names[-2:-1] != ["deltas"]:
            return P()
        return _spec((*module_of(names[-1]).split("."), "kernel"), len(leaf.shape))

    return jax.tree.map_with_path(spec, state)


def _spec(path: tuple[str, ...], dimensions: int) -> P:
    for pattern, axes in RULES:
        if re.fullmatch(pattern, ".".join(path[-2:])):
            return P(*(None,) * (dimensions - len(axes)), *axes)
    return P()


def named(mesh: Mesh, specs: Any) -> Any:
    """Specs as shardings of a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """`state_specs` as shardings of a mesh, written as the compiler writes them.

    They name no axes of size 1. A step's output else had another sharding than its input, though
    equal, and the next step would be traced again.
    """

    def without_size_1(spec: P) -> NamedSharding:
        axes = [None if axis is None or mesh.shape[axis] == 1 else axis for axis in spec]
        while axes and axes[-1] is None:
            axes.pop()
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(without_size_1, state_specs(state))


def constrain(x: jax.Array, where: NamedSharding | None) -> jax.Array:
    """Inside a program: x with this sharding; None leaves it to the compiler."""
    return x if where is None else jax.lax.with_sharding_constraint(x, where)


def constrain_tree(mesh: Mesh | None, tree: Any, rule: Callable[[Any], Any]) -> Any:
    """Inside a program: a tree sharded as its rule says; without a mesh as it is.

    Args:
        mesh: The mesh.
        tree: Factors, or a state.
        rule: The tree's specs: `factor_specs`, or `state_specs`.
    """
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, named(mesh, rule(tree)))


def check_params(mesh: Mesh | AbstractMesh, params: Mapping[str, Any]) -> None:
    """Checks that a base, arrays or shapes, can be sharded as the rules say.

    Raises:
        ValueError: Names the parameter, its shape and the axis of the mesh that does not divide it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(param_specs(params)), strict=True):
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide {size}, a dimension of "
                    f"{name} {tuple(leaf.shape)}: choose another size for it"
                )


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which of a batch's rows the devices of this process hold.

    Raises:
        ValueError: If the shards would not be of one size.
    """
    if rows % (shards := batch_shards(mesh)):
        raise ValueError(
            f"a batch of {rows} rows cannot be split evenly into mesh.data x mesh.fsdp = {shards} "
            "shards: choose another data.batch_size or mesh"
        )
    held = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((rows,)).values()
    return sorted({row for part in held if part for row in range(rows)[part[0]]})


def place_batch(
    mesh: Mesh, batch: Mapping[str, Any], rows: int | None = None
) -> dict[str, jax.Array]:
    """A global batch as sharded arrays, of which each process places its rows.

    Args:
        mesh: The mesh.
        batch: `[rows, ...]` arrays, the same in all processes; or `local_rows` of them.
        rows: The number of rows of the whole batch, if these are the local ones.

    Raises:
        ValueError: If the shards would not be of one size.
    """
    whole = len(next(iter(batch.values()))) if rows is None else rows
    held = local_rows(mesh, whole)
    where = NamedSharding(mesh, P(BATCH))

    def place(value: np.ndarray) -> jax.Array:
        if rows is None:
            return _place(value, where)
        shape = (whole, *value.shape[1:])

        def shard(index: Any) -> Any:
            part = range(whole)[index[0]]
            first = held.index(part.start)  # those of a shard follow one another
            return value[first : first + len(part)]

        return jax.make_array_from_callback(shape, where, shard)

    return {name: place(np.asarray(value)) for name, value in batch.items()}


def place_state(mesh: Mesh, state: Any) -> Any:
    """A state as arrays that are sharded as `state_specs` says.

    Args:
        mesh: The mesh.
        state: NumPy arrays, the same in all processes.
    """
    return jax.tree.map(_place, state, state_shardings(mesh, state))


def _place(value: np.ndarray, where: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])
