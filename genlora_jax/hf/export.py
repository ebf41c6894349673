"""Export: parameters to a directory that `transformers` and vLLM load."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from genlora_jax.atomic_files import new_directory
from genlora_jax.base.kernel import read_kernel
from genlora_jax.base.stored import StoredKernel
from genlora_jax.hf.checkpoint import CONFIG, INDEX, TERMS, locate, model_config, read_json
from genlora_jax.hf.names import Tensor, natural_order, tensors
from genlora_jax.hf.tensorfile import (
    TensorWriter,
    is_finite,
    transpose,
    transposes_on_host,
)
from genlora_jax.hf.tokenizer import (
    GENERATION,
    changed_generation_config,
    copy_files,
    copy_tokenizer,
)
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes
from genlora_jax.sharding import constrain, replicated
from genlora_jax.threads import in_threads
from genlora_jax.validation import all_finite, first_not_finite

HEAD = ("lm_head", "kernel")


def export_hf(
    out_dir: str | Path,
    params: Mapping[str, Any],
    *,
    base: str | Path,
    adapter: str | Path | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes parameters as a Hugging Face checkpoint.

    Config, tokenizer, chat templates, generation config and licence are the base's, as far as it
    has them. The generation config names the tokens that end a text in training, too. The directory
    appears complete or not at all. Host memory holds a handful of tensors at a time.

    Args:
        out_dir: The directory to make.
        params: Parameters, merged usually; scanned or unrolled. Quantised kernels are dequantised.
        base: The checkpoint (directory or hub id) that they come from.
        adapter: Directory of the adapter that was merged: if it has a tokenizer or a chat template
            of its own, they take the place of the base's.
        dtype: Dtype of the tensors written; by default that of `params`.
        max_shard_bytes: Largest size of one safetensors file.
        overwrite: Replace an existing directory.

    Raises:
        FileExistsError: If the directory exists and is not to be overwritten.
        ValueError: If the parameters are not those of the base's architecture, or one is not
            finite in this dtype.
    """
    # Imported where it is used: it is slow to import.
    from huggingface_hub import split_state_dict_into_shards_factory

    source = locate(base)
    flat = flatten_dict(dict(params))
    _check_shapes(source, params, flat)
    generation = changed_generation_config(source, adapter)
    kind = np.dtype(dtype) if dtype is not None else next(iter(flat.values())).dtype
    order = sorted(tensors(params), key=lambda t: natural_order(t.name))
    stored = {
        t.name: jax.ShapeDtypeStruct(t.shape_in_file(flat[t.path].shape), kind) for t in order
    }
    split = split_state_dict_into_shards_factory(
        stored,
        get_storage_size=lambda tensor: tensor.size * kind.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    with new_directory(out_dir, overwrite=overwrite) as directory:
        with contextlib.ExitStack() as stack:
            writers: dict[str, TensorWriter] = {}
            for file, names in split.filename_to_tensors.items():
                shapes = {name: stored[name] for name in names}
                writer = stack.enter_context(TensorWriter(directory / file, shapes))
                writers |= dict.fromkeys(names, writer)
            _write_tensors(writers, order, flat, kind)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        _write_config(source, directory, kind, own_head=HEAD in flat)
        copy_files(source, (GENERATION, *TERMS), directory)
        copy_tokenizer(source, adapter, directory)
        if generation:
            (directory / GENERATION).write_text(json.dumps(generation, indent=1) + "\n")


def _check_shapes(source: Path, params: Mapping[str, Any], flat: Mapping[Any, Any]) -> None:
    """Raises ValueError if the parameters' paths or shapes are not those of the base."""
    scan = not any(part.isdecimal() for path in flat for part in path)
    config = model_config(source)
    if HEAD in flat:  # such as a tied base's files may hold, or an adapter bring
        config = dataclasses.replace(config, tie_word_embeddings=False)
    expected = flatten_dict(parameter_shapes(LlamaForCausalLM(config, scan=scan)))
    for path in sorted(set(flat) | set(expected)):
        given, stored = (
            tuple(tree[path].shape) if path in tree else None for tree in (flat, expected)
        )
        if given != stored:
            raise ValueError(f"{'.'.join(path)} has shape {given}; the base {source} has {stored}")


def _write_tensors(
    writers: Mapping[str, TensorWriter],
    order: list[Tensor],
    flat: Mapping[Any, Any],
    kind: np.dtype,
) -> None:
    """Writes every tensor to its file; threads write while the next tensors are fetched."""
    on_host = transposes_on_host()

    def fetched() -> Iterator[tuple[Tensor, Any, Any]]:
        for tensor in order:
            transposed = tensor.transposed and not on_host
            yield tensor, *_fetch(flat[tensor.path], tensor.index, kind, transposed)

    def write(item: tuple[Tensor, Any, Any]) -> None:
        tensor, value, finite = item[0], np.asarray(item[1]), item[2]
        value = transpose(value) if tensor.transposed and on_host else value
        if not (is_finite(value) if finite is None else finite):
            _refuse_not_finite(tensor, flat[tensor.path], kind)
        writers[tensor.name].write(tensor.name, value)

    for _ in in_threads(write, fetched()):
        pass


def _fetch(
    leaf: Any, index: int | None, kind: np.dtype, transposed: bool
) -> tuple[Any, jax.Array | None]:
    """One tensor as it is to be written, on its way to host memory, and whether it is finite.

    That is None on CPUs, where NumPy finds it out faster than XLA.
    """
    leaf = jax.tree.map(jnp.asarray, leaf)
    sharding, quantised = jax.tree.leaves(leaf)[0].sharding, isinstance(leaf, StoredKernel)
    on_many = len(sharding.device_set) > 1
    if index is not None or transposed or quantised or leaf.dtype != kind or on_many:
        mesh = getattr(sharding, "mesh", None)
        where = replicated(mesh) if on_many and mesh else None
        leaf = _select(leaf, index, kind, transposed, where)
    if on_many and leaf.is_fully_replicated:  # one device's copy is enough
        leaf = leaf.addressable_data(0)
    if jax.default_backend() == "cpu":
        return leaf, None
    # Page-locked memory, which JAX keeps for reuse: copies to any other are 20 x slower.
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host")), all_finite(leaf)


@functools.partial(jax.jit, static_argnames=("kind", "transposed", "where"))
def _select(
    leaf: Any, index: int | None, kind: np.dtype, transposed: bool, where: Any
) -> jax.Array:
    """The tensor at an index of a stacked leaf, or all of a leaf."""
    if index is not None:
        leaf = jax.tree.map(
            lambda part: jax.lax.dynamic_index_in_dim(part, index, keepdims=False), leaf
        )
    value = read_kernel(leaf, kind)
    value = value.T if transposed else value
    return constrain(value, where)


def _refuse_not_finite(tensor: Tensor, leaf: Any, kind: np.dtype) -> None:
    if first_not_finite(leaf) is None:
        raise ValueError(
            f"tensor {tensor.name} has values that {kind.name} cannot hold: export as bfloat16 or "
            "float32"
        )
    raise ValueError(f"tensor {tensor.name} holds a NaN or an infinity, and is not exported")


def _write_config(source: Path, directory: Path, kind: np.dtype, *, own_head: bool) -> None:
    """Writes the base's config, with the tensors' dtype and whether the head is the embedding."""
    config = read_json(source / CONFIG)
    config.pop("quantization_config", None)  # what is written is not quantised
    field = "dtype" if "dtype" in config else "torch_dtype"
    config[field] = kind.name
    if own_head and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
