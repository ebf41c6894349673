"""Batches on the devices, made ahead of them."""

import collections
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

AHEAD = 2  # batches
WATCHED, MOST_WAIT = 50, 0.05  # steps, and the share of their time above which a wait is reported


class Feed:
    """Makes the next batches in a thread, and measures how long the device waits for them.

    Args:
        batches: Of this process's rows, as `data.batches.Batches`.
        place: Puts a batch on the devices.

    Attributes:
        waited: Seconds so far in which the device had nothing to do but wait for a batch.
    """

    def __init__(self, batches: Any, place: Callable[[Any], Any]):
        self._batches, self._place = batches, place
        self._state = batches.get_state()
        self._made: collections.deque[Future[tuple[Any, Any]]] = collections.deque()
        self._maker = ThreadPoolExecutor(1)
        self.waited = 0.0

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exc: object) -> None:
        self._batches.close()
        self._maker.shutdown(cancel_futures=True)

    def take(self, running: jax.Array | None = None) -> Any:
        """The next batch.

        Args:
            running: What the device computes before it needs the batch.
        """
        while len(self._made) < AHEAD:
            self._made.append(self._maker.submit(self._make))
        made = self._made.popleft()
        self._made.append(self._maker.submit(self._make))
        while not made.done() and running is not None and not running.is_ready():
            wait([made], timeout=0.001)
        began = time.monotonic()
        ready = made.done()
        batch, self._state = made.result()
        self.waited += 0.0 if ready else time.monotonic() - began
        return batch

    def get_state(self) -> Any:
        """The place behind the batch that was taken last; all processes call this together."""
        places = self._state["places"]
        if len(places) == 1 or jax.process_count() == 1:
            return self._state
        own = np.array([place or (-1, -1) for place in places], np.int32)
        everywhere = multihost_utils.process_allgather(own).max(axis=0)
        return self._state | {"places": everywhere.tolist()}

    def set_state(self, state: Any) -> None:
        """Goes to a place; before the first batch is taken."""
        self._batches.set_state(state)
        self._state = self._batches.get_state()

    def _make(self) -> tuple[Any, Any]:
        batch = self._place(next(self._batches))
        return batch, self._batches.get_state()


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
