"""Digests of files of rows, which tell whether a cache was made of them."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from genlora_jax.data.rows import is_hub_id
from genlora_jax.storage import is_remote, listed, size_and_version, storage_path
from genlora_jax.threads import in_threads

WHOLE = 4 << 30  # bytes of a local file up to which all of it is in its digest
PLACES, SAMPLE = 64, 4096  # of any other file: at how many places it is looked at, and their bytes
REQUESTS = 16  # at once


def rows_digest(
    names: Sequence[str], known: Mapping[str, str] = MappingProxyType({})
) -> str | None:
    """A digest of files' content; None if one is not there.

    Of a data set on the hub it sees the name alone.

    Args:
        names: Of sources.
        known: What `whole_digest` of a file's content says, by the file's name; other files are
            read.
    """
    digests = []
    for name in names:
        if is_hub_id(name) or name in known:
            digests.append(known.get(name, name))
            continue
        try:
            found = [_file_digest(path) for path in _files(name)]
        except FileNotFoundError:
            return None
        if not found:
            return None
        digests += found
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def whole_digest() -> Any:
    """What the digest of a file whose bytes all count is made with."""
    return hashlib.sha256()


def _files(name: str) -> list[Any]:
    """The files of a source, in order: itself, or all below a directory."""
    place = name if is_remote(name) or Path(name).exists() else name.partition(":")[0]
    path = storage_path(place)
    if path.is_file():
        return [path]
    if is_remote(place):
        return [path / below for below in listed(place)]
    return sorted((found for found in _below(path) if found.is_file()), key=str)


def _below(path: Path) -> Iterator[Path]:
    """What is below a directory, also behind links, as readers follow them; no loop of links."""
    for directory, inner, names in os.walk(path, followlinks=True):
        here = Path(directory)
        above = {other.resolve() for other in (here, *here.parents)}
        inner[:] = [name for name in inner if (here / name).resolve() not in above]
        yield from (here / name for name in names)


def _file_digest(path: Any) -> str:
    """A digest of a file: of all of it, or if that takes long of its version and some places."""
    size, version = size_and_version(path)
    if not is_remote(path) and size <= WHOLE:
        with path.open("rb") as file:
            return hashlib.file_digest(file, whole_digest).hexdigest()

    def sample(start: int) -> bytes:
        count = min(SAMPLE, size - start)
        if is_remote(path):
            return bytes(path.read_range(start, count))
        with path.open("rb") as file:
            file.seek(start)
            return bytes(file.read(count))

    starts = sorted({*np.linspace(0, max(size - SAMPLE, 0), PLACES, dtype=np.int64).tolist()})
    parts = in_threads(sample, starts if size else [], REQUESTS)
    return hashlib.sha256(b"".join([f"{size} {version} ".encode(), *parts])).hexdigest()
