"""The settings of a run's data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from genlora_jax.validation import require, require_choice, require_float, require_int


@dataclass(frozen=True, kw_only=True)
class MixedSource:
    """A source of a mixture.

    Attributes:
        path: As `data.train` names one.
        weight: Its share of the rows that are read, relative to the others'.
    """

    path: str
    weight: float

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        require_float("data.train: weight", self.weight, 0, above=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and the shape of its batches.

    Attributes:
        train: A file of rows (`.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`), a directory that
            `datasets` saved, or a data set's id on the hub (`ID` or `ID:SPLIT`; the split is
            `train` by default); or several; or a mixture, each with `path` and `weight`.
        eval: The same for evaluation; None for none.
        cache: A directory, here or in a bucket, for what `genlora tokenize` makes of both, and
            which runs then read instead.
        streaming: Read data sets of the hub as the run goes, without downloading them first.
        length: Tokens in a row of a batch.
        batch_size: Rows of a batch, over all micro-batches of a step.
        pack: Several examples in a row, kept apart by segment ids.
        overlong: What becomes of an example of more than `length` tokens: `"drop"`,
            `"truncate"`, `"split"` into several, or `"error"`.
        bad_rows: What becomes of a row that cannot be read or encoded: `"error"`, or `"skip"`,
            which counts and lists them.
        bad_rows_limit: The share of bad rows of a source above which skipping ends in an error.
        seed: Seed of the order.
    """

    train: str | list[str | MixedSource]
    eval: str | list[str] | None = None
    cache: str | None = None
    streaming: bool = False
    length: int = 1024
    batch_size: int = 16
    pack: bool = True
    overlong: Literal["drop", "truncate", "split", "error"] = "drop"
    bad_rows: Literal["error", "skip"] = "error"
    bad_rows_limit: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        for name in ("train", "eval"):
            require(getattr(self, name) not in ([], ""), f"data.{name} names no source")
        mixed = [isinstance(source, MixedSource) for source in listed_sources(self.train)]
        require(all(mixed) or not any(mixed), "data.train: give all sources a weight, or none")
        require_int("data.length", self.length, 2)
        require_int("data.batch_size", self.batch_size, 1)
        require_choice("data.overlong", self.overlong, ("drop", "truncate", "split", "error"))
        require_choice("data.bad_rows", self.bad_rows, ("error", "skip"))
        require_float("data.bad_rows_limit", self.bad_rows_limit, 0)


def listed_sources(sources: str | Sequence[str | MixedSource]) -> list[str | MixedSource]:
    """The sources of `data.train` or `data.eval` as a list."""
    return [sources] if isinstance(sources, str) else [*sources]


def paths_and_weights(
    sources: str | Sequence[str | MixedSource],
) -> tuple[list[str], list[float] | None]:
    """The sources' names, and their weights if they are a mixture."""
    every = listed_sources(sources)
    mixed = [source for source in every if isinstance(source, MixedSource)]
    names = [source if isinstance(source, str) else source.path for source in every]
    return names, [source.weight for source in mixed] or None
