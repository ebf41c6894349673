"""Loading: a Hugging Face checkpoint to a Linen model and its parameters."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
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
from genlora_jax.hf.tensorfile import in_threads, transpose, transposes_on_host
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
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub.
        scan: Whether layers are stacked and scanned, or unrolled.
        remat: See `LlamaForCausalLM`.
        attention: See `LlamaForCausalLM`.
        mesh: Devices that shard the parameters as `genlora_jax.sharding` says. Each process reads
            its shard of every tensor; none ever holds the whole model.

    Returns:
        The model and its parameters. Memory holds a handful of tensors beside them at a time.

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
    """Raises ValueError if some tensors have no place: this is then another model."""
    # Some files hold what can be derived: the frequencies of RoPE, or the tied head once more.
    derived = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unknown = sorted(n for n in names - derived if not n.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise ValueError(
            f"{directory}: tensor {unknown[0]} has no place in the model that config.json "
            f"describes ({len(unknown)} such)"
        )


@dataclass(frozen=True)
class _Leaf:
    """A leaf of the tree of parameters that is to be filled.

    Attributes:
        shape: Its shape and dtype.
        where: Its sharding; None for JAX's default device.
    """

    shape: jax.ShapeDtypeStruct
    where: NamedSharding | None


def _read_leaves(
    checkpoint: Checkpoint,
    order: list[Tensor],
    shapes: Mapping[tuple[str, ...], Any],
    mesh: Mesh | None,
) -> dict[tuple[str, ...], jax.Array]:
    """Every leaf, filled in place on the devices, a tensor at a time."""
    plan = {path: _Leaf(shape, None) for path, shape in shapes.items()}
    if mesh is not None:
        specs = flatten_dict(sharding.param_specs(unflatten_dict(dict(shapes))))
        plan = {
            path: _Leaf(shape, NamedSharding(mesh, specs[path])) for path, shape in shapes.items()
        }
    on_host = transposes_on_host()

    def read(tensor: Tensor) -> jax.Array:
        return _read(checkpoint, tensor, plan[tensor.path], mesh)

    leaves: dict[tuple[str, ...], jax.Array] = {}
    for tensor, value in zip(order, in_threads(read, order), strict=True):
        leaf = plan[tensor.path]
        transposed = tensor.transposed and not on_host
        leaves[tensor.path] = _fill(leaves.get(tensor.path), value, tensor.index, leaf, transposed)
        leaves[tensor.path].block_until_ready()  # or tensors would pile up before the device
    return leaves


def _read(checkpoint: Checkpoint, tensor: Tensor, leaf: _Leaf, mesh: Mesh | None) -> jax.Array:
    """One tensor on the devices, transposed on the way where the host does that."""
    stored = tensor.shape_in_file(leaf.shape.shape)
    transposed = tensor.transposed and transposes_on_host()

    def rows(index: Any) -> np.ndarray:
        axis = -1 if transposed else 0  # the file's rows, as the array has them
        part = checkpoint.read(tensor.name, stored, index[axis] if index else slice(None))
        return transpose(part) if transposed else part

    if mesh is None:
        return jax.device_put(rows(None))
    shape = stored[::-1] if transposed else stored
    where = leaf.where  # no copy is then needed on a single device
    if mesh.size > 1 or where is None or shape != leaf.shape.shape:
        where = _reading_sharding(mesh, shape, axis=len(shape) - 1 if transposed else 0)
    return jax.make_array_from_callback(shape, where, rows)


def _reading_sharding(mesh: Mesh, shape: tuple[int, ...], axis: int) -> NamedSharding:
    """The file's rows sharded over all devices, so that each row is read once in all.

    From there the devices send them to where they belong, faster than any disk.
    """
    if shape[axis] % mesh.size:
        return sharding.replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXES))


def _fill(
    filled: jax.Array | None, value: jax.Array, index: int | None, leaf: _Leaf, transposed: bool
) -> jax.Array:
    """A leaf with one more tensor in it; `filled` is None before the first, and is donated."""
    dtype, where = leaf.shape.dtype, leaf.where
    if index is not None:
        if filled is None:
            filled = jnp.zeros(leaf.shape.shape, dtype, device=where)
        return _place(filled, value, index, transposed, where)
    if transposed or value.dtype != dtype or (where is not None and value.sharding != where):
        return _convert(value, dtype, transposed, where)
    return value


@functools.partial(jax.jit, static_argnames=("dtype", "transposed", "where"))
def _convert(value: jax.Array, dtype: Any, transposed: bool, where: Any) -> jax.Array:
    value = (value.T if transposed else value).astype(dtype)
    return sharding.constrain(value, where)


@functools.partial(jax.jit, static_argnames=("transposed", "where"), donate_argnums=0)
def _place(
    leaf: jax.Array, value: jax.Array, index: int, transposed: bool, where: Any
) -> jax.Array:
    value = (value.T if transposed else value).astype(leaf.dtype)
    updated = jax.lax.dynamic_update_index_in_dim(leaf, value, index, 0)
    return sharding.constrain(updated, where)
