"""What is trained on, and in which shape."""

from dataclasses import dataclass
from typing import Literal


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
