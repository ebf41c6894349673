"""Examples as people read them: what is trained stands on lines that begin with `+`."""

import itertools
import re
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from genlora_jax.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def shown(number: int, example: Example, tokenizer: "PreTrainedTokenizerFast") -> str:
    """An example's text; on a terminal what is trained is green.

    Every line of it begins with `+` if it is trained and with a space if not. Line breaks and other
    characters that do not print are written as in Python.
    """
    ids, trained = example["input_ids"].tolist(), example["loss_mask"].copy()
    trained[0] = False  # it is predicted from nothing
    text = Text(f"example {number}: {len(ids)} tokens, {trained.sum()} of them trained\n")
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    # The text up to each edge: some tokenizers drop the first space of what they decode.
    texts = [str(tokenizer.decode(ids[:i], clean_up_tokenization_spaces=False)) for i in edges]
    for (start, _), (before, upto) in zip(
        itertools.pairwise(edges), itertools.pairwise(texts), strict=True
    ):
        for line in re.findall(r"[^\n]*\n|[^\n]+", upto[len(before) :]):
            printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
            mark, style = ("+", "green") if trained[start] else (" ", "")
            text.append(f"{mark} {printable}\n", style)
    console = Console(soft_wrap=True)
    with console.capture() as captured:
        console.print(text, end="")
    return captured.get()
