"""Encoding: rows of text to examples of tokens.

Rows are tokenised by the thousand: a tokenizer then works on all cores, and is asked for little
more than the ids. What becomes of a row does not depend on the others.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from genlora_jax.data.chat import Passage, chat_passages, end_of_turn_token_ids
from genlora_jax.data.config import DataConfig
from genlora_jax.data.examples import Example
from genlora_jax.data.forms import Form, read_form, unused_fields
from genlora_jax.data.report import Report, Tally, joined
from genlora_jax.data.rows import rows_or_errors
from genlora_jax.data.tokens import ROW_ERRORS, Text, Tokens, tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PlacedRow = tuple[str, Any]  # what an error names; a row, or a ValueError in its place
Cut = tuple[list[Example], bool]  # a text in pieces, and whether it was too long for one
# Tokenising takes some 300 bytes a character at worst: a text this long two gigabytes.
LONGEST_TEXT = 8_000_000
ROWS = 1000  # at once: in many small batches a tokenizer takes up to a quarter longer


class Encoder:
    """Tokenises rows and marks the tokens that are trained.

    A token is trained if a part of it lies in a trained span. The end-of-sequence token that
    follows a completion is trained by its place, so that a pad token of the same id makes no
    difference.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", cfg: DataConfig) -> None:
        """Takes a tokenizer, and lengths and what becomes of bad rows."""
        self.tokenizer = tokenizer
        self.cfg = cfg

    def __call__(self, rows: Sequence[PlacedRow]) -> tuple[list[list[Example]], Tally]:
        """The examples of each row, and what became of them.

        Raises:
            ValueError: If a row is bad and not to be skipped.
        """
        read = [self._read(place, row) for place, row in rows]
        tokens = tokenized([text for _, texts, _ in read for text in texts], self.tokenizer)
        examples: list[list[Example]] = []
        tally = Tally(Counter(rows=len(rows)))
        for (place, row), (form, texts, error) in zip(rows, read, strict=True):
            own = [*itertools.islice(tokens, len(texts))]
            try:
                if form is None:
                    raise error or AssertionError
                cut = [self._pieces(*both, place) for both in zip(texts, own, strict=True)]
            except ROW_ERRORS as problem:
                tally.add_bad(place, problem, stop=self.cfg.bad_rows == "error")
                examples.append([])
            else:
                examples.append(self._counted(tally, place, row, form, cut))
        return examples, tally

    @cached_property
    def _limit(self) -> int:
        """How many characters of a row are tokenised: longer ones have more tokens than asked."""
        if self.cfg.overlong == "split":
            return LONGEST_TEXT
        return max(map(len, self.tokenizer.get_vocab())) * (self.cfg.length + 1) + 1000

    @cached_property
    def _ends(self) -> Sequence[int]:
        """The tokens that end a turn, or could."""
        return end_of_turn_token_ids(self.tokenizer)[:1] or [*self.tokenizer.added_tokens_decoder]

    def _read(self, place: str, row: Any) -> tuple[Form | None, Sequence[Text], Exception | None]:
        """A row's form and texts, or what is wrong with it."""
        try:
            if isinstance(row, ValueError):
                raise row
            form = read_form(row, place)
            passages = _passages(form, self.tokenizer)
            texts = [
                Text(text[: self._needed(len(text))], spans, form.talk is None, len(text))
                for text, spans in passages
            ]
        except ROW_ERRORS as error:
            return None, (), error
        return form, texts, None

    def _needed(self, characters: int) -> int:
        """How many of a text's characters are tokenised; none of a text that will be refused."""
        if characters <= self._limit:
            return characters
        return 0 if self.cfg.overlong in ("split", "error") else self._limit

    def _pieces(self, text: Text, tokens: Tokens | Exception, place: str) -> Cut:
        """The examples of a text, and whether it is too long for one."""
        length, overlong = self.cfg.length, self.cfg.overlong
        if text.cut and not text.text:
            raise ValueError(
                f"{place}: {text.characters:,} characters in one row: cut it into shorter rows"
            )
        if isinstance(tokens, Exception):
            raise tokens
        ids, mask = tokens
        if len(ids) <= length and not text.cut:
            return [{"input_ids": ids, "loss_mask": mask}], False
        if overlong == "error":
            raise ValueError(
                f"{place}: {len(ids)} tokens, more than data.length = {length}; "
                "raise it, or set data.overlong to drop, truncate or split"
            )
        stop = {"drop": 0, "truncate": length, "split": len(ids)}[overlong]
        pieces = [slice(i, i + length) for i in range(0, stop, length)]
        # Copies: a view of a short piece would keep the whole text in memory.
        return [{"input_ids": ids[p].copy(), "loss_mask": mask[p].copy()} for p in pieces], True

    def _counted(
        self, tally: Tally, place: str, row: Any, form: Form, cut: Sequence[Cut]
    ) -> list[Example]:
        """Counts what became of a row; returns its examples of which something is trained."""
        examples: list[Example] = []
        for pieces, overlong in cut:
            # The first token has no context.
            counts = [int(np.count_nonzero(piece["loss_mask"][1:])) for piece in pieces]
            trained = [*itertools.compress(pieces, counts)]
            if without := len(pieces) - len(trained):
                tally.add_without(without, place, _why_untrained(form, overlong))
            tally.counts["overlong"] += overlong
            tally.counts["trained_tokens"] += sum(counts)
            examples += trained
        tally.counts["tokens"] += sum(len(example["input_ids"]) for example in examples)
        tally.counts["examples"] += len(examples)
        tally.counts["rewritten"] += len(cut) > 1
        tally.forms[form.made_of] += 1
        tally.unused |= dict.fromkeys(unused_fields(row, form.used))
        if form.talk is not None:
            tally.counts["mute"] += len(form.talk.mute)
            tally.counts["chats"] += len(examples)
            tally.ended = tally.ended or any(
                np.isin(e["input_ids"][e["loss_mask"]], self._ends).any() for e in examples
            )
        return examples


