"""What each process of a run prints, kept in one place: `OUTPUT/logs/process-N.log`.

This file is also the script that copies: a process of its own, so that the last words of one that
crashes, which no Python code sees, are kept as well. It imports the standard library alone.
"""

import atexit
import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, BinaryIO

REMOTE_SECONDS = 30  # between two writes of a file that lies in a bucket, which are whole
WAIT_SECONDS = 60  # for the copier, at the end


def keep_log(place: str, heading: str) -> None:
    """Copies from now on what this process writes to stdout and stderr, line by line.

    Both still go where they went. Lines are added to what is there, each with its time.

    Args:
        place: The file, here or in a bucket; its folder is made.
        heading: A first line, which is not shown.
    """
    # Started later, it would hold the pipes open until this process ends, and so the copier.
    resource_tracker.ensure_running()
    shown = [os.dup(stream) for stream in (1, 2)]
    pipes = [os.pipe() for _ in shown]
    ends = [end for end, _ in pipes]
    copier = subprocess.Popen(
        # -P: the modules beside this one are not for it.
        [sys.executable, "-P", __file__, place, heading, *map(str, ends)],
        stdin=subprocess.DEVNULL,
        pass_fds=ends,
        start_new_session=True,  # Ctrl-C is for this process alone
    )
    for stream, (end, into) in enumerate(pipes, 1):
        os.dup2(into, stream)
        os.close(into)
        os.close(end)

    atexit.register(_finish, copier, shown)


def _finish(copier: "subprocess.Popen[bytes]", shown: list[int]) -> None:
    """Ends the copying, and waits until all is copied: a cluster may end the copier right after."""
    for stream, before in zip((sys.stdout, sys.stderr), shown, strict=True):
        stream.flush()
        os.dup2(before, stream.fileno())
    with contextlib.suppress(subprocess.TimeoutExpired):
        copier.wait(WAIT_SECONDS)


class _File:
    """The log: a local file, or one in a bucket, which is written whole now and then.

    One that cannot be kept is no reason to end a run: that is said once.
    """

    def __init__(self, place: str):
        self._place, self._remote = place, "://" in place
        self._uploaded, self._unsaved, self._said = time.monotonic(), False, False
        self._file: Any = None  # also if an old log cannot be read, which an upload would replace
        with self._noting():
            self._file = self._opened()

    def _opened(self) -> BinaryIO:
        if not self._remote:
            Path(self._place).parent.mkdir(parents=True, exist_ok=True)
            return open(self._place, "ab", buffering=0)
        import tempfile

        import fsspec

        self._open = fsspec.open
        file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115
        with contextlib.suppress(FileNotFoundError), self._open(self._place, "rb") as before:
            file.write(before.read())
        return file

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # those of buckets have no common base class
            if not self._said:
                with contextlib.suppress(OSError):  # a terminal that is gone
                    said = f"note: the log {self._place} is not kept, or not whole: {error}"
                    print(said, file=sys.stderr)
            self._said = True

    def add(self, lines: list[bytes]) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ").encode()
        with self._noting():
            for line in lines if self._file else []:
                self._file.write(stamp + line + b"\n")
                self._unsaved = self._remote

    def upload(self, after: float = 0) -> None:
        """Writes the whole log to its bucket if lines are new, and the last time is long ago."""
        if not self._unsaved or time.monotonic() - self._uploaded < after:
            return
        with self._noting():
            self._file.seek(0)
            with self._open(self._place, "wb") as stream:
                stream.write(self._file.read())
            self._unsaved = False
        self._uploaded = time.monotonic()


def copy(place: str, heading: str, *ends: str) -> None:
    """Copies the pipes to stdout and stderr and to the log, until nobody writes to them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when its process does
    file = _File(place)
    file.add([heading.encode()])
    rest = {}
    with selectors.DefaultSelector() as selector:
        for shown, end in enumerate(ends, 1):
            selector.register(int(end), selectors.EVENT_READ, shown)
            rest[shown] = b""
        while selector.get_map():
            for key, _ in selector.select(REMOTE_SECONDS):
                data = os.read(key.fd, 2**16)
                if not data:
                    selector.unregister(key.fd)
                with contextlib.suppress(OSError):  # a terminal that is gone
                    os.write(key.data, data)
                *lines, rest[key.data] = (rest[key.data] + data).split(b"\n")
                file.add(lines)
            file.upload(after=REMOTE_SECONDS)  # also when nothing more is said, as in a hung step
    file.add([line for line in rest.values() if line])
    file.upload()


if __name__ == "__main__":
    copy(*sys.argv[1:])
