"""Chat templates: a conversation as a tokenizer's template renders it, and the trained part."""

import contextlib
import importlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from genlora_jax.data.conversation import Conversation
from genlora_jax.data.time_limit import time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SECONDS = 5.0  # the longest that a template may take for one conversation
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks what the assistant writes
KNOWN_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}
# What a model thinks before it answers: transformers gives it to a template under each name.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
Passage = tuple[str, list[tuple[int, int]]]  # a text, and its trained spans in characters


def chat_passages(talk: Conversation, tokenizer: "PreTrainedTokenizerFast") -> list[Passage]:
    """A conversation's text in the chat template, and the spans of the assistant's turns.

    Where the template marks them (`{% generation %}`), those are the spans. Else a turn is trained
    as the model is asked for it: after what the template makes of the turns before it and the cue
    to answer, of which nothing is trained, up to what ends the turn. A template that shows an
    earlier turn otherwise than when it was the last (Qwen3 drops its thoughts) has no text in which
    all turns stand so. Then there are several passages, and each turn is trained in one of them.

    Raises:
        ValueError: If the template refuses the conversation, leaves a part of it out, or begins a
            turn otherwise than its cue does.
    """
    with _bounded(talk, tokenizer):
        template = _checked_template(talk, tokenizer)
        if GENERATION.search(template):
            return [_marked_by_template(talk, tokenizer, template)]
        passages: list[Passage] = [(_render(talk, tokenizer), [])]
        _check_shown(talk, passages[0][0])
        for i in reversed(talk.trained):
            header, answered = _as_asked(talk, tokenizer, i)
            span = (len(header), len(answered))
            for text, spans in passages:
                if text.startswith(answered):
                    spans.insert(0, span)
                    break
            else:
                passages.append((answered, [span]))
    return [passage for passage in passages if passage[1]] or passages


def render(talk: Conversation, tokenizer: "PreTrainedTokenizerFast", *, cue: bool = False) -> str:
    """A conversation as text, with or without the cue to answer.

    Raises:
        ValueError: If the template refuses the conversation, fails, or takes too long.
    """
    with _bounded(talk, tokenizer):
        _checked_template(talk, tokenizer)
        return _render(talk, tokenizer, cue=cue)


def end_of_turn_token_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """The special tokens that the chat template writes after a message of the assistant, in order.

    The first ends a turn: a model that is trained on chats stops at it.

    Returns:
        Their ids; none without a chat template, if it ends a message by text alone, or if it fails
        on a question and its answer.
    """
    answer = "Fine, thanks."
    messages = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": answer}]
    try:
        _, found, ending = render(Conversation(messages), tokenizer).rpartition(answer)
    except ValueError:
        return ()
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"] if found else []
    return tuple(i for i in ids if i in tokenizer.added_tokens_decoder)


def _render(
    talk: Conversation,
    tokenizer: "PreTrainedTokenizerFast",
    turns: int | None = None,
    *,
    cue: bool = False,
) -> str:
    """The first so many turns as text."""
    with _template_errors(talk, tokenizer):
        return str(
            tokenizer.apply_chat_template(
                list(talk.messages[:turns]),
                tools=[*talk.tools] if talk.tools else None,
                add_generation_prompt=cue,
                tokenize=False,
                **talk.settings,
            )
        )


def _as_asked(
    talk: Conversation, tokenizer: "PreTrainedTokenizerFast", turn: int
) -> tuple[str, str]:
    """What the model is asked before a turn, and the same with its answer."""
    if turn == 0:
        raise ValueError(
            f"{talk.place}: turn 1 is the assistant's and answers nothing: put a turn before it, "
            "or give it weight 0"
        )
    header = _render(talk, tokenizer, turn, cue=True)
    answered = _render(talk, tokenizer, turn + 1)
    if not answered.startswith(header):
        raise ValueError(
            f"{talk.place}: the chat template's cue to answer is not how it begins turn "
            f"{turn + 1}: give fitting chat_template_kwargs (such as enable_thinking), prompt and "
            "completion, or a template with {% generation %}"
        )
    message = talk.messages[turn]
    thoughts = [_ending(message[name]) for name in THOUGHTS if isinstance(message.get(name), str)]
    _check_said(talk, turn, answered[len(header) :], thoughts)
    return header, answered


