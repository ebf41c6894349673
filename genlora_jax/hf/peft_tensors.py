"""`adapter_model.safetensors`: what PEFT stores, by module, whatever its version writes it as."""

import re
from pathlib import Path

import numpy as np

from genlora_jax.hf.tensorfile import TensorFile
from genlora_jax.validation import listed

PREFIX = "base_model.model."
VECTORS = ("lora_B.bias", "lora_magnitude_vector")
Parts = dict[str, dict[str, np.ndarray]]  # by module, then by the part's name: `lora_A.weight`
# A part of an adapter: module, part, perhaps the adapter's name, and `weight` or `bias`.
_PART = re.compile(
    r"(.+?)\.(?:token_adapter\.)?"
    r"(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|hira_[AB]|trainable_tokens_delta)"
    r"(?:\.(?!(?:weight|bias)$)([^.]+))?(\.weight|\.bias)?"
)
# A tensor of the base, as it is or as what wraps its module stores it.
_WHOLE = re.compile(
    r"(.+?)(?:\.(?:token_adapter\.)?base_layer|\.modules_to_save(?:\.([^.]+))?)?\.(weight|bias)"
)


def read_tensors(file: Path) -> tuple[Parts, dict[str, np.ndarray]]:
    """Reads an adapter's tensors, float32.

    Returns:
        The parts of each module's adapter, and the tensors that take the place of the base's, by
        the base's names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, a tensor's name says nothing or the same as another's, or a
            number is not finite.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; pickled adapters are not read")
    opened = TensorFile(file)
    parts: Parts = {}
    whole: dict[str, np.ndarray] = {}
    origins: dict[tuple[str, str], str] = {}
    adapters: set[str] = set()
    for key in opened.entries:
        module, part, adapter = _parse(file, key)
        if (first := origins.setdefault((module, part), key)) != key:
            raise ValueError(f"{file}: tensors {first} and {key} are the same part of {module}")
        adapters |= {adapter} if adapter else set()
        with np.errstate(over="ignore"):
            value = opened.read(key).astype(np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"{file}: tensor {key} holds a NaN or an infinity: train it again")
        if part in ("weight", "bias"):
            whole[f"{module}.{part}"] = value
        elif value.ndim != (1 if part in VECTORS else 2):
            raise ValueError(f"{file}: tensor {key} has shape {value.shape}: damaged, or a shard")
        else:
            parts.setdefault(module, {})[part] = value
    if len(adapters) > 1:
        raise ValueError(f"{file} holds several adapters: {listed(adapters)}. Save them one a file")
    return parts, whole


def _parse(file: Path, key: str) -> tuple[str, str, str | None]:
    """The module, the part, and the adapter's name if there is one, in a tensor's name."""
    name = key.removeprefix(PREFIX)
    if name != key and (found := _PART.fullmatch(name)):
        module, part, adapter, end = found.groups()
        # Some parts are parameters in one version of PEFT, and modules in another.
        return module, part + (end or "") if part in ("lora_A", "lora_B") else part, adapter
    if name != key and (found := _WHOLE.fullmatch(name)):
        return found[1], found[3], found[2]
    raise ValueError(
        f"{file}: tensor {key} is no part of an adapter of peft's: names begin with {PREFIX} and "
        "end with .weight or .bias or the part's name"
    )
