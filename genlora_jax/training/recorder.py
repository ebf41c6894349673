"""What is recorded of each step."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from genlora_jax.training.checkpoint import Checkpoints
from genlora_jax.training.divergence import check_finite
from genlora_jax.training.feed import Feed
from genlora_jax.training.metrics import MetricsLog

WATCHED, MOST_WAIT = 50, 0.05  # steps, and the share of their time above which a wait is reported


@dataclass
class Recorder:
    """Waits for the metrics of steps, checks and writes them.

    Attributes:
        rates: Learning rate of each step, on the host: computed on the device it would wait there
            for the step under way.
        checkpoints: Where a run can go back to.
        log: Where metrics go.
        params: The base's parameters.
        read: Metrics as numbers, when the device has them.
        batches: Whose waits are recorded.
    """

    rates: np.ndarray
    checkpoints: Checkpoints
    log: MetricsLog
    params: Any
    read: Callable[[dict[str, jax.Array]], dict[str, float]]
    batches: Feed

    def __post_init__(self) -> None:
        """The first step's time begins, which is that of the compiler as well."""
        self.restart()
        self._watch = WaitWatch()

    def restart(self) -> None:
        """The next step's time begins."""
        self._clock, self._waited = time.monotonic(), self.batches.waited

    def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Writes a step's metrics.

        Raises:
            FloatingPointError: If they are not finite.
        """
        values = self.read(metrics)
        before, waited = self._clock, self._waited
        self.restart()
        seconds, waited = self._clock - before, self._waited - waited
        values["tokens_per_second"] = values["tokens"] / seconds
        values["input_wait"] = waited / seconds
        values["learning_rate"] = float(self.rates[step - 1])
        check_finite(step, values, self.params, self.checkpoints.latest())
        del values["adapter_finite"]
        self.log.write(step, values)
        self.log.advance(
            step,
            loss=f"{values['loss']:.4f}",
            tok_s=f"{values['tokens_per_second']:,.0f}",
            input_wait=f"{values['input_wait']:.0%}",
        )
        if warning := self._watch.add(seconds, waited):
            self.log.print_line(warning)


def read(metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Metrics as numbers; waits for them."""
    return {name: float(value) for name, value in metrics.items()}


class WaitWatch:
    """Notices, once, that the device waits for its batches."""

    def __init__(self) -> None:
        self._steps, self._seconds, self._waited = -1, 0.0, 0.0  # the first step is not counted
        self._told = False

    def add(self, seconds: float, waited: float) -> str | None:
        """Counts a step; returns a line for people when the last 50 waited too long.

        Args:
            seconds: How long the step took.
            waited: How much of it the device waited.
        """
        self._steps += 1
        if self._steps == 0 or self._told:
            return None
        self._seconds, self._waited = self._seconds + seconds, self._waited + waited
        if self._steps % WATCHED:
            return None
        share = self._waited / self._seconds
        self._seconds = self._waited = 0.0
        self._told = share > MOST_WAIT
        if not self._told:
            return None
        return (
            f"input_wait: the device waited for data {share:.0%} of the last {WATCHED} steps. "
            "Data that genlora tokenize has written are read faster, and more cores help"
        )