def _marked_by_template(
    talk: Conversation, tokenizer: "PreTrainedTokenizerFast", template: str
) -> Passage:
    """A conversation's text, and the spans of it that the template itself marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {**tokenizer.special_tokens_map, **talk.settings}
    with _template_errors(talk, tokenizer):
        rendered: Any = render_jinja_template(
            conversations=[list(talk.messages)],
            tools=[*talk.tools] if talk.tools else None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **variables,
        )
    (text,), (marked,) = rendered
    _check_shown(talk, text)
    turns = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
    if len(turns) == len(marked):
        spans = {i: span for i, span in zip(turns, marked, strict=True) if i in talk.trained}
        for i, (start, stop) in spans.items():
            _check_said(talk, i, text[start:stop])
        return text, list(spans.values())
    if len(turns) != len(talk.trained):
        raise ValueError(
            f"{talk.place}: some turns are not to be trained, and the chat template marks "
            f"{len(marked)} spans for {len(turns)} turns: which is whose?"
        )
    for i in turns:
        _check_said(talk, i, "".join(text[start:stop] for start, stop in marked))
    return text, list(marked)


@contextlib.contextmanager
def _template_errors(talk: Conversation, tokenizer: "PreTrainedTokenizerFast") -> Iterator[None]:
    """Gives what a template raises the place of the row: it computes, and can raise anything."""
    try:
        yield
    except TimeoutError:
        raise
    except Exception as error:
        refused = type(error).__name__ == "TemplateError"  # by the template's raise_exception
        said = str(error)[:200] if refused else f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(
            f"{talk.place}: the chat template of {tokenizer.name_or_path} "
            f"{'refuses the conversation' if refused else 'fails'}: {said}: "
            "change the row or the template"
        ) from error


@contextlib.contextmanager
def _bounded(talk: Conversation, tokenizer: "PreTrainedTokenizerFast") -> Iterator[None]:
    """Raises ValueError if a template takes too long: it has loops, and could go on for days."""
    importlib.import_module("transformers.utils.chat_template_utils")  # not within the time
    seconds = SECONDS + len(talk.messages) / 10  # which are rendered again for every turn
    try:
        with time_limit(seconds):
            yield
    except TimeoutError:
        raise ValueError(
            f"{talk.place}: the chat template of {tokenizer.name_or_path} takes longer than "
            f"{seconds:g} seconds: change the row or the template"
        ) from None


def _checked_template(talk: Conversation, tokenizer: "PreTrainedTokenizerFast") -> str:
    """The template for a conversation: some tokenizers have one of its own for tools.

    A template shows what it does not know as it comes, or not at all, without a word.

    Raises:
        ValueError: If there is none, or it knows no such role, no tools, or none of the settings.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{talk.place}: the tokenizer has no chat template: give prompts as text")
    try:
        template = str(tokenizer.get_chat_template(None, talk.tools))
    except ValueError as error:
        raise ValueError(f"{talk.place}: {error}") from None
    for i, message in enumerate(talk.messages, 1):
        role = message["role"]
        if role not in KNOWN_ROLES and not re.search(rf"['\"]{re.escape(role)}['\"]", template):
            raise ValueError(
                f"{talk.place}: turn {i} has the role {role[:50]!r}, which the chat template does "
                f"not name; usual are {', '.join(sorted(KNOWN_ROLES))}, and human and gpt"
            )
        thoughts = any(message.get(name) for name in THOUGHTS)
        if thoughts and not re.search(rf"\b({'|'.join(THOUGHTS)})\b", template):
            raise ValueError(
                f"{talk.place}: turn {i} has thoughts ({', '.join(THOUGHTS)}), of which the chat "
                "template makes no use: take them out of the row, or give it another template"
            )
    for name in talk.settings:
        if name in inspect.signature(tokenizer.apply_chat_template).parameters:
            raise ValueError(f"{talk.place}: chat_template_kwargs cannot set {name!r}")
    for name in (*talk.settings, *(["tools"] if talk.tools else [])):
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"{talk.place}: the chat template makes no use of {name[:50]!r}: take it out of "
                "the row, or give the tokenizer a template that does"
            )
    return template


def _check_shown(talk: Conversation, text: str) -> None:
    """Raises ValueError if the template leaves out what someone says."""
    for i, message in enumerate(talk.messages):
        if not _shown(_ending(message.get("content", "")), text):
            raise ValueError(
                f"{talk.place}: the chat template leaves out turn {i + 1} ({message['role']}): "
                "take it out of the row, or give the tokenizer a template that shows it"
            )


def _check_said(talk: Conversation, turn: int, span: str, thoughts: Sequence[str] = ()) -> None:
    """Raises ValueError if what is trained of a turn is not what the turn says."""
    message = talk.messages[turn]
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls", ())]
    for part in (_ending(message.get("content", "")), *calls, *thoughts):
        if not _shown(part, span):
            raise ValueError(
                f"{talk.place}: what the chat template shows as turn {turn + 1} does not have its "
                f"{part[:50]!r}: give prompt and completion, or another template"
            )


def _ending(text: str) -> str:
    """The end of what a message says, which a template shows at least: some drop thoughts."""
    parts = (part.strip() for part in re.split(r"[\n>\]]", text))
    return ([part for part in parts if part] or [""])[-1]


def _shown(part: str, text: str) -> bool:
    """Whether a text has a part, as it is or as JSON."""
    return any(
        form in text
        for form in (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
    )
