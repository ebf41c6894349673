"""What a checkpoint holds, checked against its checksums; and the adapter of the newest."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from genlora_jax.adapter import Adapter, adapter_shapes
from genlora_jax.adapter_files import spec_from_json
from genlora_jax.training.checkpoint_storage import open_checkpointer
from genlora_jax.training.checksums import checksums, json_digest

STATE = "state"  # the arrays
# Fields of the metadata; the last two of version 0.1.
SHAPES, SETTINGS, SUMS, DIGEST = "shapes", "settings", "checksums", "digest"
DATA, ORIGIN, ADAPTER, BASE = "data", "origin", "adapter", "base"


def saved_adapter(directory: Any) -> tuple[int, dict[str, Any], Adapter] | None:
    """The adapter of the newest checkpoint that can be read: its step, its settings, its arrays.

    Args:
        directory: The directory of the checkpoints, perhaps of a run under way.

    Returns:
        None if there is none, or none that says how its adapter is made up, as of version 0.1.
    """
    with open_checkpointer(directory) as checkpointer:
        steps = (saved.step for saved in checkpointer.checkpoints)
        for step in sorted(steps, reverse=True):
            with contextlib.suppress(Exception):  # whatever Orbax makes of a damaged file
                saved = read_metadata(checkpointer, step)
                spec = spec_from_json(saved[SETTINGS])
                leaves = {name: _empty(shape) for name, shape in saved[SHAPES].items()}
                loaded = load_arrays(checkpointer, step, leaves, saved)
                paths, tree = jax.tree.flatten_with_path(adapter_shapes(spec))
                names = [f"adapter.{leaf_name(path)}" for path, _ in paths]
                adapter = jax.tree.unflatten(tree, [loaded[name] for name in names])
                settings = saved[SETTINGS]
                settings["base"]["tensors"] = saved.get(ORIGIN, {}).get("model.path")
                return step, settings, adapter
    return None


def read_metadata(checkpointer: Any, step: int) -> dict[str, Any]:
    """The fields of a checkpoint; ValueError if they are not what was saved."""
    saved = dict(checkpointer.metadata(step).custom_metadata or {})
    if SHAPES not in saved:
        raise ValueError("its metadata cannot be read")
    checked = {DIGEST, SUMS} & saved.keys()  # not in checkpoints of version 0.1
    if checked and saved.pop(DIGEST, None) != json_digest(saved):
        raise ValueError("its metadata are not as they were saved")
    return saved


def load_arrays(
    checkpointer: Any, step: int, leaves: Mapping[str, Any], saved: Mapping[str, Any]
) -> Mapping[str, Any]:
    """A checkpoint's arrays, like `leaves`; ValueError if one is not what was saved."""
    loaded: Mapping[str, Any] = checkpointer.load_checkpointables(step, {STATE: leaves})[STATE]
    found = checksums({name: loaded[name] for name in leaves})
    expected: Sequence[int] = saved.get(SUMS, found)
    for name, ours, theirs in zip(leaves, found, expected, strict=True):
        if ours != theirs:
            raise ValueError(f"array {name} of {checkpointer.directory / str(step)} is damaged")
    return loaded


def leaf_name(path: Any) -> str:
    """The name of a leaf of a state, such as `adapter.trainable.latents...`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _empty(described: str) -> jax.Array:
    """Zeros of the dtype and shape that a text such as `float32[2, 3]` describes."""
    dtype, sizes = re.fullmatch(r"(\w+)\[(.*)\]", described).groups()  # type: ignore[union-attr]
    return jnp.zeros([int(size) for size in sizes.split(",") if size], dtype)
