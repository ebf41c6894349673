"""What a PEFT adapter changes in the base itself: whole tensors, rows of tokens, biases."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.base.stored import StoredKernel
from genlora_jax.hf.names import Tensor, tensors
from genlora_jax.hf.peft_settings import EMBEDDING, HEAD, PeftSettings
from genlora_jax.hf.peft_tensors import Parts
from genlora_jax.validation import listed

Change = Callable[[jax.Array], Any]  # a tensor as files hold it, float32 -> what it becomes
TOKENS, EMBEDDING_A, EMBEDDING_B = "trainable_tokens_delta", "lora_embedding_A", "lora_embedding_B"


@dataclass
class BaseChanges:
    """Changes of the base's tensors, by name, in the order in which they are made.

    Attributes:
        file: The adapter's tensors.
        shapes: The shapes of the base's tensors, as files hold them.
        made: The changes.
    """

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    made: dict[str, list[Change]] = field(default_factory=dict)

    def add(self, name: str, change: Change) -> None:
        """Adds one.

        Raises:
            ValueError: If the base has no such tensor.
        """
        if name not in self.shapes:
            raise ValueError(f"{self.file}: changes {name}, which the base does not have")
        self.made.setdefault(name, []).append(change)


def parts_head(
    settings: PeftSettings, parts: Parts, whole: dict[str, np.ndarray], has_head: bool
) -> bool:
    """Whether an adapter gives a base whose head is tied to the embedding a head of its own.

    PEFT adapts and trains either of the two alone. What it merely stores twice is taken out of
    `whole`.
    """
    head, embedding = f"{HEAD}.weight", f"{EMBEDDING}.weight"
    if has_head:
        return False
    if head in whole and embedding in whole and np.array_equal(whole[head], whole[embedding]):
        del whole[head]
    elif embedding in settings.saved([embedding]) and not settings.get("ensure_weight_tying"):
        return True
    return HEAD in parts or head in whole or EMBEDDING_A in parts.get(EMBEDDING, {})


def base_changes(
    file: Path,
    settings: PeftSettings,
    parts: Parts,
    whole: Mapping[str, np.ndarray],
    scales: Mapping[str, float],
    shapes: Mapping[str, tuple[int, ...]],
) -> BaseChanges:
    """What an adapter changes in the base beside its factors.

    Args:
        file: The adapter's tensors.
        settings: Its settings.
        parts: The parts of each module's adapter.
        whole: The tensors that take the place of the base's.
        scales: The factor on the delta of each module with factors.
        shapes: The shapes of the base's tensors, as files hold them.

    Raises:
        ValueError: If a tensor is missing, is not the base's, or does not fit it.
    """
    changes = BaseChanges(file, shapes)
    names = {*shapes, f"{HEAD}.weight"}
    if missing := settings.saved(names) - set(whole):
        raise ValueError(f"{file} lacks {listed(missing)}, which modules_to_save names")
    for name, value in whole.items():
        changes.add(name, functools.partial(_replaced, value))
        _check_shape(file, name, value.shape, shapes[name])
    for module in (EMBEDDING, HEAD):
        ids = settings.tokens(module)
        rows: Any = parts.get(module, {}).get(TOKENS, [])
        if len(ids) != len(rows):
            raise ValueError(
                f"{file} has {len(rows)} rows of {module}; trainable_token_indices names {len(ids)}"
            )
        if ids:
            _add_rows(changes, f"{module}.weight", np.array(ids), rows)
    for module, found in parts.items():
        if EMBEDDING_A in found:
            _add_embedding(changes, module, found, scales[module])
        if "lora_B.bias" in found:
            bias = np.float32(scales[module]) * found["lora_B.bias"]
            changes.add(f"{module}.bias", functools.partial(_plus, bias))
            _check_shape(file, f"{module}.bias", bias.shape, shapes[f"{module}.bias"])
    return changes


def _replaced(value: np.ndarray, old: jax.Array) -> np.ndarray:
    return value


def _plus(value: np.ndarray, old: jax.Array) -> jax.Array:
    return old + value


def _add_rows(changes: BaseChanges, name: str, ids: np.ndarray, rows: np.ndarray) -> None:
    changes.add(name, lambda old: old.at[ids].set(rows))
    size, width = changes.shapes[name]
    _check_shape(changes.file, f"the tokens of {name}", rows.shape, (len(ids), width))
    if ids.max() >= size:
        raise ValueError(
            f"{changes.file}: trainable_token_indices names token {ids.max()}; {name} has {size}"
        )


def _add_embedding(
    changes: BaseChanges, module: str, found: Mapping[str, np.ndarray], scale: float
) -> None:
    """LoRA on the embedding, which is merged: a lookup is no product."""
    delta = np.float32(scale) * (found[EMBEDDING_B] @ found[EMBEDDING_A]).T
    changes.add(f"{module}.weight", functools.partial(_plus, delta))
    _check_shape(changes.file, f"{module}'s delta", delta.shape, changes.shapes[f"{module}.weight"])


def _check_shape(file: Path, name: str, shape: tuple[int, ...], base: tuple[int, ...]) -> None:
    if shape != base:
        raise ValueError(f"{file}: {name} has shape {shape}; the base's has {base}")


def change_base(params: Mapping[str, Any], changes: BaseChanges) -> tuple[Any, list[str]]:
    """The base with an adapter's changes, in its own dtype and sharding.

    Returns:
        The parameters, and the names of the tensors that are no longer what they were.

    Raises:
        ValueError: If the parameters are shapes alone, or a number leaves the range of the base's
            dtype.
    """
    flat, changed = flatten_dict(dict(params)), []
    for tensor in tensors(params):
        if tensor.name not in changes.made:
            continue
        new = _changed(flat[tensor.path], tensor, changes)
        if new is None:
            continue
        flat[tensor.path] = new
        changed.append(tensor.name)
    return unflatten_dict(flat), changed


def _changed(leaf: Any, tensor: Tensor, changes: BaseChanges) -> Any:
    """The leaf with one of its tensors changed; None if that is what it was."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{changes.file} changes {tensor.name}: give the base's parameters, not their shapes"
        )
    if isinstance(leaf, StoredKernel):
        if leaf.rounds:
            raise ValueError(
                f"{changes.file} changes {tensor.name}, which is quantised here: name its module "
                "in model.unquantised"
            )
        kernel = _changed(leaf.astype(leaf.dtype), tensor, changes)
        return None if kernel is None else leaf.store(kernel)
    old = leaf if tensor.index is None else leaf[tensor.index]
    value = (old.T if tensor.transposed else old).astype(jnp.float32)
    for change in changes.made[tensor.name]:
        value = jnp.asarray(change(value))
    new = (value.T if tensor.transposed else value).astype(leaf.dtype)
    if not bool(jnp.isfinite(new).all()):
        raise ValueError(f"{changes.file}: {tensor.name} leaves the range of {leaf.dtype}")
    if bool(jnp.array_equal(new, old)):
        return None
    whole = new if tensor.index is None else leaf.at[tensor.index].set(new)
    return jax.device_put(whole, leaf.sharding)
