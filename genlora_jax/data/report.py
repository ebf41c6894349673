"""What became of the rows of a source: counts, the fields used, and the bad rows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from genlora_jax.data.config import DataConfig
from genlora_jax.data.forms import names_of

SHOWN = 10  # bad rows
# What becomes of rows that are too long, by `data.overlong`.
FATES = {"drop": "left out", "truncate": "cut off there", "split": "split", "error": ""}


@dataclass(frozen=True)
class Report:
    """What became of the rows of a source, or of several.

    Attributes:
        source: Their name, or names.
        examples: Rows and pieces of rows that are trained on.
        tokens: Their tokens.
        trained_tokens: How many of those are predicted.
        overlong: Rows longer than the limit.
        overlong_are: What became of them, in words.
        without_completion: Examples left out because nothing of them is trained.
        first_without: The first of them, and why.
        endless: Whether no turn of a conversation is trained with a token that ends it.
        rewritten: Conversations that took several examples; see `chat_passages`.
        mute: Turns of the assistant's that say nothing, and are not trained.
        forms: Which fields made prompt and completion, and in how many rows.
        unused: Fields that hold something and of which nothing was made.
        bad: Bad rows that were left out.
        first_bad: What is wrong with the first of them.
        parts: The reports of each source, if there are several.
    """

    source: str
    examples: int
    tokens: int
    trained_tokens: int
    overlong: int
    without_completion: int
    first_without: str = ""
    endless: bool = False
    rewritten: int = 0
    mute: int = 0
    overlong_are: str = ""
    forms: Counter[str] = field(default_factory=Counter)
    unused: Sequence[str] = ()
    bad: int = 0
    first_bad: Sequence[str] = ()
    parts: Sequence["Report"] = ()

    def __str__(self) -> str:
        if self.parts:
            return "\n".join(map(str, self.parts))
        text = self.summary
        counts = [
            form if len(self.forms) == 1 else f"{form} ({count:,} rows)"
            for form, count in self.forms.most_common(5)
        ]
        if counts:
            text += f"\n  trained on: {'; '.join(counts)}"
        if self.unused:
            text += f"\n  not used: {names_of(self.unused)}"
        if self.endless:
            text += (
                "\n  no trained turn has a special token that ends it: answers will not end. "
                "Mend the chat template"
            )
        if self.bad:
            text += f"\n  {self.bad:,} bad rows left out:"
            text += "".join(f"\n    {line}" for line in self.first_bad)
        return text

    @property
    def summary(self) -> str:
        """The counts, in a line."""
        text = (
            f"{self.source}: {self.examples:,} examples, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} of them trained"
        )
        if self.overlong:
            text += f"; {self.overlong:,} rows longer than data.length, {self.overlong_are}"
        if self.without_completion:
            text += f"; {self.without_completion:,} rows with nothing to train on, left out"
            text += f" (the first, {self.first_without})"
        if self.rewritten:
            text += (
                f"; {self.rewritten:,} conversations in several examples, as the chat template "
                "shows earlier turns otherwise"
            )
        if self.mute:
            text += f"; {self.mute:,} turns of the assistant's say nothing, and are not trained"
        return text


def joined(reports: Sequence[Report]) -> Report:
    """The report of several sources together."""
    if len(reports) == 1:
        return reports[0]
    counts = ("examples", "tokens", "trained_tokens", "overlong", "without_completion", "bad")
    return Report(
        source=", ".join(report.source for report in reports),
        parts=tuple(reports),
        **{name: sum(getattr(report, name) for report in reports) for name in counts},
    )


@dataclass
class Tally:
    """What has become of rows so far: what a report is made of.

    Attributes:
        counts: By the names of `Report`'s fields; also `rows`, and `chats`, examples of
            conversations.
        first_without: See `Report`.
        ended: Whether a turn of a conversation is trained with a token that ends it.
        forms: See `Report`.
        unused: See `Report`; a set in order.
        first_bad: See `Report`.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first_without: str = ""
    ended: bool = False
    forms: Counter[str] = field(default_factory=Counter)
    unused: dict[str, None] = field(default_factory=dict)
    first_bad: list[str] = field(default_factory=list)

    def add_without(self, examples: int, place: str, why: str) -> None:
        """Counts examples of a row of which nothing is trained."""
        self.counts["without_completion"] += examples
        self.first_without = self.first_without or f"{place}: {why}"

    def add_bad(self, place: str, error: Exception, *, stop: bool) -> None:
        """Counts a bad row; or raises ValueError that names its place, if it is to stop there."""
        text = " ".join(str(error).split())
        if not isinstance(error, ValueError):
            text = f"{type(error).__name__}: {text}"
        text = text if text.startswith(place) else f"{place}: {text}"
        text = text if len(text) < 400 else f"{text[:400]} ..."
        if stop:
            raise ValueError(text) from error
        self.counts["bad"] += 1
        self.first_bad = [*self.first_bad, text][:SHOWN]

    def add(self, later: "Tally") -> None:
        """Adds what became of the rows after these."""
        self.counts.update(later.counts)
        self.first_without = self.first_without or later.first_without
        self.ended = self.ended or later.ended
        self.forms.update(later.forms)
        self.unused |= later.unused
        self.first_bad = [*self.first_bad, *later.first_bad][:SHOWN]

    def check(self, source: str, cfg: DataConfig) -> None:
        """Raises ValueError if more of a source's rows are bad than the config allows."""
        bad, rows, limit = self.counts["bad"], self.counts["rows"], cfg.bad_rows_limit
        if bad > limit * rows:
            raise ValueError(
                f"{source}: {bad:,} of {rows:,} rows are bad, more than "
                f"data.bad_rows_limit = {limit} of them: mend them, or raise it. The first: "
                f"{self.first_bad[0]}"
            )

    def report(self, source: str, cfg: DataConfig) -> Report:
        """The report of a source.

        Raises:
            ValueError: If more rows are bad than the config allows, or no example is left.
        """
        self.check(source, cfg)
        names = ("examples", "tokens", "trained_tokens", "overlong", "without_completion")
        counts: dict[str, Any] = {n: self.counts[n] for n in (*names, "rewritten", "mute", "bad")}
        report = Report(
            source=source,
            overlong_are=FATES[cfg.overlong],
            first_without=self.first_without,
            endless=self.counts["chats"] > 0 and not self.ended,
            forms=self.forms,
            unused=[*self.unused],
            first_bad=self.first_bad,
            **counts,
        )
        if not report.examples:
            raise ValueError(f"{report.summary}: nothing to train on")
        return report
