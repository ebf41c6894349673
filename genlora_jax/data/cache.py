"""A cache of a source's examples, which `genlora tokenize` writes and runs read at random.

It is a directory of `lengths.npy`, the tokens of each example; `tokens-00000.bin` and so on, the
examples one after the other as little-endian uint32 of `workers.Encoded`; and `cache.json`. An
example is a range of bytes, so that a bucket gives it as a file does. The directory's name has two
digests: of tokenizer, template and settings, and of the rows.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from genlora_jax.data.config import DataConfig, MixedSource, paths_and_weights
from genlora_jax.data.examples import Example, split_examples
from genlora_jax.data.rows_digest import rows_digest
from genlora_jax.data.sources import source_parts
from genlora_jax.storage import WRITTEN, is_remote, size_and_version, storage_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 3  # of what is written, and in its name
EXAMPLES = 2  # of how rows become examples: part of what a run that goes on must have the same
LENGTHS, INDEX = "lengths.npy", "cache.json"
# What is raised over files that are not as they were written.
DAMAGE = (
    FileNotFoundError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    RecursionError,
)
AGAIN = "run genlora tokenize with the recipe"


class CacheSource:
    """The examples of a cache; each is a row. See `sources.Source`."""

    def __init__(self, directory: str, weights: Sequence[float] | None = None) -> None:
        """Opens the cache in a directory.

        Args:
            directory: Its path or URL.
            weights: Of the sources that it was made of; None for no mixture.

        Raises:
            ValueError: If it is damaged, or of another version.
        """
        self.directory = directory
        path = storage_path(directory)
        try:
            index = json.loads((path / INDEX).read_text())
            lengths = (path / LENGTHS).read_bytes()
            if index.pop("digest") != index_digest(index, lengths):
                raise ValueError(f"{INDEX} or {LENGTHS} is not as it was written")
            self.lengths = np.load(io.BytesIO(lengths), allow_pickle=False)
            self._shards = np.cumsum([0, *index["shards"]], dtype=np.int64)
            self._ends = np.cumsum(self.lengths, dtype=np.int64)
            whole = all(
                size_and_version(path / shard_name(number))[0] == 4 * tokens
                for number, tokens in enumerate(index["shards"])
            )
            whole = whole and len(self.lengths) == sum(index["rows"])
            whole = whole and self._shards[-1] == self._ends[-1]
        except DAMAGE as error:
            raise ValueError(f"{directory}: damaged: {error}: remove it, and {AGAIN}") from error
        if not whole:
            raise ValueError(f"{directory}: damaged: files are too short: remove it, and {AGAIN}")
        self.parts = source_parts(index["rows"], weights)
        self.mean_length = float(self.lengths.mean())
        self.fingerprint = str(index["fingerprint"])
        self.report = f"{index['report']}\n  read from {directory}"

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.lengths)

    def read(self, rows: Sequence[int]) -> list[list[Example]]:
        """The example of each row.

        Raises:
            OSError: If they cannot be read.
        """
        if not len(rows):
            return []
        numbers = np.asarray(rows)
        lengths, ends = self.lengths[numbers], self._ends[numbers]
        shards = np.searchsorted(self._shards, ends - 1, side="right") - 1
        stops = 4 * (ends - self._shards[shards])
        ranges = zip(shards.tolist(), (stops - 4 * lengths).tolist(), stops.tolist(), strict=True)
        data = b"".join(_read(self.directory, [*ranges]))
        if len(data) != 4 * lengths.sum(dtype=np.int64):
            raise OSError(f"{self.directory}: it has changed since it was opened: run again")
        return [[example] for example in split_examples(np.frombuffer(data, "<u4"), lengths)]


def index_digest(index: dict[str, Any], lengths: bytes) -> str:
    """A digest of what says where a cache's examples are."""
    text = json.dumps(index, sort_keys=True).encode()
    return hashlib.sha256(text + lengths).hexdigest()[:16]


def shard_name(number: int) -> str:
    """The name of a file of tokens."""
    return f"tokens-{number:05}.bin"


