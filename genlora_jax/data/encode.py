"""Encoding: rows of text to examples of tokens.

Every row is read and tokenised at the start, so that a bad row is reported before the first step
and the counts in the report are of the whole set.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from genlora_jax.data.chat import Passage, chat_passages, end_of_turn_token_ids
from genlora_jax.data.config import DataConfig
from genlora_jax.data.forms import Form, read_form, unused_fields
from genlora_jax.data.report import BadRows, Report, joined
from genlora_jax.data.rows import rows_or_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Example = dict[str, np.ndarray]  # "input_ids": int32 [n], "loss_mask": bool [n]
# What reading or a tokenizer raises over a row.
ROW_ERRORS = (ValueError, TypeError, KeyError, RecursionError)
# What becomes of rows that are too long, by `data.overlong`.
FATES = {"drop": "left out", "truncate": "cut off there", "split": "split", "error": ""}
# Tokenising takes some 300 bytes a character at worst: a text this long two gigabytes.
LONGEST_TEXT = 8_000_000


def encode(
    rows: Iterator[tuple[str, Any]],
    tokenizer: "PreTrainedTokenizerFast",
    cfg: DataConfig,
    source: str,
) -> tuple[list[Example], Report]:
    """Tokenises rows and marks the tokens that are trained.

    A token is trained if a part of it lies in a trained span. The end-of-sequence token that
    follows a completion is trained by its place, so that a pad token of the same id makes no
    difference.

    Args:
        rows: Rows with their places, as of `rows_or_errors`.
        tokenizer: The tokenizer.
        cfg: Lengths, and what becomes of bad rows.
        source: What the report calls them.

    Raises:
        ValueError: If a row is bad and not to be skipped, too many are, or none is left.
    """
    examples: list[Example] = []
    counts: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    idle: dict[str, None] = {}  # a set in order
    first_without = ""
    talks: list[Example] = []
    bad, limit = BadRows(cfg), _longest_text(tokenizer, cfg)
    for place, row in rows:
        counts["rows"] += 1
        try:
            if isinstance(row, ValueError):
                raise row
            form = read_form(row, place)
            passages = _passages(form, tokenizer)
            cut = [_pieces(form, *p, tokenizer, cfg, limit, place) for p in passages]
        except ROW_ERRORS as error:
            bad.add(place, error)
            continue
        forms[form.made_of] += 1
        idle |= dict.fromkeys(unused_fields(row, form.used))
        counts["rewritten"] += len(cut) > 1
        counts["mute"] += len(form.talk.mute) if form.talk is not None else 0
        for pieces, overlong in cut:
            counts["overlong"] += overlong
            # The first token has no context.
            trained = [p for p in pieces if p["loss_mask"][1:].any()]
            if len(trained) < len(pieces):
                counts["without_completion"] += len(pieces) - len(trained)
                first_without = first_without or f"{place}: {_why_untrained(form, overlong)}"
            examples += trained
            talks += trained if form.talk is not None else []
    bad.check(source, counts["rows"])
    report = Report(
        source=source,
        examples=len(examples),
        tokens=sum(len(e["input_ids"]) for e in examples),
        trained_tokens=sum(int(e["loss_mask"][1:].sum()) for e in examples),
        overlong=counts["overlong"],
        overlong_are=FATES[cfg.overlong],
        without_completion=counts["without_completion"],
        first_without=first_without,
        endless=bool(talks) and _never_trained_to_end(talks, tokenizer),
        rewritten=counts["rewritten"],
        mute=counts["mute"],
        forms=forms,
        unused=list(idle),
        bad=bad.count,
        first_bad=bad.first,
    )
    if not examples:
        raise ValueError(f"{report.summary}: nothing to train on")
    return examples, report


def _longest_text(tokenizer: "PreTrainedTokenizerFast", cfg: DataConfig) -> int:
    """How many characters of a row are tokenised: longer ones have more tokens than are asked."""
    if cfg.overlong == "split":
        return LONGEST_TEXT
    return max(map(len, tokenizer.get_vocab())) * (cfg.length + 1) + 1000


def _pieces(
    form: Form,
    text: str,
    spans: Sequence[tuple[int, int]],
    tokenizer: "PreTrainedTokenizerFast",
    cfg: DataConfig,
    limit: int,
    place: str,
) -> tuple[list[Example], bool]:
    """The examples of a row's text, and whether it is too long for one."""
    cut = len(text) > limit
    if cut and cfg.overlong in ("split", "error"):
        raise ValueError(f"{place}: {len(text):,} characters in one row: cut it into shorter rows")
    plain = form.talk is None  # a chat template writes its own tokens of begin and end
    ids, mask = _tokenize(text[:limit], spans, tokenizer, special=plain, ends=plain and not cut)
    pieces = [slice(i, i + cfg.length) for i in range(0, max(len(ids), 1), cfg.length)]
    overlong = cut or len(ids) > cfg.length
    if overlong:
        if cfg.overlong == "error":
            raise ValueError(
                f"{place}: {len(ids)} tokens, more than data.length = {cfg.length}; "
                "raise it, or set data.overlong to drop, truncate or split"
            )
        pieces = {"drop": [], "truncate": pieces[:1], "split": pieces}[cfg.overlong]
    # Copies: a view of a short piece would keep the whole text in memory.
    return [{"input_ids": ids[p].copy(), "loss_mask": mask[p].copy()} for p in pieces], overlong


def _passages(form: Form, tokenizer: "PreTrainedTokenizerFast") -> list[Passage]:
    """A row's text, and the parts of it that are trained; several if a chat template needs it."""
    if form.talk is not None:
        return chat_passages(form.talk, tokenizer)
    text = form.prompt + form.completion
    return [(text, [(len(form.prompt), len(text))] if form.completion else [])]


def _never_trained_to_end(examples: list[Example], tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether no trained token is one that ends a turn, or could."""
    ends = end_of_turn_token_ids(tokenizer)[:1] or list(tokenizer.added_tokens_decoder)
    return not any(np.isin(e["input_ids"][e["loss_mask"]], ends).any() for e in examples)


def _why_untrained(form: Form, overlong: bool) -> str:
    """Why nothing of a row is trained, for people."""
    if form.talk is not None and not form.talk.trained:
        roles = sorted({message["role"] for message in form.talk.messages})
        return f"no turn of the assistant's is trained and says something; roles {', '.join(roles)}"
    return "the trained part lies in other pieces" if overlong else "its completion is empty"


def _tokenize(
    text: str,
    spans: Sequence[tuple[int, int]],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    special: bool,
    ends: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """A text's tokens, int32 `[n]`, and which of them are trained, bool `[n]`."""
    eos = tokenizer.eos_token_id
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        add_special_tokens=special,
        verbose=False,  # `encode` counts what is too long
    )
    ids = encoded["input_ids"]
    mask = [
        any(start < last and first < stop for start, stop in spans)
        for first, last in encoded["offset_mapping"]
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
    """Reads and tokenises a source or several; see `rows_or_errors` and `encode`."""
    sources = [sources] if isinstance(sources, str) else sources
    examples, reports = [], []
    for source in sources:
        found, report = encode(rows_or_errors(source), tokenizer, cfg, source)
        examples += found
        reports.append(report)
    return examples, joined(reports)
