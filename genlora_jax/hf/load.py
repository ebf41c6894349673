"""Loading: a Hugging Face checkpoint to a Linen model and its parameters."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genlora_jax import sharding
from genlora_jax.hf.checkpoint import Checkpoint, locate, model_config
from genlora_jax.hf.names import Tensor, tensors
from genlora_jax.hf.tensorfile import in_threads, transpose
from genlora_jax.mesh import AXES
from genlora_jax.models.attention import Attention
from genlora_jax.models.llama import LlamaForCausalLM, Remat, parameter_shapes


def load_llama(
    path: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    param_dtype: Any = jnp.bfloat16,
    revision: str | None = None,
    token: str | None = None,
    scan: bool = True,
    remat: Remat = "none",
    attention: Attention = "auto",
    mesh: Mesh | None = None,
) -> tuple[LlamaForCausalLM, Any]:
    """Loads a LLaMA.

    Args:
        path: Local directory in Hugging Face's layout, or a hub id.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub.
        scan: Whether layers are stacked and scanned, or unrolled.
        remat: See `LlamaForCausalLM`.
        attention: See `LlamaForCausalLM`.
        mesh: Devices over which the parameters lie as `genlora_jax.sharding` says. Each process
            reads its share of every tensor; none ever holds the whole model.

    Returns:
        The model and its parameters. Beyond these, a handful of tensors is held in memory.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or a file of it is missing.
        ValueError: If its architecture is not supported, or a tensor is missing, damaged or
            of another shape, or the mesh does not divide one.
    """
    directory = locate(path, revision=revision, token=token)
    config = model_config(directory)
    model = LlamaForCausalLM(
        config,
        dtype=parse_dtype(dtype),
        param_dtype=parse_dtype(param_dtype),
        scan=scan,
        remat=remat,
        attention=attention,
        mesh=mesh,
    )
    shapes = parameter_shapes(model)
    if mesh is not None:
        sharding.check_params(mesh, shapes)
    order = list(tensors(shapes))
    checkpoint = Checkpoint(directory)
    _refuse_unknown(directory, checkpoint.names() - {t.name for t in order}, config)
    return model, unflatten_dict(_read_leaves(checkpoint, order, flatten_dict(shapes), mesh))


def parse_dtype(dtype: Any) -> Any:
    """A NumPy dtype, from one or from its name.

    Raises:
        ValueError: If there is no floating-point type of that name.
    """
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or not jnp.issubdtype(parsed, jnp.floating):
        raise ValueError(f"dtype {dtype!r} is not a floating-point type such as bfloat16")
    return parsed


def _refuse_unknown(directory: Path, names: set[str], config: Any) -> None:
    """A tensor with no place in the model means that this is another model."""
    # Some files carry what is derived, or repeat the tied head.
    derived = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unknown = sorted(n for n in names - derived if not n.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise ValueError(
            f"{directory}: tensor {unknown[0]} has no place in the model that config.json "
            f"describes ({len(unknown)} such)"
        )


def _read_leaves(
    checkpoint: Checkpoint,
    order: list[Tensor],
    shapes: Mapping[tuple[str, ...], Any],
    mesh: Mesh | None,
) -> dict[tuple[str, ...], jax.Array]:
    """Every leaf, filled in place on the devices, a tensor at a time."""
    on_host = jax.default_backend() == "cpu"  # its own transposes are slow; see `transpose`
    homes: dict[tuple[str, ...], NamedSharding | None] = dict.fromkeys(shapes)
    if mesh is not None:
        specs = flatten_dict(sharding.param_specs(unflatten_dict(dict(shapes))))
        homes = {path: NamedSharding(mesh, specs[path]) for path in shapes}

    def read(tensor: Tensor) -> Any:
        stored = tensor.shape_in_file(shapes[tensor.path].shape)
        turn = tensor.transposed and on_host

        def rows(index: Any) -> np.ndarray:
            own = index[-1 if turn else 0] if index else slice(None)
            part = checkpoint.read(tensor.name, stored, own)
            return transpose(part) if turn else part

        if mesh is None:
            return jax.device_put(rows(None))
        shape = stored[::-1] if turn else stored
        home = _reading(mesh, shape, axis=len(shape) - 1 if turn else 0)
        return jax.make_array_from_callback(shape, home, rows)

    leaves: dict[tuple[str, ...], jax.Array] = {}
    for tensor, value in zip(order, in_threads(read, order), strict=True):
        path, leaf, home = tensor.path, shapes[tensor.path], homes[tensor.path]
        turn = tensor.transposed and not on_host
        if tensor.index is not None:
            if path not in leaves:
                leaves[path] = jnp.zeros(leaf.shape, leaf.dtype, device=home)
            leaves[path] = _place(leaves[path], value, tensor.index, turn, home)
        elif turn or value.dtype != leaf.dtype or home is not None:
            leaves[path] = _convert(value, leaf.dtype, turn, home)
        else:
            leaves[path] = value
        leaves[path].block_until_ready()  # or tensors would pile up before the device
    return leaves


def _reading(mesh: Mesh, shape: tuple[int, ...], axis: int) -> NamedSharding:
    """Rows of the file shared out over all devices, so that each is read once in all.

    From there the devices pass them on to where they belong, faster than any disk.
    """
    if shape[axis] % mesh.size:
        return sharding.replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXES))


@functools.partial(jax.jit, static_argnames=("dtype", "turn", "home"))
def _convert(value: jax.Array, dtype: Any, turn: bool, home: Any) -> jax.Array:
    value = (value.T if turn else value).astype(dtype)
    return sharding.constrain(value, home)


@functools.partial(jax.jit, static_argnames=("turn", "home"), donate_argnums=0)
def _place(leaf: jax.Array, value: jax.Array, index: int, turn: bool, home: Any) -> jax.Array:
    value = (value.T if turn else value).astype(leaf.dtype)
    whole = jax.lax.dynamic_update_index_in_dim(leaf, value, index, 0)
    return sharding.constrain(whole, home)
