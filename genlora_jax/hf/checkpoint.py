"""A Hugging Face checkpoint as a directory: its config and its safetensors, one file or sharded."""

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from genlora_jax.atomic_files import recover
from genlora_jax.hf.families import parse_config
from genlora_jax.hf.tensorfile import DTYPES, REMOTE_WINDOW, TensorFile, is_finite, window
from genlora_jax.models.config import LlamaConfig
from genlora_jax.storage import is_remote, storage_path
from genlora_jax.threads import in_threads
from genlora_jax.validation import refuse_pointer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG = "config.json"
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
FILES = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", *TEMPLATES, *TERMS)
# What the hub's client raises -> what is said of it, shorter than by the client.
REFUSALS = {
    "HFValidationError": "no name on the hub, which is owner/name: check the path",
    "RevisionNotFoundError": "on the hub it has no such revision: check model.revision",
    "RepositoryNotFoundError": (
        "the hub shows none of that name: check the name, or set HF_TOKEN if the model is private"
    ),
    "LocalEntryNotFoundError": (
        "neither the hub was reached nor is there a copy in its cache: check the path, the "
        "connection and HF_HUB_OFFLINE"
    ),
}
ROWS = 4096  # of a tensor, compared at a time


def locate(
    path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    files: Sequence[str] = FILES,
) -> Path:
    """The directory of a checkpoint: itself, here or in a bucket; a hub id downloaded to the cache.

    Args:
        path: Directory, here or at `gs://` or `s3://`, or hub id.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub.
        files: Patterns of the files that are downloaded; `[CONFIG]` for the model's shape alone.

    Raises:
        FileNotFoundError: If it is neither a directory nor to be had from the hub.
    """
    if not is_remote(path):
        recover(path)  # a merge into it may have been killed
    directory = storage_path(path)
    if directory.is_dir():
        refuse_pointers(directory)
        return directory
    if is_remote(path):
        raise FileNotFoundError(f"{path}: no such directory: check the bucket and the path")
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
        said = f"the hub did not give it: {' '.join(str(error).split())[:160]}"
        kinds = (kind.__name__ for kind in type(error).__mro__)
        reason = next((REFUSALS[name] for name in kinds if name in REFUSALS), said)
        raise FileNotFoundError(f"{path} is no local directory, and {reason}") from error


def refuse_pointers(directory: Path) -> None:
    """Raises ValueError if a file of a checkpoint or of an adapter is a pointer of Git LFS.

    In a bucket, each file is looked at when it is read.
    """
    if is_remote(directory):
        return
    for file in sorted(file for pattern in FILES for file in directory.glob(pattern)):
        if file.is_file():
            refuse_pointer(file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object; errors name the file."""
    try:
        refuse_pointer(file)
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent} has no {file.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found


def model_config(directory: Path) -> LlamaConfig:
    """The model's shape from `config.json`.

    Raises:
        ValueError: If the architecture, or an option of it, is not supported; names the field.
    """
    return parse_config(directory / CONFIG, read_json(directory / CONFIG))


def checkpoint_dtype(directory: Path) -> str:
    """The dtype that `config.json` names, such as `bfloat16`, or else that of the first tensor."""
    config = read_json(directory / CONFIG)
    stated = config.get("dtype") or config.get("torch_dtype")
    return stated or Checkpoint(directory).dtype()


class Checkpoint:
    """The tensors of a directory.

    As in `transformers`: of one file and an index beside it, the file is read, and an index says
    which files there are, not what is in them.

    Raises:
        FileNotFoundError: If there are no safetensors, or a shard is missing.
        ValueError: If a file is truncated or otherwise damaged, or the index leads out of the
            directory, or two files differ in a tensor.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / INDEX
        files = sorted(set(_weight_map(index).values())) if index.is_file() else []
        if (directory / SINGLE).is_file():
            if set(files) - {SINGLE}:
                warnings.warn(
                    f"{directory} has {SINGLE} and an {INDEX} of other files: {SINGLE} is read, as "
                    "transformers does; remove whichever is stale",
                    stacklevel=2,
                )
            files = [SINGLE]
        elif not files:
            raise FileNotFoundError(
                f"{directory} has neither {SINGLE} nor {INDEX}; "
                "checkpoints in PyTorch's pickle format are not read"
            )
        self._where: dict[str, TensorFile] = {}
        for file in list(in_threads(self._open, files, window(directory))):
            for tensor in file.entries:
                other = self._where.setdefault(tensor, file)
                if other is not file and not _equal(other, tensor, file, tensor):
                    raise ValueError(f"tensor {tensor} differs in {other.file} and {file.file}")

    def refuse_changed(self) -> None:
        """Raises OSError if a file in a bucket is another than when its header was read."""
        remote: dict[Any, str] = {f.file: f.version for f in self._where.values() if f.version}
        for _ in in_threads(
            lambda file: file[0].refuse_changed(file[1]), remote.items(), REMOTE_WINDOW
        ):
            pass

    def _open(self, name: str) -> TensorFile:
        if not (self.directory / name).is_file():
            raise FileNotFoundError(f"{self.directory} lacks the shard {name}")
        return TensorFile(self.directory / name)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def size_of(self, name: str) -> int:
        """Bytes of a tensor's floats; 4 of each for one that is quantised."""
        entry = self._where[name].entries[name]
        return math.prod(entry.shape) * (DTYPES[entry.kind].itemsize if entry.kind in DTYPES else 4)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name].file

    def dtype(self) -> str:
        """The dtype of the first tensor of floating point."""
        kinds = (file.entries[name].kind for name, file in self._where.items())
        return next((DTYPES[kind].name for kind in kinds if kind in DTYPES), "float32")

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same bytes."""
        return _equal(self._where[one], one, self._where[other], other)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a tensor is missing or has another shape."""
        file = self._where.get(name)
        if file is None:
            raise ValueError(f"{self.directory}: tensor {name} is missing")
        if (found := file.entries[name].shape) != shape:
            raise ValueError(f"{file.file}: tensor {name} has shape {found}, not {shape}")

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some of its rows."""
        return self._where[name].read(name, rows)

    def refuse_unfit(self, name: str, rows: np.ndarray, dtype: Any) -> None:
        """Raises ValueError if rows of a tensor are not finite, or would not be in a dtype."""
        if not is_finite(rows):
            raise ValueError(
                f"{self.file(name)}: tensor {name} holds a NaN or an infinity: the file is "
                "damaged, or the model had diverged; take another copy"
            )
        if jnp.finfo(dtype).maxexp >= jnp.finfo(rows.dtype).maxexp:
            return
        with np.errstate(over="ignore"):
            fits = is_finite(rows.astype(dtype))
        if not fits:
            raise ValueError(
                f"{self.file(name)}: tensor {name} has values that {np.dtype(dtype).name} cannot "
                "hold; take bfloat16 or float32"
            )


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by an index; each must be in the index's directory."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is missing, empty or no object")
    for tensor, name in weight_map.items():
        # A link in the directory may lead out of it: the hub's cache is made of such.
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{index}: {tensor} is in {name!r}, which is no file of the directory")
    return weight_map


def _equal(file: TensorFile, name: str, other: TensorFile, other_name: str) -> bool:
    """Whether two tensors are the same bytes, read some rows at a time."""
    if (entry := file.entries[name]).shape != other.entries[other_name].shape:
        return False
    if entry.kind != other.entries[other_name].kind:
        return False
    rows = range(0, entry.shape[0], ROWS) if entry.shape else [0]
    return all(
        file.read(name, part).tobytes() == other.read(other_name, part).tobytes()
        for part in (slice(start, start + ROWS) for start in rows)
    )
