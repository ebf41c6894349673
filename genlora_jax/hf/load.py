"""Loading: a Hugging Face checkpoint to a Linen model and its parameters."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.hf.checkpoint import Checkpoint, locate, model_config
from genlora_jax.hf.names import Tensor, tensors
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

    Returns:
        The model and its parameters. Beyond these, at most one stacked leaf is held in memory.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or a file of it is missing.
        ValueError: If its architecture is not supported, or a tensor is missing, damaged or
            of another shape.
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
    )
    shapes = parameter_shapes(model)
    parts: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in tensors(shapes):
        parts.setdefault(tensor.path, []).append(tensor)
    flat = {}
    with Checkpoint(directory) as checkpoint:
        _refuse_unknown(directory, checkpoint.names() - {t.name for t in tensors(shapes)}, config)
        for leaf_path, leaf in flatten_dict(shapes).items():
            flat[leaf_path] = _read_leaf(checkpoint, parts[leaf_path], leaf)
    return model, unflatten_dict(flat)


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


def _read_leaf(checkpoint: Checkpoint, parts: list[Tensor], leaf: jax.ShapeDtypeStruct) -> Any:
    """One leaf of the tree, layer by layer into one array."""
    whole = np.empty(leaf.shape, leaf.dtype)
    for part in parts:
        place = whole if part.index is None else whole[part.index]
        shape = place.shape[::-1] if part.transposed else place.shape
        value = checkpoint.read(part.name, shape)
        place[...] = value.T if part.transposed else value
    return jax.device_put(whole)