def _passages(form: Form, tokenizer: "PreTrainedTokenizerFast") -> list[Passage]:
    """A row's text, and the parts of it that are trained; several if a chat template needs it."""
    if form.talk is not None:
        return chat_passages(form.talk, tokenizer)
    text = form.prompt + form.completion
    return [(text, [(len(form.prompt), len(text))] if form.completion else [])]


def _why_untrained(form: Form, overlong: bool) -> str:
    """Why nothing of a row is trained, for people."""
    if form.talk is not None and not form.talk.trained:
        roles = sorted({message["role"] for message in form.talk.messages})
        return f"no turn of the assistant's is trained and says something; roles {', '.join(roles)}"
    return "the trained part lies in other pieces" if overlong else "its completion is empty"


def batches_of_rows(rows: Iterable[PlacedRow]) -> Iterator[list[PlacedRow]]:
    """Rows by the thousand; what reading raises comes after the rows before it."""
    batch: list[PlacedRow] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == ROWS:
                yield batch
                batch = []
    except Exception:
        yield batch
        raise
    yield batch


def encode(
    rows: Iterable[PlacedRow], tokenizer: "PreTrainedTokenizerFast", cfg: DataConfig, source: str
) -> tuple[list[Example], Report]:
    """The examples of rows, as `Encoder` makes them, in one list.

    Args:
        rows: Rows with their places, as of `rows_or_errors`.
        tokenizer: The tokenizer.
        cfg: Lengths, and what becomes of bad rows.
        source: What the report calls them.

    Raises:
        ValueError: If a row is bad and not to be skipped, too many are, or none is left.
    """
    encoder, tally = Encoder(tokenizer, cfg), Tally()
    examples: list[Example] = []
    for batch in batches_of_rows(rows):
        found, counted = encoder(batch)
        examples += itertools.chain.from_iterable(found)
        tally.add(counted)
    return examples, tally.report(source, cfg)


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
