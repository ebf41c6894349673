"""A run's claim to its place in a bucket, where nothing can be locked: an object with its name.

It is created on the condition that there is none, and changes every few seconds while the run
lives. One that stands still for longer, or whose process has ended on this machine, was left by a
killed run and is removed. A run whose claim was taken (it slept, perhaps) stops before it writes.
"""

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from genlora_jax.remote_path import file_system, naming

CLAIM = ".genlora-run.json"
BEAT, PATIENCE = 10.0, 45.0  # seconds between changes, and without one until a run counts as dead


@contextlib.contextmanager
def held(output: str) -> Iterator[Callable[[], None]]:
    """Holds a place in a bucket; yields a check that raises OSError if another run has taken it.

    Raises:
        BlockingIOError: If another run holds it.
    """
    path, owner = f"{output}/{CLAIM}", uuid.uuid4().hex
    while not _created(path, owner):
        if (other := _read(path)) is not None:
            _await_death(path, other, output)
            _remove(path)

    def check() -> None:
        if (_read(path) or {}).get("owner") != owner:
            raise OSError(f"{output}: another run has taken it over: this one ends")

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):  # the next beat may get through
                check()
                count += 1
                _write(path, owner, count)

    ended = threading.Event()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            check()
            _remove(path)


def _write(path: str, owner: str, beat: int, **options: Any) -> None:
    claim = {"owner": owner, "host": platform.node(), "pid": os.getpid(), "beat": beat}
    content = json.dumps(claim | {"process": _process(os.getpid())}).encode()
    with naming(path), contextlib.suppress(FileExistsError):
        file_system(path).pipe_file(path, content, **options)


def _remove(path: str) -> None:
    with naming(path), contextlib.suppress(FileNotFoundError):
        file_system(path).rm_file(path)


def _process(pid: int) -> str | None:
    """What no other process has: boot, namespace, number and start; None if there is no such."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot, open(f"/proc/{pid}/stat") as stat:
            started = stat.read().rpartition(")")[2].split()[19]
            return f"{boot.read().strip()} {os.readlink('/proc/self/ns/pid')} {pid} {started}"
    except (OSError, IndexError):
        return None


def _created(path: str, owner: str) -> bool:
    """Creates the claim unless there is one; whether it is there now and ours."""
    if _read(path) is None:  # asked first, as a store may ignore the condition
        _write(path, owner, 0, mode="create")
    # Asked again, as the answer to a first attempt may have got lost.
    return (_read(path) or {}).get("owner") == owner


def _read(path: str) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        with naming(path):
            found = json.loads(file_system(path).cat_file(path))
        return found if isinstance(found, dict) else None
    return None


def _await_death(path: str, other: dict[str, Any], output: str) -> None:
    """Returns when the run that made a claim is dead; BlockingIOError if it lives."""
    here = (_process(os.getpid()) or "").split()[:2]
    if here and str(other.get("process")).split()[:2] == here:  # its processes can be seen
        if other["process"] == _process(int(other["pid"])):
            raise BlockingIOError
        return
    print(
        f"{output}: a run on {other.get('host')} held it; waiting {PATIENCE:.0f} s for a sign of "
        "life from it",
        flush=True,
    )
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(1)
        if (now := _read(path)) is None:
            return
        if now != other:
            raise BlockingIOError