def _read(directory: str, ranges: Sequence[tuple[int, int, int]]) -> list[bytes]:
    """The bytes of (shard, start, stop); those of a bucket are asked for at once."""
    if is_remote(directory):
        from genlora_jax.remote_path import file_system, naming  # only for a bucket

        shards, starts, stops = zip(*ranges, strict=True)
        paths = [f"{directory}/{shard_name(shard)}" for shard in shards]
        with naming(directory):
            ranges_of = file_system(directory).cat_ranges
            return list(ranges_of(paths, [*starts], [*stops], on_error="raise"))
    opened: dict[int, int] = {}
    try:
        for shard in {shard for shard, _, _ in ranges}:
            opened[shard] = os.open(f"{directory}/{shard_name(shard)}", os.O_RDONLY)
        return [os.pread(opened[shard], stop - start, start) for shard, start, stop in ranges]
    finally:
        for file in opened.values():
            os.close(file)


def find_cache(
    sources: str | Sequence[str | MixedSource],
    tokenizer: "PreTrainedTokenizerFast",
    cfg: DataConfig,
) -> CacheSource:
    """The cache of sources in `cfg.cache`.

    Where the rows themselves can be read, it must be theirs; a host may do without them.

    Raises:
        FileNotFoundError: If there is none of these sources, this tokenizer and these settings.
        ValueError: If it was made of other rows, or cannot be read.
    """
    names, weights = paths_and_weights(sources)
    root, rows = storage_path(str(cfg.cache)), rows_digest(names)
    key = _key(names, tokenizer, cfg, FORMAT)
    listed = [path.name for path in root.iterdir()] if root.is_dir() else []
    found = [
        name for name in listed if name.startswith(f"{key}-") and (root / name / WRITTEN).is_file()
    ]
    if not found:
        raise FileNotFoundError(
            f"data.cache: {cfg.cache} has nothing of {', '.join(names)} for this tokenizer, chat "
            f"template, data.length, data.overlong and data.bad_rows: {AGAIN}"
        )
    if rows is not None and f"{key}-{rows}" not in found:
        raise ValueError(
            f"data.cache: {cfg.cache}/{found[0]} was made of other rows than {', '.join(names)} "
            f"now has: {AGAIN}"
        )
    if rows is None and len(found) > 1:
        raise ValueError(
            f"data.cache: {', '.join(found)} in {cfg.cache} are of different rows, which are not "
            "here to tell: remove all but one"
        )
    return CacheSource(f"{cfg.cache}/{found[0] if rows is None else f'{key}-{rows}'}", weights)


def cache_name(names: Sequence[str], tokenizer: "PreTrainedTokenizerFast", cfg: DataConfig) -> str:
    """The name of the cache of sources.

    Raises:
        FileNotFoundError: If a source is not there.
    """
    return f"{_key(names, tokenizer, cfg, FORMAT)}-{_rows(names)}"


def source_fingerprint(
    names: Sequence[str],
    tokenizer: "PreTrainedTokenizerFast",
    cfg: DataConfig,
    known: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """What tells whether a run goes on with the same examples, however caches are written.

    The digests of sources may be known: see `rows_digest`.

    Raises:
        FileNotFoundError: If a source is not there.
    """
    return f"{_key(names, tokenizer, cfg, EXAMPLES)}-{_rows(names, known)}"


def _rows(names: Sequence[str], known: Mapping[str, str] = MappingProxyType({})) -> str:
    if (rows := rows_digest(names, known)) is None:
        raise FileNotFoundError(f"no such data: {', '.join(names)}")
    return rows


def _key(
    names: Sequence[str], tokenizer: "PreTrainedTokenizerFast", cfg: DataConfig, version: int
) -> str:
    """A digest of all that makes rows into examples."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    used = {name: part for name, part in state.items() if name not in ("truncation", "padding")}
    made = {
        "format": version,
        "sources": names,
        "settings": [cfg.length, cfg.overlong, cfg.bad_rows],
        "tokenizer": [used, tokenizer.eos_token_id, tokenizer.split_special_tokens],
        "template": [tokenizer.chat_template, tokenizer.special_tokens_map],
    }
    text = json.dumps(made, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
