"""Files of rows: JSON, CSV and parquet, as they come, plain or compressed.

A reader yields `(place, row)`, where `place` is what an error names (`FILE:LINE`). A row that
cannot be read is a ValueError in the place of the row, so that whoever reads may go on after it.
What makes the rest of a file unreadable is raised.
"""

import contextlib
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from genlora_jax.storage import is_remote
from genlora_jax.validation import LFS_POINTER

Rows = Iterator[tuple[str, Any]]

COMPRESSED = (".gz", ".zst")
# What a file begins with says how it is compressed, whatever its name.
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
SPACE = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
MARK = b"\xef\xbb\xbf"  # UTF-8's byte-order mark
BLOCK = 3 << 20  # bytes of lines that are read at once
MANY = 2**31 - 1  # characters that a CSV's cell may have


def file_kind(name: str) -> str | None:
    """The suffix that says how a file is read, without that of a compression; None if unknown."""
    path = Path(name.lower())
    suffix = (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix
    return suffix if suffix in READERS else None


def file_rows(path: Path) -> Rows:
    """The rows of a file whose kind is known; see above.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is none of its kind.
    """
    reader, codec = READERS[str(file_kind(path.name))], compression(path)
    if reader is _parquet_rows:
        if codec is not None:
            raise ValueError(f"{path}: a compressed file around parquet: decompress it first")
        yield from _parquet_rows(path)
        return
    with _decompressed(path, codec) as stream:
        yield from reader(path, stream)


def line_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """The whole lines of a file, in blocks, each with the number of its first line."""
    number, parts = 1, []
    with _decompressed(path, compression(path)) as stream:
        while block := stream.read(BLOCK):
            end = block.rfind(b"\n") + 1
            parts.append(block[:end] if end else block)
            if end:
                lines = b"".join(parts)
                yield number, lines
                number += lines.count(b"\n")
                parts = [block[end:]]
    if rest := b"".join(parts):
        yield number, rest


def compression(path: Path) -> str | None:
    """How a file is compressed, if it is; ValueError if it is no file of rows at all."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(LFS_POINTER):
        raise ValueError(
            f"{path}:1: a pointer of Git LFS, not the data: fetch them with git lfs pull"
        )
    return next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)


@contextlib.contextmanager
def _decompressed(path: Path, codec: str | None) -> Iterator[BinaryIO]:
    try:
        with _open(path, codec) as stream:
            yield stream
    except OSError as error:
        if codec is None or _of_bucket(path, error):
            raise
        raise ValueError(f"{path}: damaged {codec} data: {error}: fetch it again") from error


def _open(path: Path, codec: str | None) -> BinaryIO:
    if codec is None:
        return path.open("rb")
    source = path.open("rb") if is_remote(path) else str(path)
    return io.BufferedReader(_pyarrow(path).CompressedInputStream(source, codec))


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(
            f'{path}: takes pyarrow to read: pip install "genlora_jax[train]"'
        ) from None
    return pyarrow


def decoded(data: bytes, path: Path, first_line: int = 1) -> str:
    """Text of a file's bytes; ValueError that names the line if they are no UTF-8."""
    if first_line == 1:
        data = data.removeprefix(MARK)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in data[:64]:
        raise ValueError(f"{path}:{first_line}: UTF-16 or no text: save the file as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}:{line}: no UTF-8 (byte 0x{data[error.start]:02x}), perhaps Latin-1: save the "
            "file as UTF-8"
        ) from None


def json_lines(path: Path, stream: BinaryIO, first_line: int = 1) -> Rows:
    """The rows of one JSON object a line; the number of the first line may be another than 1."""
    for number, line in enumerate(stream, first_line):
        place = f"{path}:{number}"
        try:
            text = decoded(line, path, number).strip("\ufeff \t\r\n")
            if not text:
                continue
            row, end = _json_value(text, 0, path, number)
            if text[end:].strip():
                raise ValueError(f"{place}: not JSON: text after the end of a row")
        except ValueError as error:
            row = error
        yield place, row


def _json_file(path: Path, stream: BinaryIO) -> Rows:
    """The rows of one JSON array, of one object a line, or of objects over several lines."""
    data = stream.read()
    text = decoded(data, path)
    at = _after_space(text, 0)
    array = text.startswith("[", at)
    stop = text.find("\n", at)
    if not array and text[at : stop if stop > 0 else None].rstrip().endswith("}"):
        yield from json_lines(path, io.BytesIO(data))
        return
    line, counted = 1, 0
    at = _after_space(text, at + array)
    while at < len(text) and not (array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        row, at = _json_value(text, at, path, line)
        yield f"{path}:{line}", row
        at = _after_space(text, at)
        if array and text.startswith(",", at):
            at = _after_space(text, at + 1)
        elif array:
            break
    if array and text[at:].strip() != "]":
        line += text.count("\n", counted, at)
        raise ValueError(f"{path}:{line}: not JSON: an array must go on with , or end with ]")


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def _json_value(text: str, at: int, path: Path, line: int) -> tuple[Any, int]:
    """The JSON value at a position of a text, and where it ends."""
    try:
        value, end = DECODER.raw_decode(text, at)
        if SURROGATE.search(text, at, end):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        value = ValueError(
            f"{path}:{line}: {half} is half a character, which no tokenizer reads: write the "
            "character whole, or leave it out"
        )
    except json.JSONDecodeError as error:
        line += text.count("\n", at, error.pos)
        raise ValueError(f"{path}:{line}: not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{path}:{line}: nested too deeply: leave that field out") from None
    except ValueError as error:  # of `_object`, or a number of thousands of digits
        raise ValueError(f"{path}:{line}: {error}") from None
    return value, end


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if it has a field twice, of which one would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"field {_twice([name for name, _ in pairs])!r} is there twice")
    return fields


def _twice(names: list[str]) -> str | None:
    counts = Counter(names)
    return next((name for name in names if counts[name] > 1), None)


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _csv_rows(path: Path, stream: BinaryIO) -> Rows:
    """The rows of a table whose first line names the columns; every cell is text."""
    csv.field_size_limit(MANY)
    lines = (decoded(line, path, number) for number, line in enumerate(stream, 1))
    delimiter = "\t" if file_kind(path.name) == ".tsv" else ","
    table, line = csv.reader(lines, delimiter=delimiter, strict=True), 1
    header: list[str] = []
    try:
        for cells in table:
            place, line = f"{path}:{line}", table.line_num + 1
            if not header:
                # Spreadsheets leave columns without a name, and mostly without content.
                header = [name or f"column {i}" for i, name in enumerate(cells, 1)]
                if (name := _twice(header)) is not None:
                    raise ValueError(f"{place}: two columns are named {name!r}: rename one")
            elif len(cells) == len(header):
                yield place, dict(zip(header, cells, strict=True))
            elif cells:
                wrong = f"{len(cells)} cells, but the first line names {len(header)} columns"
                yield place, ValueError(f"{place}: {wrong}: put cells with commas in double quotes")
    except csv.Error as error:
        raise ValueError(
            f"{path}:{line}: no row of a table: {error}: check its double quotes"
        ) from None


def _parquet_rows(path: Path) -> Rows:
    pyarrow = _pyarrow(path)
    number, twice = 0, None
    remote: Any = path
    source = remote.at_random() if is_remote(path) else path
    # What of a bucket is needed is asked for at once, in large pieces.
    options = {"page_checksum_verification": True, "pre_buffer": is_remote(path)}
    try:
        with pyarrow.parquet.ParquetFile(source, **options) as file:
            twice = _twice(file.schema_arrow.names)
            for batch in () if twice else file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if _of_bucket(path, error):
            raise
        raise ValueError(
            f"{path}: row {number + 1} or after it: no parquet, or damaged: {error}"
        ) from error
    if twice is not None:
        raise ValueError(f"{path}: two columns are named {twice!r}: rename one")


def _of_bucket(path: Path, error: Exception) -> bool:
    """Whether an error is that of a bucket, which names the URL, and not of what a file holds."""
    return is_remote(path) and isinstance(error, OSError) and str(path) in str(error)


def without_nulls(value: Any) -> Any:
    """A value of a table, where an object has the fields of all objects in its column.

    Those that its row did not have are null, and would reach the descriptions and calls of tools.
    """
    if isinstance(value, dict):
        return {name: without_nulls(v) for name, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


# How a file is read, by its suffix.
READERS: dict[str, Any] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": _json_file,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
