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

    def take(self, running: Any = None) -> Any:
        """The next batch.

        Args:
            running: An array that the device computes before it needs the batch.
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
