"""Work done in threads ahead of whoever uses it, and how many processors there are to do it."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
WINDOW = 2  # items in flight: enough to keep a disk busy, few enough to cost no memory to speak of


def processors() -> int:
    """How many processors this process may run on, by its affinity, which jobs of clusters set."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(
    function: Callable[[T], R],
    items: Iterable[T],
    window: int = WINDOW,
    size: Callable[[T], int] = lambda _: 0,
    most: int = 0,
) -> Iterator[R]:
    """`map(function, items)`, in order, in `window` threads; `items` is drawn as needed.

    Results of more than `most` by `size` do not exist at once, but for a single one. The caller
    must drop each before it asks for the next.
    """
    pending: collections.deque[Any] = collections.deque()
    sizes: collections.deque[int] = collections.deque()
    with ThreadPoolExecutor(window) as pool:
        for item in items:
            needed = size(item)
            while pending and sum(sizes) + needed > most:
                yield pending.popleft().result()
                sizes.popleft()
            pending.append(pool.submit(function, item))
            sizes.append(needed)
            del item
            if len(pending) == window:
                yield pending.popleft().result()
                sizes.popleft()
        while pending:
            yield pending.popleft().result()
