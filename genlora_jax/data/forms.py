"""The forms of rows: which fields make a row's prompt and completion, and which make nothing."""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from genlora_jax.data.conversation import Conversation, conversation
from genlora_jax.validation import listed

Row = dict[str, Any]

# What is asked, what belongs to it, and the field of the answer: the first that a row has.
QUESTIONS = (("question", None, ("answer",)), ("instruction", "input", ("output", "answer")))
PREFERENCES = {"chosen", "rejected"}
NAMES = "prompt and completion, question and answer, instruction and output, messages, or text"


class Form(NamedTuple):
    """What is read of a row and what is trained: a conversation, or a prompt and a completion.

    Attributes:
        prompt: What comes before the completion; nothing before a text.
        completion: What is trained.
        talk: The conversation instead of both, or None.
        made_of: Which fields they are made of, for people.
        used: The names of those fields.
    """

    prompt: str
    completion: str
    talk: Conversation | None
    made_of: str
    used: frozenset[str]


def read_form(row: Row, place: str, *, asked: bool = False) -> Form:
    """A row's form.

    Args:
        row: The row.
        place: What an error names.
        asked: Whether the row is to be answered, so that no text of it can be read as a whole.

    Raises:
        ValueError: If the row has no form that is known, or a field of it is missing or no text.
    """
    if (talk := conversation(row, place)) is not None:
        made_of = f"{', '.join(talk.fields)}: the assistant's turns"
        return Form("", "", talk, made_of, frozenset(talk.fields))
    if "prompt" in row or "completion" in row:
        return _pair(row, place)
    if isinstance(row.get("text"), str) and not asked:
        return Form("", row["text"], None, "text, all of it", frozenset({"text"}))
    for name, more, answers in QUESTIONS:
        if name in row:
            answer = next((n for n in answers if n in row), answers[0])
            return _question(row, place, name, more, answer)
    if PREFERENCES & row.keys():
        raise _preference(place)
    raise ValueError(f"{place}: needs fields {NAMES}; has {names_of(row)}")


def _pair(row: Row, place: str) -> Form:
    if "completion" not in row and PREFERENCES & row.keys():
        raise _preference(place)
    if row.get("label") is False:
        raise ValueError(f"{place}: label is false (a completion that is not wanted): remove it")
    prompt, completion = (text_field(place, row, name) for name in ("prompt", "completion"))
    used = {"prompt", "completion"} | ({"label"} if row.get("label") is True else set())
    return Form(prompt, completion, None, "prompt and completion", frozenset(used))


def _preference(place: str) -> ValueError:
    return ValueError(
        f"{place}: a preference (chosen, rejected), which is not trained on: give prompt and "
        "completion"
    )


def _question(row: Row, place: str, asked: str, more: str | None, answer: str) -> Form:
    """A question and its answer; training and evaluation ask it alike."""
    question, used = text_field(place, row, asked), [asked]
    if more is not None and more in row:
        used.append(more)
        added = text_field(place, row, more)
        question += f"\n{added}" if added else ""
    return Form(
        f"Question: {question}\nAnswer:",
        f" {text_field(place, row, answer)}",
        None,
        f"prompt of {' and '.join(used)}, completion of {answer}",
        frozenset([*used, answer]),
    )


def text_field(place: str, row: Row, name: str) -> str:
    """A field that must be text; ValueError if it is not."""
    if row.get(name) is None:
        raise ValueError(f"{place}: field {name!r} is missing; has {names_of(row)}")
    if not isinstance(row[name], str):
        kind = type(row[name]).__name__
        raise ValueError(f"{place}: field {name!r} is no text but {kind}: write it in quotes")
    return str(row[name])


def unused_fields(row: Row, used: Collection[str]) -> list[str]:
    """The fields of a row that hold something and of which nothing was made."""
    return [name for name in row if name not in used and row[name] not in ("", [], {})]


def names_of(fields: Iterable[str]) -> str:
    """The names of fields for people, the first dozen of them."""
    return listed([repr(name[:40]) for name in fields], 12)
