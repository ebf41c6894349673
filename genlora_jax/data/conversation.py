"""Conversations as rows hold them: turns, tools, and which of the assistant's turns are trained."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
# Fields and roles of a turn in ShareGPT's rows -> their names in chat templates.
FIELDS = {"from": "role", "value": "content"}
ROLES = {"human": "user", "gpt": "assistant"}
# Fields of a turn that say whether it is trained: OpenAI's (and Mistral's, Axolotl's), two more of
# Axolotl's, verl's (and Fireworks'), and ms-swift's (and ChatGLM's). None is rendered.
FLAGS = ("weight", "train", "training", "trainable", "loss")


@dataclass(frozen=True)
class Conversation:
    """A conversation, ready for a chat template.

    Attributes:
        messages: The turns, of `role` and `content` or `tool_calls`.
        trained: Which of them are trained, by index.
        tools: Descriptions of the functions that the assistant may call.
        settings: Further variables of the template.
        fields: The fields of the row that it is made of.
        place: What an error names.
    """

    messages: Sequence[Message]
    trained: tuple[int, ...] = ()
    tools: list[dict[str, Any]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    fields: tuple[str, ...] = ("messages",)
    place: str = "the conversation"

    @property
    def mute(self) -> tuple[int, ...]:
        """The turns of the assistant's that say nothing, by index; they are never trained."""
        turns = enumerate(self.messages)
        return tuple(i for i, turn in turns if turn["role"] == "assistant" and not _says(turn))


def conversation(row: dict[str, Any], place: str) -> Conversation | None:
    """A row's conversation; None if the row is of another form.

    It is in `messages`, in `conversations` (ShareGPT), or in `prompt` and `completion`, of which
    the second is trained. `tools` and `chat_template_kwargs` may stand beside it, as objects or as
    JSON text.

    Raises:
        ValueError: If a turn or a field beside it is not as it must be; names turn and field.
    """
    fields = [name for name in ("messages", "conversations") if row.get(name) is not None][:1]
    if not fields and all(isinstance(row.get(n), list) for n in ("prompt", "completion")):
        fields = ["prompt", "completion"]
    if not fields:
        return None
    prompt: list[Any] = row["prompt"] if len(fields) == 2 else []
    messages = row[fields[-1]]
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = _parsed(messages, list, f"{place}: {fields[-1]}")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: {fields[-1]} must be a list of objects with role and content")
    turns = [_turn(message, f"{place}: turn {i}") for i, message in enumerate(prompt + messages, 1)]
    beside = [n for n in ("tools", "chat_template_kwargs") if row.get(n) not in (None, "", [], {})]
    tools = _parsed(row["tools"], list, f"{place}: tools") if "tools" in beside else None
    if not all(isinstance(tool, dict) for tool in tools or ()):
        raise ValueError(f"{place}: tools must be a list of objects that describe functions")
    given = row.get("chat_template_kwargs") or {}
    settings = _parsed(given, dict, f"{place}: chat_template_kwargs")
    return Conversation(
        messages=[message for message, _ in turns],
        trained=tuple(i for i, (_, trained) in enumerate(turns) if trained and i >= len(prompt)),
        tools=tools or None,
        settings={name: value for name, value in settings.items() if value is not None},
        fields=(*fields, *beside),
        place=place,
    )


def _turn(given: Any, place: str) -> tuple[Message, bool]:
    """A turn as chat templates know it, and whether it is trained."""
    if not isinstance(given, dict):
        raise ValueError(f"{place} is no object with role and content")
    names = {theirs: ours for theirs, ours in FIELDS.items() if ours not in given}
    # Fields without a value are left out, as transformers does: a template would print "None".
    message = {str(names.get(n, n)): value for n, value in given.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{place} has no role: it must name who speaks")
    role = message["role"].strip().lower()
    role = message["role"] = ROLES.get(role, role)
    flags = {_flag(message.pop(name), f"{place}: {name}") for name in FLAGS if name in message}
    if len(flags) > 1:
        raise ValueError(f"{place}: fields that say whether it is trained contradict one another")
    if True in flags and role != "assistant":
        raise ValueError(f"{place} is the {role}'s: only the assistant's can be trained")
    if message.get("tool_calls"):
        calls = _parsed(message["tool_calls"], list, f"{place}: tool_calls")
        message["tool_calls"] = [_tool_call(call, place) for call in calls]
    elif "content" not in message:
        raise ValueError(f"{place} ({role}) has neither content nor tool_calls")
    if "content" in message:
        message["content"] = _text(message["content"], f"{place}: content")
    return message, role == "assistant" and _says(message) and False not in flags


def _says(message: Message) -> bool:
    return bool(message.get("tool_calls") or message.get("content", "").strip())


def _flag(value: Any, what: str) -> bool:
    if value not in (0, 1) or not isinstance(value, int | float):  # True and False among them
        raise ValueError(f"{what} is {value!r}: a turn is trained (1) or not (0)")
    return bool(value)


def _text(content: Any, what: str) -> str:
    """Text, or the text of a list of parts; templates that take parts put nothing between them."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    for kind, text in zip(kinds, texts, strict=True):
        if kind != "text" or not isinstance(text, str):
            found = f"a part of type {kind!r}" if kind not in ("text", None) else "something else"
            raise ValueError(f"{what} must be text, or a list of text parts, and has {found}")
    return "".join(texts)  # type: ignore[arg-type]


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """A call of a function, its arguments an object: text would be quoted a second time."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place}: tool_calls must be objects with a function's name")
    what = f"{place}: the arguments of {function['name']}"
    function = function | {"arguments": _parsed(function.get("arguments") or {}, dict, what)}
    return call | {"function": function} if "function" in call else function


def _parsed(value: Any, kind: type, what: str) -> Any:
    """A value of a type, which may be given as JSON text, as data sets with columns do."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what} is no JSON: {error}") from None
    if not isinstance(value, kind):
        name = "a list" if kind is list else "an object"
        raise ValueError(f"{what} must be {name}, or one as JSON text")
    return value
