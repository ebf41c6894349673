"""Export: parameters to a directory that `transformers` and vLLM load."""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from genlora_jax.files import new_directory
from genlora_jax.hf.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    locate,
    model_config,
    read_json,
)
from genlora_jax.hf.names import Tensor, natural_order, tensors
from genlora_jax.hf.tensorfile import TensorWriter, in_threads, transpose, transposes_on_host
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes
from genlora_jax.sharding import constrain, replicated


def export_hf(
    out_dir: str | Path,
    params: Mapping[str, Any],
    *,
    base: str | Path,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes parameters as a Hugging Face checkpoint.

    Config, tokenizer and generation config are copied from the base, as far as it has them. The
    directory appears complete or not at all. Host memory holds a handful of tensors at a time.

    Args:
        out_dir: The directory to make.
        params: Parameters, merged usually; scanned or unrolled.
        base: The checkpoint (directory or hub id) that they come from.
        dtype: Dtype of the tensors written; by default that of `params`.
        max_shard_bytes: Largest size of one safetensors file.
        overwrite: Replace an existing directory.

    Raises:
        FileExistsError: If the directory exists and is not to be overwritten.
        ValueError: If the parameters are not those of the base's architecture.
    """
    source = locate(base)
    flat = flatten_dict(dict(params))
    _check_shapes(source, params, flat)
    kind = np.dtype(dtype) if dtype is not None else next(iter(flat.values())).dtype
    shards = _shards(
        sorted(tensors(params), key=lambda t: natural_order(t.name)), flat, kind, max_shard_bytes
    )
    with new_directory(out_dir, overwrite=overwrite) as directory:
        names = (
            [SINGLE]
            if len(shards) == 1
            else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        )
        _write_files([directory / name for name in names], shards, flat, kind)
        if len(shards) > 1:
            files = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
            size = sum(_bytes(t, flat, kind) for shard in shards for t in shard)
            index = {"metadata": {"total_size": size}, "weight_map": files}
            (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        _copy_companions(source, directory, kind)


def _check_shapes(source: Path, params: Mapping[str, Any], flat: Mapping[Any, Any]) -> None:
    """Raises ValueError if the parameters' paths or shapes are not those of the base."""
    scan = not any(part.isdecimal() for path in flat for part in path)
    expected = flatten_dict(parameter_shapes(LlamaForCausalLM(model_config(source), scan=scan)))
    for path in sorted(set(flat) | set(expected)):
        given, stored = (
            tuple(tree[path].shape) if path in tree else None for tree in (flat, expected)
        )
        if given != stored:
            raise ValueError(f"{'.'.join(path)} has shape {given}; the base {source} has {stored}")


def _bytes(tensor: Tensor, flat: Mapping[Any, Any], kind: np.dtype) -> int:
    return int(np.prod(tensor.shape_in_file(flat[tensor.path].shape))) * kind.itemsize


def _shards(
    order: list[Tensor], flat: Mapping[Any, Any], kind: np.dtype, limit: int
) -> list[list[Tensor]]:
    """Tensors by file, in order, each file within the limit unless one tensor exceeds it."""
    shards: list[list[Tensor]] = [[]]
    room = limit
    for tensor in order:
        size = _bytes(tensor, flat, kind)
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= size
    return shards


def _write_files(
    files: list[Path], shards: list[list[Tensor]], flat: Mapping[Any, Any], kind: np.dtype
) -> None:
    """Writes every shard to its file; threads write while the next tensors are fetched."""
    on_host = transposes_on_host()

    def fetched(writers: list[TensorWriter]) -> Iterator[tuple[TensorWriter, Tensor, Any]]:
        for writer, shard in zip(writers, shards, strict=True):
            for tensor in shard:
                transposed = tensor.transposed and not on_host
                yield writer, tensor, _fetch(flat[tensor.path], tensor.index, kind, transposed)

    def write(item: tuple[TensorWriter, Tensor, Any]) -> None:
        writer, tensor, value = item
        value = np.asarray(value)
        writer.write(tensor.name, transpose(value) if tensor.transposed and on_host else value)

    with contextlib.ExitStack() as stack:
        writers = []
        for file, shard in zip(files, shards, strict=True):
            shapes = {
                t.name: jax.ShapeDtypeStruct(t.shape_in_file(flat[t.path].shape), kind)
                for t in shard
            }
            writers.append(stack.enter_context(TensorWriter(file, shapes)))
        for _ in in_threads(write, fetched(writers)):
            pass


def _fetch(leaf: Any, index: int | None, kind: np.dtype, transposed: bool) -> Any:
    """One tensor as it is to be written, on its way to host memory."""
    if not isinstance(leaf, jax.Array):
        leaf = jnp.asarray(leaf)
    on_many = len(leaf.sharding.device_set) > 1
    if index is not None or transposed or leaf.dtype != kind or on_many:
        mesh = getattr(leaf.sharding, "mesh", None)
        where = replicated(mesh) if on_many and mesh else None
        leaf = _select(leaf, index, kind, transposed, where)
    if on_many and leaf.is_fully_replicated:  # one device's copy is enough
        leaf = leaf.addressable_data(0)
    if jax.default_backend() == "cpu":
        return leaf
    # Page-locked memory, which JAX keeps for reuse: copies to any other are 20 x slower.
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))


@functools.partial(jax.jit, static_argnames=("kind", "transposed", "where"))
def _select(
    leaf: jax.Array, index: int | None, kind: np.dtype, transposed: bool, where: Any
) -> jax.Array:
    """The tensor at an index of a stacked leaf, or all of a leaf."""
    value = leaf if index is None else jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
    value = (value.T if transposed else value).astype(kind)
    return constrain(value, where)


def _copy_companions(source: Path, directory: Path, kind: np.dtype) -> None:
    """Copies config, with the tensors' dtype in it, and tokenizer and generation config."""
    config = read_json(source / CONFIG)
    field = "dtype" if "dtype" in config else "torch_dtype"
    config[field] = jnp.dtype(kind).name
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
