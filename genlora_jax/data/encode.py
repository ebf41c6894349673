"""Encoding: rows of text to examples of tokens.

Every row is read and tokenised at the start, so that a bad row is reported before the first step
and the counts in the report are of the whole set.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from genlora_jax.data.chat import chat_passages
from genlora_jax.data.config import DataConfig
from genlora_jax.data.conversation import conversation
from genlora_jax.data.rows import read_rows, text_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Example = dict[str, np.ndarray]  # "input_ids": int32 [n], "loss_mask": bool [n]


@dataclass(frozen=True)
class Report:
    """What became of the rows of a source."""

    source: str
    examples: int
    tokens: int
    trained_tokens: int
    overlong: int
    without_completion: int

    def __str__(self) -> str:
        text = (
            f"{self.source}: {self.examples:,} examples, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} of them trained"
        )
        if self.overlong:
            text += f"; {self.overlong:,} rows longer than the limit"
        if self.without_completion:
            text += f"; {self.without_completion:,} rows with nothing to train on, left out"
        return text


def encode(
    rows: Iterator[tuple[str, dict[str, Any]]],
    tokenizer: "PreTrainedTokenizerFast",
    cfg: DataConfig,
    source: str,
) -> tuple[list[Example], Report]:
    """Tokenises rows and marks the tokens that are trained.

    A token is trained if it ends within a trained span. The end-of-sequence token that follows
    a completion is trained by its place, so that a pad token of the same id makes no difference.

    Raises:
        ValueError: If a row is bad, or none is left.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for place, row in rows:
        passages = _tokenize(row, tokenizer, place)
        dropped["split_conversations"] += len(passages) > 1
        for ids, mask in passages:
            pieces = [slice(i, i + cfg.length) for i in range(0, max(len(ids), 1), cfg.length)]
            if len(ids) > cfg.length:
                dropped["overlong"] += 1
                if cfg.overlong == "error":
                    raise ValueError(
                        f"{place}: {len(ids)} tokens, more than data.length = {cfg.length}; "
                        "raise it, or set data.overlong to drop, truncate or split"
                    )
                pieces = {"drop": [], "truncate": pieces[:1], "split": pieces}[cfg.overlong]
            for piece in pieces:
                if not mask[piece][1:].any():  # the first token is predicted from nothing
                    dropped["without_completion"] += 1
                    continue
                # Copies: a view of a short piece would keep the whole text in memory.
                examples.append({"input_ids": ids[piece].copy(), "loss_mask": mask[piece].copy()})
    report = Report(
        source=source,
        examples=len(examples),
        tokens=sum(len(e["input_ids"]) for e in examples),
        trained_tokens=sum(int(e["loss_mask"][1:].sum()) for e in examples),
        overlong=dropped["overlong"],
        without_completion=dropped["without_completion"],
    )
    if not examples:
        raise ValueError(f"{report}: nothing to train on")
    return examples, report


def _tokenize(
    row: dict[str, Any], tokenizer: "PreTrainedTokenizerFast", place: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A row's tokens, int32 `[n]`, and which of them are trained, bool `[n]`.

    A conversation may take several of these; see `chat_passages`.
    """
    if (talk := conversation(row, place)) is None:
        text, spans = text_spans(row, place)
        ids, mask = _with_mask(text, spans, tokenizer, special=True)
        eos = tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer has no end-of-sequence token")
        if ids and ids[-1] == eos:
            ids, mask = ids[:-1], mask[:-1]  # some tokenizers add it themselves
        encoded = [([*ids, eos], [*mask, any(mask)])]
    else:  # the chat template writes all special tokens
        encoded = [_with_mask(*p, tokenizer, special=False) for p in chat_passages(talk, tokenizer)]
    return [(np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in encoded]


def _with_mask(
    text: str,
    spans: Sequence[tuple[int, int]],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    special: bool,
) -> tuple[list[int], list[bool]]:
    """A text's tokens, and which of them have a part in a trained span."""
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        add_special_tokens=special,
        verbose=False,  # `encode` counts what is too long
    )
    mask = [
        any(start < last and first < stop for start, stop in spans)
        for first, last in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], mask


def load_examples(
    sources: str | Sequence[str], tokenizer: "PreTrainedTokenizerFast", cfg: DataConfig
) -> tuple[list[Example], Report]:
    """Reads and tokenises a source or several; see `read_rows` and `encode`."""
    sources = [sources] if isinstance(sources, str) else sources
    rows = itertools.chain.from_iterable(map(read_rows, sources))
    return encode(rows, tokenizer, cfg, ", ".join(sources))
