"""Rows: where they come from."""

import importlib.util
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from genlora_jax.data.files import COMPRESSED, READERS, file_kind, file_rows, without_nulls
from genlora_jax.storage import is_remote, storage_path

Row = dict[str, Any]

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[^/]+)?")
# Ids of the hub have versions (`.5`, `.v2`) where files have suffixes.
SUFFIX = re.compile(r"\.(?!v?[0-9])\w+$")
FILES = f"{', '.join(READERS)}, each also with {' or '.join(COMPRESSED)}"


def read_rows(source: str) -> Iterator[tuple[str, Row]]:
    """The rows of a source, each with the place that an error names (`FILE:LINE`).

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If a row is bad.
    """
    for place, row in rows_or_errors(source):
        if isinstance(row, ValueError):
            raise row
        yield place, row


def rows_or_errors(source: str) -> Iterator[tuple[str, Row | ValueError]]:
    """The rows of a source, and in place of a bad one what is wrong with it.

    A field of null, or of NaN, which is how pandas writes it, counts as missing.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If the source cannot be read at all, or not beyond a place.
    """
    return checked(_source_rows(source))


def checked(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Row | ValueError]]:
    """Rows as they are read, without fields that are missing; a row of another kind is an error."""
    for place, row in rows:
        if isinstance(row, dict):
            yield place, {name: value for name, value in row.items() if not _missing(value)}
        elif isinstance(row, ValueError):
            yield place, row
        else:
            yield place, ValueError(f"{place}: a row must be a JSON object")


def is_hub_id(source: str) -> bool:
    """Whether a source that is not here can be a data set of the hub."""
    name = source.partition(":")[0]
    return not Path(name).exists() and not SUFFIX.search(name) and bool(HUB_ID.fullmatch(source))


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _source_rows(source: str) -> Iterator[tuple[str, Any]]:
    path = storage_path(source)
    if path.is_file():
        if file_kind(path.name) is None:
            raise ValueError(f"{source}: a file of another kind than {FILES}: convert or rename it")
        return file_rows(path)
    if is_remote(source):
        raise FileNotFoundError(f"no such data file: {source}: check the bucket and the path")
    if not is_hub_id(source) and not Path(source.partition(":")[0]).is_dir():
        raise FileNotFoundError(f"no such data file: {source}")
    return _hugging_face_rows(source)


def _hugging_face_rows(source: str) -> Iterator[tuple[str, Any]]:
    return placed_rows(source, hugging_face_data(source))


def placed_rows(source: str, data: Iterable[Any], first: int = 0) -> Iterator[tuple[str, Any]]:
    """The rows of a Hugging Face data set from a number on, with their places."""
    number = first
    try:
        for number, row in enumerate(data, first + 1):
            yield f"{source}: row {number}", without_nulls(row)
    except Exception as error:  # of decoding images, or damaged files
        raise ValueError(f"{source}: row {number + 1}: {_said(error)}") from error


def hugging_face_data(source: str, *, streaming: bool = False) -> Any:
    """A Hugging Face data set, from the hub or a directory that `datasets` saved.

    Args:
        source: `ID`, `ID:SPLIT` or the directory.
        streaming: Whether one of the hub is not downloaded first.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If `datasets` is not installed.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"{source} is no file ({FILES}). To read it with Hugging Face datasets: "
            'pip install "genlora_jax[datasets]"'
        )
    import datasets

    name, _, split = source.partition(":")
    try:
        if Path(name).is_dir():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, split=split or "train", streaming=streaming)
        return data[split or "train"] if isinstance(data, datasets.DatasetDict) else data
    except Exception as error:  # whatever the library raises, the user named no data set
        raise FileNotFoundError(f"no data at {source}: {_said(error)}") from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
