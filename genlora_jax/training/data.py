"""Data: rows of text to packed batches of tokens.

Every row is read and tokenised at the start, so that a bad row is reported before the first step
and the counts in the report are of the whole set.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import grain
import grain.experimental
import numpy as np

from genlora_jax.training.rows import read_rows, text_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Example = dict[str, np.ndarray]  # "input_ids": int32 [n], "loss_mask": bool [n]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and in which shape.

    Attributes:
        train: A `.jsonl`, `.json` or `.parquet` file, a directory that `datasets` saved, or a data
            set's id on the hub (`ID` or `ID:SPLIT`; the split is `train` by default); or several.
        eval: The same for evaluation; None for none.
        length: Tokens in a row of a batch.
        batch_size: Rows of a batch; of every step, over all of its accumulated parts.
        pack: Several examples in a row, kept apart by segment ids.
        overlong: What becomes of an example of more than `length` tokens: `"drop"`,
            `"truncate"`, `"split"` into several, or `"error"`.
        seed: Seed of the order.
    """

    train: str | list[str]
    eval: str | list[str] | None = None
    length: int = 1024
    batch_size: int = 16
    pack: bool = True
    overlong: Literal["drop", "truncate", "split", "error"] = "drop"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        for name in ("train", "eval"):
            if getattr(self, name) in ([], ""):
                raise ValueError(f"data.{name} names no source")
        if self.length < 2:
            raise ValueError(f"data.length must be at least 2, got {self.length}")
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, got {self.batch_size}")
        if self.overlong not in ("drop", "truncate", "split", "error"):
            raise ValueError(f"data.overlong: unknown policy {self.overlong!r}")


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
    eos = tokenizer.eos_token_id
    for place, row in rows:
        text, spans, ends = text_spans(row, tokenizer, place)
        # A chat template writes its own begin-of-sequence token.
        encoded = tokenizer(
            text,
            return_offsets_mapping=True,
            add_special_tokens="messages" not in row,
            verbose=False,  # what is too long is counted below
        )
        ids = encoded["input_ids"]
        mask = [
            any(start < last <= stop for start, stop in spans)
            for _, last in encoded["offset_mapping"]
        ]
        if ids and ids[-1] == eos and ends:
            ids, mask = ids[:-1], mask[:-1]  # some tokenizers add it themselves
        if ends:
            if eos is None:
                raise ValueError("the tokenizer has no end-of-sequence token")
            ids, mask = [*ids, eos], [*mask, any(mask)]
        pieces = [(ids, mask)]
        if len(ids) > cfg.length:
            dropped["overlong"] += 1
            if cfg.overlong == "error":
                raise ValueError(
                    f"{place}: {len(ids)} tokens, more than data.length = {cfg.length}; "
                    "raise it, or set data.overlong to drop, truncate or split"
                )
            starts = range(0, len(ids), cfg.length)
            pieces = [(ids[i : i + cfg.length], mask[i : i + cfg.length]) for i in starts]
            pieces = {"drop": [], "truncate": pieces[:1], "split": pieces}[cfg.overlong]
        for ids, mask in pieces:
            if not any(mask[1:]):  # the first token is predicted from nothing
                dropped["without_completion"] += 1
                continue
            examples.append(
                {"input_ids": np.array(ids, np.int32), "loss_mask": np.array(mask, bool)}
            )
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


def load_examples(
    sources: str | Sequence[str], tokenizer: "PreTrainedTokenizerFast", cfg: DataConfig
) -> tuple[list[Example], Report]:
    """Reads and tokenises a source or several; see `read_rows` and `encode`."""
    sources = [sources] if isinstance(sources, str) else sources
    rows = itertools.chain.from_iterable(map(read_rows, sources))
    return encode(rows, tokenizer, cfg, ", ".join(sources))


def _pack(dataset: grain.IterDataset, cfg: DataConfig) -> grain.IterDataset:
    lengths = {"input_ids": cfg.length, "loss_mask": cfg.length}
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset,
        length_struct=lengths,
        num_packing_bins=cfg.batch_size,
        shuffle_bins=False,
        max_sequences_per_bin=None if cfg.pack else 1,
    )
    return packed.map(
        lambda row: {
            "input_ids": row["input_ids"],
            "loss_mask": row["loss_mask"],
            "segment_ids": row["input_ids_segment_ids"],
            "positions": row["input_ids_positions"],
        }
    )


def train_batches(
    examples: Sequence[Example], cfg: DataConfig, *, epochs: int | None = None
) -> grain.IterDataset:
    """Shuffled batches; the iterator's state can be saved and restored.

    Args:
        examples: From `load_examples`.
        cfg: Shape, packing and seed.
        epochs: How often each example is seen; None for ever. Every epoch has its own order.

    Returns:
        Batches of `input_ids`, `segment_ids` (0 at padding), `positions` int32 and `loss_mask`
        bool, all `[batch_size, length]`.
    """
    rows = grain.MapDataset.source(examples).seed(cfg.seed).shuffle().repeat(epochs)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
    return _pack(rows.to_iter_dataset(options), cfg).batch(cfg.batch_size, batch_fn=_stack(cfg))


def eval_batches(examples: Sequence[Example], cfg: DataConfig) -> list[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is filled with padding."""
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
    rows = grain.MapDataset.source(examples).to_iter_dataset(options)
    return list(_pack(rows, cfg).batch(cfg.batch_size, batch_fn=_stack(cfg)))


def _stack(cfg: DataConfig) -> Any:
    """Stacks rows to a batch of full size, the missing ones all padding."""

    def stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        missing = cfg.batch_size - len(rows)
        return {
            name: np.pad(np.stack([row[name] for row in rows]), ((0, missing), (0, 0)))
            for name in rows[0]
        }

    return stack
