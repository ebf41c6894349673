"""Loading: a Hugging Face checkpoint to a Linen model and its parameters."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genlora_jax import sharding
from genlora_jax.base.kernel import store_kernel
from genlora_jax.base.nf4 import NF4
from genlora_jax.base.quantise import BaseDtype, Quantisation, quantise
from genlora_jax.base.stored import StoredKernel
from genlora_jax.hf.checkpoint import CONFIG, Checkpoint, locate, model_config
from genlora_jax.hf.names import Tensor, tensors
from genlora_jax.hf.ready_made import ReadyMade, open_checkpoint
from genlora_jax.hf.tensorfile import transpose, transposes_on_host, window
from genlora_jax.models.attention import Attention
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, Remat, parameter_shapes
from genlora_jax.threads import in_threads
from genlora_jax.validation import require_choice

COPIES_TO_QUANTISE = 4  # measured: peak while a kernel is quantised, in its bytes
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


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
    base_dtype: BaseDtype | None = None,
    unquantised: Sequence[str] = ("lm_head",),
    int4_group: int = 64,
) -> tuple[LlamaForCausalLM, Any]:
    """Loads a LLaMA.

    Args:
        path: Directory in Hugging Face's layout, here or at `gs://` or `s3://`, or a hub id.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub.
        scan: Whether layers are stacked and scanned, or unrolled.
        remat: See `LlamaForCausalLM`.
        attention: See `LlamaForCausalLM`.
        mesh: Devices that shard the parameters as `genlora_jax.sharding` says. Each process reads
            its shard of every tensor; none ever holds the whole model.
        base_dtype: How kernels are stored: `bf16`, as `param_dtype` says; `fp8_backward`, the
            same with FP8 for gradients; or quantised as they are read, to `fp8`, `int8`, `nf4` or
            `int4`. Embeddings, norms and biases never are. None: as the checkpoint has them.
        unquantised: Patterns of modules, as of `targets`, whose kernels are not quantised either.
        int4_group: Inputs that share a scale in `int4`: 64 or 128.

    Returns:
        The model and its parameters. Memory holds a handful of tensors beside them at a time.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or a file of it is missing.
        ValueError: If its architecture is not supported, or a tensor is missing, damaged or
            of another shape, or the mesh does not divide one, or the device has no FP8, or
            there is no such `remat`.
    """
    require_choice("remat", remat, get_args(Remat))
    directory = locate(path, revision=revision, token=token)
    config, checkpoint = model_config(directory), open_checkpoint(directory)
    if config.num_hidden_layers > (count := len(checkpoint.names())):
        raise ValueError(
            f"{directory / CONFIG}: num_hidden_layers is {config.num_hidden_layers}, of a model "
            f"whose files hold {count} tensors in all"
        )
    config = _with_own_head(checkpoint, config)
    dtype, param_dtype = parse_dtype(dtype), parse_dtype(param_dtype)
    quantisation = Quantisation(base_dtype or "bf16", tuple(unquantised), int4_group)
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    capability = getattr(device, "compute_capability", None)
    quantisation.check_device(device.platform, capability, device.device_kind)
    model = LlamaForCausalLM(config, dtype, param_dtype, scan, remat, attention, mesh)
    shapes = parameter_shapes(model)
    if base_dtype is None and isinstance(checkpoint, ReadyMade):
        quantisation = checkpoint.quantisation(tensors(shapes))
    shapes = quantised_shapes(shapes, quantisation)
    if isinstance(checkpoint, ReadyMade):
        shapes = checkpoint.shapes(shapes)
    if mesh is not None:
        shapes = sharded_shapes(mesh, shapes)
    order = list(tensors(shapes))
    if config.tie_word_embeddings and EMBEDDING not in checkpoint.names():
        order = [_head_for_embedding(tensor) for tensor in order]
    flat = flatten_dict(shapes)
    for tensor in order:  # all of them, before minutes of reading
        checkpoint.check_shape(tensor.name, tensor.shape_in_file(flat[tensor.path].shape))
    _refuse_unknown(directory, checkpoint.names() - {t.name for t in order}, config)
    return model, unflatten_dict(_read_leaves(checkpoint, order, flat))


def _with_own_head(checkpoint: Checkpoint, config: LlamaConfig) -> LlamaConfig:
    """The config, no longer tied if the files hold a head other than the embedding."""
    if not config.tie_word_embeddings or not {HEAD, EMBEDDING} <= checkpoint.names():
        return config
    if checkpoint.equal(HEAD, EMBEDDING):
        return config
    warnings.warn(
        f"{checkpoint.directory / CONFIG} says tie_word_embeddings, but the files hold an {HEAD} "
        "of its own: that one is used, as in transformers, and exports say false",
        stacklevel=3,
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


def _head_for_embedding(tensor: Tensor) -> Tensor:
    """A tied model's tensor under the other name: some files hold the two as the head alone."""
    return dataclasses.replace(tensor, name=HEAD) if tensor.name == EMBEDDING else tensor


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


def quantised_shapes(shapes: Mapping[str, Any], quantisation: Quantisation) -> Any:
    """The shapes of parameters whose kernels are quantised."""
    return jax.eval_shape(lambda params: quantise(params, quantisation), shapes)


def sharded_shapes(mesh: Mesh, shapes: Mapping[str, Any]) -> Any:
    """The shapes of parameters, each with its sharding.

    Raises:
        ValueError: If the mesh does not divide one.
    """
    sharding.check_params(mesh, shapes)
    where = sharding.named(mesh, sharding.param_specs(shapes))
    return jax.tree.map(lambda leaf, where: leaf.update(sharding=where), shapes, where)


