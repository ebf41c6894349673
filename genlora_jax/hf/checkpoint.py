"""A Hugging Face checkpoint as a directory: its config and its safetensors, one file or sharded."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from genlora_jax.models.llama import LlamaConfig, RopeScaling

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ARCHITECTURES = ("llama",)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def locate(path: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a checkpoint: a local one as it is, a hub id downloaded to the cache.

    Raises:
        FileNotFoundError: If it is neither a local directory nor to be had from the hub.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(
            snapshot_download(
                str(path),
                revision=revision,
                token=token,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"],
            )
        )
    except Exception as error:  # whatever the hub's client raises, the user named no checkpoint
        raise FileNotFoundError(
            f"{path} is no local directory, and the hub did not give it: {error}"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object; errors name the file."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent} has no {file.name}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: {error}") from error


def model_config(directory: Path) -> LlamaConfig:
    """The model's shape from `config.json`.

    Raises:
        ValueError: If the architecture, or an option of it, is not supported; names the field.
    """
    file = directory / "config.json"
    data = read_json(file)
    kind = data.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{file}: model_type {kind!r} is not supported; there is {', '.join(ARCHITECTURES)}"
        )
    if "quantization_config" in data:
        raise ValueError(f"{file}: quantized checkpoints are not supported; take the original")
    if data.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{file}: hidden_act {data['hidden_act']!r} is not supported; silu is")
    try:
        heads = data["num_attention_heads"]
        # transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`.
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        config = LlamaConfig(
            vocab_size=data["vocab_size"],
            hidden_size=data["hidden_size"],
            intermediate_size=data["intermediate_size"],
            num_hidden_layers=data["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=data.get("num_key_value_heads") or heads,
            head_dim=data.get("head_dim") or data["hidden_size"] // heads,
            max_position_embeddings=data.get("max_position_embeddings", 2048),
            rms_norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or data.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope),
            tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
            attention_bias=bool(data.get("attention_bias", False)),
            mlp_bias=bool(data.get("mlp_bias", False)),
        )
    except KeyError as error:
        raise ValueError(f"{file}: field {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer.

    Raises:
        ValueError: If there is none, or none that knows where in the text its tokens lie.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} has no usable tokenizer: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{directory}: the tokenizer is no fast one; it needs a tokenizer.json")
    return tokenizer


def checkpoint_dtype(directory: Path) -> str:
    """The dtype that `config.json` names, such as `bfloat16`; `float32` if it names none."""
    config = read_json(directory / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def stop_tokens(directory: Path) -> list[int]:
    """Ids of the tokens that end a text, as generation config or else config has them."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            ids = read_json(directory / name).get("eos_token_id")
            if ids is not None:
                return [ids] if isinstance(ids, int) else list(ids)
    return []


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported; llama3 and none are")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


class Checkpoint:
    """The tensors of a directory, read one at a time from memory-mapped files.

    Raises:
        FileNotFoundError: If there are no safetensors, or a shard is missing.
        ValueError: If a file is truncated or otherwise damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._stack = contextlib.ExitStack()
        if (directory / INDEX).is_file():
            weight_map = read_json(directory / INDEX).get("weight_map", {})
            files = {name: self._open(name) for name in sorted(set(weight_map.values()))}
            self._where = {tensor: files[name] for tensor, name in weight_map.items()}
        elif (directory / SINGLE).is_file():
            file = self._open(SINGLE)
            self._where = {tensor: file for tensor in file.keys()}  # noqa: SIM118
        else:
            raise FileNotFoundError(
                f"{directory} has neither {SINGLE} nor {INDEX}; "
                "checkpoints in PyTorch's pickle format are not read"
            )

    def _open(self, name: str) -> Any:
        file = self.directory / name
        if not file.is_file():
            raise FileNotFoundError(f"{self.directory} lacks the shard {name}")
        try:
            return self._stack.enter_context(safetensors.safe_open(file, framework="numpy"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is damaged or truncated: {error}") from error

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def read(self, name: str, shape: tuple[int, ...]) -> Any:
        """One tensor as a NumPy array.

        Raises:
            ValueError: If it is missing or has another shape.
        """
        if name not in self._where:
            raise ValueError(f"{self.directory}: tensor {name} is missing")
        try:
            value = self._where[name].get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.directory}: tensor {name}: {error}") from error
        if value.shape != shape:
            raise ValueError(
                f"{self.directory}: tensor {name} has shape {value.shape}, not {shape}"
            )
        return value
