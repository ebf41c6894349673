"""Rows: where they come from, and which text of a row is read and which is trained."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a source, each with the place that an error names (`FILE:LINE`).

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If a line is no JSON object.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        if not path.is_file():
            raise FileNotFoundError(f"no such data file: {path}")
        if path.suffix == ".json" and (rows := _json_array(path)) is not None:
            yield from rows
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{place}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{place}: a row must be a JSON object")
                yield place, row
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        if not path.is_file():
            raise FileNotFoundError(f"no such data file: {path}")
        rows = pyarrow.parquet.read_table(path).to_pylist()
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
    else:
        rows = _hugging_face_rows(source)
        yield from ((f"{source}: row {number}", dict(row)) for number, row in enumerate(rows, 1))


def _json_array(path: Path) -> list[tuple[str, dict[str, Any]]] | None:
    """The rows of a file that is one JSON array; None if it is none."""
    text = path.read_text(encoding="utf-8")
    if not text.lstrip().startswith("["):
        return None
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number}: a row must be a JSON object")
    return [(f"{path}: row {number}", row) for number, row in enumerate(rows, 1)]


def _hugging_face_rows(source: str) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"{source} is no .jsonl or .parquet file. To read it with Hugging Face datasets: "
            'pip install "genlora_jax[datasets]"'
        )
    import datasets

    name, _, split = source.partition(":")
    try:
        if not Path(name).is_dir():
            return datasets.load_dataset(name, split=split or "train")
        saved = datasets.load_from_disk(name)
    except Exception as error:  # whatever the library raises, the user named no data set
        raise FileNotFoundError(f"no data at {source}: {error}") from error
    return saved[split or "train"] if isinstance(saved, datasets.DatasetDict) else saved


def text_spans(
    row: dict[str, Any], tokenizer: "PreTrainedTokenizerFast", place: str
) -> tuple[str, list[tuple[int, int]], bool]:
    """A row's text and the parts of it, in characters, that are trained.

    Returns:
        The text, `[start, stop)` spans, and whether an end-of-sequence token is to follow.

    Raises:
        ValueError: If a field is missing or has another type.
    """
    if "messages" in row:
        return *_chat_spans(row["messages"], tokenizer, place), False
    given = "prompt" in row or "completion" in row
    if isinstance(row.get("text"), str) and not given:
        return row["text"], [(0, len(row["text"]))] if row["text"] else [], True
    if (pair := prompt_and_completion(row, place)) is not None:
        text = "".join(pair)
        return text, [(len(pair[0]), len(text))] if pair[1] else [], True
    raise ValueError(
        f"{place}: needs fields prompt and completion, question and answer, messages, or text; "
        f"has {sorted(row)}"
    )


def prompt_and_completion(row: dict[str, Any], place: str) -> tuple[str, str] | None:
    """A row's prompt and completion; a question (or instruction) and its answer make them, too.

    Returns:
        The two, or None if the row is of another form.

    Raises:
        ValueError: If one of them is missing or no text.
    """
    if "prompt" in row or "completion" in row:
        return text_field(place, row, "prompt"), text_field(place, row, "completion")
    for name in ("question", "instruction"):
        if name in row:
            asked, answer = text_field(place, row, name), text_field(place, row, "answer")
            return f"Question: {asked}\nAnswer:", f" {answer}"
    return None


def text_field(place: str, row: dict[str, Any], name: str) -> str:
    """A field that must be text; ValueError if it is not."""
    if not isinstance(row.get(name), str):
        raise ValueError(f"{place}: field {name!r} is missing or no text")
    return row[name]


def _chat_spans(
    messages: Any, tokenizer: "PreTrainedTokenizerFast", place: str
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation in the tokenizer's chat template, and where the assistant speaks.

    A turn of the assistant is what the template adds to the conversation before it and the
    cue to answer: its end-of-turn mark is trained, its header is not.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{place}: has messages, but the tokenizer has no chat template")
    messages = conversation(messages, place)

    def render(count: int, cue: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=cue
            )
        )

    text, spans = render(len(messages), False), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, upto = render(i, True), render(i + 1, False)
        if not upto.startswith(before) or not text.startswith(upto):
            raise ValueError(
                f"{place}: the chat template rewrites earlier turns, so that turn {i + 1} cannot "
                "be told from the text before it; give prompt and completion instead"
            )
        spans.append((len(before), len(upto)))
    return text, spans


def conversation(messages: Any, place: str) -> list[dict[str, Any]]:
    """A row's messages; ValueError unless they are objects with role and content."""
    if not isinstance(messages, Sequence) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
    ):
        raise ValueError(f"{place}: messages must be a list of objects with role and content")
    return list(messages)
