"""A Hugging Face checkpoint as a directory: its config and its safetensors, one file or sharded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genlora_jax.atomic_files import recover
from genlora_jax.hf.families import parse_config
from genlora_jax.hf.tensorfile import TensorFile
from genlora_jax.models.config import LlamaConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG, GENERATION = "config.json", "generation_config.json"
# What an export copies, as far as it is there: the tokenizer's files, and how answers end.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", GENERATION),
)
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def locate(
    path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    files: Sequence[str] = FILES,
) -> Path:
    """The directory of a checkpoint: a local one itself, a hub id downloaded to the cache.

    Args:
        path: Local directory or hub id.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub.
        files: Patterns of the files that are downloaded; `[CONFIG]` for the model's shape alone.

    Raises:
        FileNotFoundError: If it is neither a local directory nor to be had from the hub.
    """
    recover(path)  # a merge into it may have been killed
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(
            snapshot_download(str(path), revision=revision, token=token, allow_patterns=[*files])
        )
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{path} is a gated model: ask for access on its page at huggingface.co, then set "
            "HF_TOKEN to an access token of that account"
        ) from error
    except Exception as error:  # the client's errors have no common base class
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{path} is no local directory, and the hub did not give it: {reason}"
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
    return parse_config(directory / CONFIG, read_json(directory / CONFIG))


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """The checkpoint's tokenizer.

    Raises:
        ValueError: If there is none, or none that knows the position in the text of each token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} has no usable tokenizer: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{directory}: the tokenizer is not a fast one; it needs a tokenizer.json")
    return tokenizer


def checkpoint_dtype(directory: Path) -> str:
    """The dtype that `config.json` names, such as `bfloat16`; `float32` if it names none."""
    config = read_json(directory / CONFIG)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def stop_tokens(directory: Path) -> list[int]:
    """Ids of the tokens that end a text, as generation config or else config has them."""
    for name in (GENERATION, CONFIG):
        if (directory / name).is_file():
            ids = read_json(directory / name).get("eos_token_id")
            if ids is not None:
                return [ids] if isinstance(ids, int) else list(ids)
    return []


class Checkpoint:
    """The tensors of a directory.

    Raises:
        FileNotFoundError: If there are no safetensors, or a shard is missing.
        ValueError: If a file is truncated or otherwise damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if (directory / INDEX).is_file():
            weight_map = read_json(directory / INDEX).get("weight_map", {})
            files = {name: self._open(name) for name in sorted(set(weight_map.values()))}
            self._where = {tensor: files[name] for tensor, name in weight_map.items()}
        elif (directory / SINGLE).is_file():
            file = self._open(SINGLE)
            self._where = dict.fromkeys(file.entries, file)
        else:
            raise FileNotFoundError(
                f"{directory} has neither {SINGLE} nor {INDEX}; "
                "checkpoints in PyTorch's pickle format are not read"
            )

    def _open(self, name: str) -> TensorFile:
        if not (self.directory / name).is_file():
            raise FileNotFoundError(f"{self.directory} lacks the shard {name}")
        return TensorFile(self.directory / name)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def read(self, name: str, shape: tuple[int, ...], rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some of its rows.

        Raises:
            ValueError: If it is missing or has another shape.
        """
        file = self._where.get(name)
        if file is None or name not in file.entries:
            raise ValueError(f"{self.directory}: tensor {name} is missing")
        if (found := file.entries[name].shape) != shape:
            raise ValueError(f"{self.directory}: tensor {name} has shape {found}, not {shape}")
        return file.read(name, rows)
