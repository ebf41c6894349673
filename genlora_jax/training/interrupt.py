"""Interruption: Ctrl-C and SIGTERM asked for, not suffered."""

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While entered, notes the first SIGINT or SIGTERM in `signal`; a second one acts as usual.

    The first is acknowledged on stderr.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        # Not `print`: the signal may have come in the midst of one.
        os.write(2, b"\nstopping after the step under way, and saving; once more to end at once\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