def _read_leaves(
    checkpoint: Checkpoint, order: list[Tensor], shapes: Mapping[tuple[str, ...], Any]
) -> dict[tuple[str, ...], jax.Array]:
    """Every leaf, filled in place on the devices, a tensor at a time."""
    on_host = transposes_on_host()
    leaves: dict[tuple[str, ...], jax.Array] = {}

    def ready(tensor: Tensor) -> ReadyMade | None:
        """The checkpoint, if it holds this tensor's kernel in NF4."""
        if not isinstance(checkpoint, ReadyMade) or not isinstance(shapes[tensor.path], NF4):
            return None
        return checkpoint if checkpoint.has_nf4(tensor.name) else None

    def read(tensor: Tensor) -> Any:
        leaf: Any = shapes[tensor.path]
        if (source := ready(tensor)) is not None:
            return _on_devices(source.nf4(tensor.name, leaf.dtype), leaf)
        return _read(checkpoint, tensor, leaf, on_host)

    def taken(tensor: Tensor) -> int:
        converted = isinstance(shapes[tensor.path], StoredKernel) and ready(tensor) is None
        return sizes[tensor] * (COPIES_TO_QUANTISE if converted and on_host else 1)

    # With these bounds, memory holds little more than the largest tensor beside the leaves.
    sizes = {tensor: checkpoint.size_of(tensor.name) for tensor in order}
    values = in_threads(read, order, window(checkpoint.directory), taken, max(sizes.values()))
    for tensor in order:
        value, path = next(values), tensor.path
        stored = isinstance(value, StoredKernel)
        transposed = tensor.transposed and not on_host and not stored
        # Free where memory is fast.
        if not on_host and not stored and not _fits(value, shapes[path].dtype):
            checkpoint.refuse_unfit(tensor.name, checkpoint.read(tensor.name), shapes[path].dtype)
        leaves[path] = _fill(leaves.get(path), value, tensor.index, shapes[path], transposed)
        del value
        jax.block_until_ready(leaves[path])  # or tensors would pile up before the device
    checkpoint.refuse_changed()
    return leaves


def _on_devices(value: Any, leaf: Any) -> Any:
    """Parts that every process has read, on all devices."""
    where = jax.tree.leaves(leaf)[0].sharding
    if where is None:
        return jax.tree.map(jnp.asarray, value)
    whole = NamedSharding(where.mesh, P())
    return jax.tree.map(
        lambda part: jax.make_array_from_callback(part.shape, whole, lambda index: part[index]),
        value,
    )


def _where(leaf: Any) -> Any:
    """The shardings of a leaf's shape, or of its parts'; None without a mesh."""
    first = jax.tree.leaves(leaf)[0]
    return first.sharding and jax.tree.map(lambda part: part.sharding, leaf)


def _read(checkpoint: Checkpoint, tensor: Tensor, leaf: Any, on_host: bool) -> jax.Array:
    """One tensor on the devices; `on_host` says whether the host checks and transposes it."""
    transposed = tensor.transposed and on_host
    stored = tensor.shape_in_file(leaf.shape)
    shape = stored[::-1] if transposed else stored
    axis = len(shape) - 1 if transposed else 0  # the file's rows, as the array has them

    def read(index: Any) -> np.ndarray:
        rows = checkpoint.read(tensor.name, index[axis])
        if on_host:
            checkpoint.refuse_unfit(tensor.name, rows, leaf.dtype)
        return transpose(rows) if transposed else rows

    where: Any = jax.tree.leaves(leaf)[0].sharding
    if where is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    moved = where.mesh.size > 1 or shape != leaf.shape or isinstance(leaf, StoredKernel)
    if moved:  # else no copy is needed on the device
        # All devices share the file's rows, so that each is read once in all, or as few times as
        # the number of rows allows. From there the devices send them to where they belong, faster
        # than any disk.
        parts = math.gcd(shape[axis], where.mesh.size)
        shares = Mesh(where.mesh.devices.reshape(-1, parts), ("copies", "rows"))
        where = NamedSharding(shares, P(*(None,) * axis, "rows"))
    return jax.make_array_from_callback(shape, where, read)


def _fill(filled: Any, value: jax.Array, index: int | None, leaf: Any, transposed: bool) -> Any:
    """A leaf with one more tensor in it; `filled` is None before the first, and is donated."""
    where = _where(leaf)
    if index is not None:
        if filled is None:
            filled = jax.tree.map(
                lambda part: jnp.zeros(part.shape, part.dtype, device=part.sharding), leaf
            )
        return _place(filled, value, index, transposed, where)
    moved = where is not None and value.sharding != where
    if transposed or moved or isinstance(leaf, StoredKernel) or value.dtype != leaf.dtype:
        return _convert(value, leaf, transposed, where)
    return value


@functools.partial(jax.jit, static_argnames="dtype")
def _fits(value: jax.Array, dtype: Any) -> jax.Array:
    return jnp.isfinite(value.astype(dtype)).all()


@functools.partial(jax.jit, static_argnames=("form", "transposed", "where"))
def _convert(value: Any, form: Any, transposed: bool, where: Any) -> Any:
    if not isinstance(value, StoredKernel):
        value = store_kernel(value.T if transposed else value, form)
    return sharding.constrain(value, where)


@functools.partial(jax.jit, static_argnames=("transposed", "where"), donate_argnums=0)
def _place(leaf: Any, value: Any, index: int, transposed: bool, where: Any) -> Any:
    if not isinstance(value, StoredKernel):
        value = store_kernel(value.T if transposed else value, leaf)
    updated = jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, index, 0), leaf, value
    )
    return sharding.constrain(updated, where)
