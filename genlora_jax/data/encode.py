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

from genlora_jax.data.config import DataConfig
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
        ids, mask = _tokenize(row, tokenizer, place)
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
) -> tuple[np.ndarray, np.ndarray]:
    """A row's tokens, int32 `[n]`, and which of them are trained, bool `[n]`."""
    text, spans, ends = text_spans(row, tokenizer, place)
    eos = tokenizer.eos_token_id
    # A chat template writes its own begin-of-sequence token.
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        add_special_tokens="messages" not in row,
        verbose=False,  # `encode` counts what is too long
    )
    ids = encoded["input_ids"]
    mask = [
        any(start < last <= stop for start, stop in spans) for _, last in encoded["offset_mapping"]
    ]
    if ends:
        if eos is None:
            raise ValueError("the tokenizer has no end-of-sequence token")
        if ids and ids[-1] == eos:
            ids, mask = ids[:-1], mask[:-1]  # some tokenizers add it themselves
        ids, mask = [*ids, eos], [*mask, any(mask)]
    return np.array(ids, np.int32), np.array(mask, bool)


def load_examples(
    sources: str | Sequence[str], tokenizer: "PreTrainedTokenizerFast", cfg: DataConfig
) -> tuple[list[Example], Report]:
    """Reads and tokenises a source or several; see `read_rows` and `encode`."""
    sources = [sources] if isinstance(sources, str) else sources
    rows = itertools.chain.from_iterable(map(read_rows, sources))
    return encode(rows, tokenizer, cfg, ", ".join(sources))
