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


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _source_rows(source: str) -> Iterator[tuple[str, Any]]:
    path = storage_path(source)
    if path.is_file():
        if file_kind(path.name) is None:
            raise ValueError(f"{source}: a file of another kind than {FILES}: convert or rename it")
        return file_rows(path)
    name = source.partition(":")[0]
    if is_remote(source):
        raise FileNotFoundError(f"no such data file: {source}: check the bucket and the path")
    is_id = HUB_ID.fullmatch(source) and not SUFFIX.search(name)
    if not is_id and not Path(name).is_dir():
        raise FileNotFoundError(f"no such data file: {source}")
    return _hugging_face_rows(source)


def _hugging_face_rows(source: str) -> Iterator[tuple[str, Any]]:
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
            data = datasets.load_dataset(name, split=split or "train")
        if isinstance(data, datasets.DatasetDict):
            data = data[split or "train"]
    except Exception as error:  # whatever the library raises, the user named no data set
        raise FileNotFoundError(f"no data at {source}: {_said(error)}") from error
    number = 0
    try:
        for number, row in enumerate(data, 1):
            yield f"{source}: row {number}", without_nulls(row)
    except Exception as error:  # of decoding images, or damaged files
        raise ValueError(f"{source}: row {number + 1}: {_said(error)}") from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
