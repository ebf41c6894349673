"""Conversations: their text in a tokenizer's chat template, and which of it is trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def chat_spans(
    messages: Any, tokenizer: "PreTrainedTokenizerFast", place: str
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation in the tokenizer's chat template, and the spans of the assistant's messages.

    A span is what the template adds to the conversation before the message and the cue to answer.
    So the mark that ends the message is trained, and its header is not.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{place}: has messages, but the tokenizer has no chat template")
    messages = conversation(messages, place)

    def render(count: int, **settings: Any) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, **settings))

    text, spans = render(len(messages)), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        header, answered = render(i, add_generation_prompt=True), render(i + 1)
        if not answered.startswith(header) or not text.startswith(answered):
            raise ValueError(
                f"{place}: the chat template rewrites earlier turns, so that turn {i + 1} cannot "
                "be told from the text before it; give prompt and completion instead"
            )
        spans.append((len(header), len(answered)))
    return text, spans


def conversation(messages: Any, place: str) -> list[dict[str, Any]]:
    """A row's messages; ValueError unless they are objects with role and content."""
    if not isinstance(messages, Sequence) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
    ):
        raise ValueError(f"{place}: messages must be a list of objects with role and content")
    return list(messages)
