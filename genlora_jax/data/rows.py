"""Rows: where they come from, and which text of a row is read and which is trained."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a source, each with the place that an error names (`FILE:LINE`).

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If a line is no JSON object.
    """
    path = Path(source)
    readers = {".jsonl": _json_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        rows = _hugging_face_rows(source)
    elif path.is_file():
        rows = readers[path.suffix](path)
    else:
        raise FileNotFoundError(f"no such data file: {path}")
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a row must be a JSON object")
        yield place, row


def _numbered(source: object, rows: Any) -> Iterator[tuple[str, Any]]:
    return ((f"{source}: row {number}", row) for number, row in enumerate(rows, 1))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file of one JSON array (`.json`), or of one JSON object a line."""

    def parse(text: str, first_line: int) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            line = first_line + error.lineno - 1
            raise ValueError(f"{path}:{line}: not JSON: {error}") from None

    if path.suffix == ".json":
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            yield from _numbered(path, parse(text, 1))
            return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", parse(line.strip(), number)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    return _numbered(path, pyarrow.parquet.read_table(path).to_pylist())


def _hugging_face_rows(source: str) -> Iterator[tuple[str, Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"{source} is no .jsonl, .json or .parquet file. To read it with Hugging Face "
            'datasets: pip install "genlora_jax[datasets]"'
        )
    import datasets

    name, _, split = source.partition(":")
    try:
        if Path(name).is_dir():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # whatever the library raises, the user named no data set
        raise FileNotFoundError(f"no data at {source}: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        data = data[split or "train"]
    return _numbered(source, data)


def text_spans(row: dict[str, Any], place: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a row without messages and the parts of it, in characters, that are trained.

    Returns:
        The text and `[start, stop)` spans.

    Raises:
        ValueError: If a field is missing or has another type.
    """
    if isinstance(row.get("text"), str) and not {"prompt", "completion"} & row.keys():
        pair: tuple[str, str] | None = ("", row["text"])
    else:
        pair = prompt_and_completion(row, place)
    if pair is None:
        raise ValueError(
            f"{place}: needs fields prompt and completion, question and answer, messages, or text; "
            f"has {sorted(row)}"
        )
    prompt, completion = pair
    text = prompt + completion
    return text, [(len(prompt), len(text))] if completion else []


def prompt_and_completion(row: dict[str, Any], place: str) -> tuple[str, str] | None:
    """A row's prompt and completion, which a question (or instruction) and answer make as well.

    Returns:
        The two, or None if the row is of another form.

    Raises:
        ValueError: If one of them is missing or no text.
    """
    if "prompt" in row or "completion" in row:
        return text_field(place, row, "prompt"), text_field(place, row, "completion")
    for name in ("question", "instruction"):
        if name in row:
            question, answer = text_field(place, row, name), text_field(place, row, "answer")
            return f"Question: {question}\nAnswer:", f" {answer}"
    return None


def text_field(place: str, row: dict[str, Any], name: str) -> str:
    """A field that must be text; ValueError if it is not."""
    if not isinstance(row.get(name), str):
        raise ValueError(f"{place}: field {name!r} is missing or no text")
    return row[name]
