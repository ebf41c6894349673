"""Which walls of the sandbox hold on a machine, found by trying to break through each."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genlora_jax.evaluation.sandbox.sandbox import FILE_MIB, Sandbox, Trial, run_all

MIB = 128  # the bound on memory under which they are tried
PRELUDE = """
import ctypes, errno, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)

def works(*attempts):
    for attempt in attempts:
        try:
            attempt()
        except Exception:
            continue
        return
    raise Exception("closed")
"""
# Each reaches its end only if a way through that wall is open.
ESCAPES = {
    "network": "works(lambda: socket.create_connection(('127.0.0.1', {port}), timeout=1))",
    "sockets": """
def connect():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect({directory!r} + '/socket')

works(connect, lambda: os.open({directory!r} + '/fifo', os.O_WRONLY | os.O_NONBLOCK))
""",
    "writing": """
works(
    lambda: open({directory!r} + '/new', 'w'),
    lambda: open({directory!r} + '/file', 'a'),
    lambda: os.chmod({directory!r} + '/file', 0o600),
    lambda: os.utime({directory!r} + '/file', (0, 0)),
)
""",
    "reading": "works(lambda: open({directory!r} + '/file').read())",
    "processes": """
import threading
works(
    lambda: os.fork() or os._exit(0),
    lambda: threading.Thread(target=print).start(),
    lambda: os.execv(sys.executable, [sys.executable, '-c', '']),
    lambda: os.setsid(),
)
""",
    "signals": "works(lambda: os.kill({process}, 0), lambda: os.kill(os.getppid() or 1, 0))",
    "memory": """
def get(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), 'denied')

works(
    lambda: os.memfd_create('x'),
    lambda: get(libc.shmget(0, {mib} << 20, 0o1600)),
    lambda: bytearray({mib} << 20),
    lambda: open('/dev/shm/genlora', 'w'),
)
""",
    "disk": """
def fill():
    for i in range({files} + 1):
        with open(str(i), 'wb') as file:
            file.truncate(1)
            file.write(b'x' * 2**20)

works(fill)
""",
    # Of the kernel's other calls: io_uring_setup, pidfd_open, landlock_create_ruleset, and two.
    "calls": """
def get(result):
    if result == -1 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
        raise OSError(ctypes.get_errno(), 'denied')

if sys.platform == 'linux':
    works(
        lambda: get(libc.syscall(425, 1, None)),
        lambda: get(libc.syscall(434, os.getpid(), 0)),
        lambda: get(libc.syscall(444, None, 0, 1)),
        lambda: get(libc.inotify_init()),
        lambda: get(libc.unshare(0)),
    )
""",
}


def open_walls(sandbox: Sandbox) -> list[str]:
    """The walls that do not hold."""
    with _targets() as places:
        trials = [Trial(PRELUDE + text.format(**places)) for text in ESCAPES.values()]
        outcomes = run_all(sandbox, trials, mib=MIB, seconds=10.0)
    return [name for name, outcome in zip(ESCAPES, outcomes, strict=True) if outcome.passed]


@contextlib.contextmanager
def _targets() -> Iterator[dict[str, Any]]:
    """What an escape would reach: open to everybody, as far as file modes go."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.chmod(0o777)
        (directory / "file").touch(0o666)
        os.mkfifo(directory / "fifo")
        reader = os.open(directory / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        stack.callback(os.close, reader)
        local = stack.enter_context(socket.socket(socket.AF_UNIX))
        local.bind(str(directory / "socket"))
        local.listen()
        for name in ("file", "fifo", "socket"):
            (directory / name).chmod(0o666)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        yield {
            "directory": str(directory),
            "port": server.getsockname()[1],
            "process": os.getpid(),
            "mib": 2 * MIB,
            "files": FILE_MIB,
        }
