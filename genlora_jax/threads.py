"""Work done in threads ahead of whoever uses it."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
WINDOW = 2  # items in flight: enough to keep a disk busy, few enough to cost no memory to speak of


def in_threads(function: Callable[[T], R], items: Iterable[T], window: int = WINDOW) -> Iterator[R]:
    """`map(function, items)`, in order, in `window` threads; `items` is drawn as needed."""
    pending: collections.deque[Any] = collections.deque()
    with ThreadPoolExecutor(window) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            del item
            if len(pending) == window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
