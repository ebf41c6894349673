"""Texts to tokens, many at once, and which of them are trained."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tokens = tuple[np.ndarray, np.ndarray]  # ids int32 [n], and which are trained, bool [n]
# What reading or a tokenizer raises over a row.
ROW_ERRORS = (ValueError, TypeError, KeyError, RecursionError)
# At once: in each process the encodings of so many take some 100 MB, at worst a gigabyte.
CHARACTERS = 3_000_000


class Text(NamedTuple):
    """A text to tokenise: a row's, or one of a conversation's.

    Attributes:
        text: The text, or as much of it as is needed.
        spans: Its trained parts, in characters.
        plain: Whether it is no conversation: a chat template writes its own tokens of begin and
            end.
        characters: How many the whole has.
    """

    text: str
    spans: Sequence[tuple[int, int]]
    plain: bool
    characters: int

    @property
    def cut(self) -> bool:
        """Whether it is the begin of a longer one."""
        return self.characters > len(self.text)


def tokenized(
    texts: Sequence[Text], tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Tokens | Exception]:
    """The tokens of each text, or what was raised over it."""
    for batch in _batches(texts):
        try:
            yield from [*_tokenize(batch, tokenizer)]
        except ROW_ERRORS as error:  # which text it was, it does not say
            alone = len(batch) == 1
            yield from [error] if alone else (r for t in batch for r in tokenized([t], tokenizer))


def _tokenize(texts: Sequence[Text], tokenizer: "PreTrainedTokenizerFast") -> Iterator[Tokens]:
    """The tokens of texts that are all plain, or all of conversations."""
    plain, eos = texts[0].plain, tokenizer.eos_token_id
    encoded = tokenizer(
        [text.text for text in texts],
        add_special_tokens=plain,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # of texts that are long; whoever asked counts them
    )
    for text, ids, encoding in zip(texts, encoded["input_ids"], encoded.encodings, strict=True):
        ends = plain and not text.cut
        if ends and eos is None:
            raise ValueError("the tokenizer has no end-of-sequence token")
        # Some tokenizers add the end themselves.
        count = len(ids) - (ends and ids[-1:] == [eos])
        mask = np.zeros(count + ends, bool)
        for start, stop in trained_tokens(encoding, len(ids), text.spans):
            mask[start : min(stop, count)] = True
        if ends:
            ids[count:] = [eos]
            mask[-1] = mask.any()
        yield np.array(ids, np.int32), mask


def trained_tokens(
    encoding: Any, count: int, spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """The ranges of tokens of which a part lies in spans of characters.

    Tokens stand in the order of the text, so that those of a span are found by bisection: to ask
    for every token's place takes a quarter as long as tokenising.

    Args:
        encoding: A text as `tokenizers` encodes it.
        count: Its tokens.
        spans: Begins and ends.
    """
    place, first, last = encoding.token_to_chars, 0, count
    # The tokens that a tokenizer itself adds have no place in the text.
    while first < last and place(first) is None:
        first += 1
    while first < last and place(last - 1) in (None, (0, 0)):
        last -= 1
    tokens = range(first, last)
    for start, stop in spans:
        begin = bisect_left(tokens, start + 1, key=lambda token: place(token)[1])
        end = bisect_left(tokens, stop, lo=begin, key=lambda token: place(token)[0])
        yield first + begin, first + end


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Texts that are tokenised at once: all plain or none, and not too many characters."""
    batch: list[Text] = []
    characters = 0
    for text in texts:
        characters += len(text.text)
        if batch and (text.plain != batch[0].plain or characters > CHARACTERS):
            yield batch
            batch, characters = [], len(text.text)
        batch.append(text)
    if batch:
        yield batch
