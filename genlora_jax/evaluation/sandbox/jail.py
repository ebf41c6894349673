"""The process inside a sandbox: it gives up its rights, then runs code that nobody has read.

It is run as `python -I -c SOURCE` and imports nothing but the standard library. Its first line from
stdin is JSON: bounds, and what to be (`roles.py`). A process with rights stays behind and ends the
other when its time is up.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import types
from typing import Any, NoReturn

NOBODY = 65534
NO_SUID_OR_DEVICES = 6
KEEP_CAPABILITIES, NO_NEW_PRIVILEGES, DIE_WITH_PARENT, SECCOMP, FILTER = 8, 38, 1, 22, 2
READ_ANY_FILE = 1 << 2


def mount_scratch(libc: Any, options: str) -> None:
    """Makes /tmp a directory in memory, which ends with the namespace."""
    if libc.mount(b"scratch", b"/tmp", b"tmpfs", NO_SUID_OR_DEVICES, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "the directory in memory cannot be mounted")
    os.chdir("/tmp")


def drop_rights(libc: Any, *, reads_any_file: bool) -> None:
    """Root becomes nobody; others lose what their namespaces gave them."""
    root = os.geteuid() == 0
    if root:
        with contextlib.suppress(OSError):
            os.chown(".", NOBODY, NOBODY)
        libc.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    words = ctypes.c_uint32 * 6
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    kept = READ_ANY_FILE if root and reads_any_file else 0
    if libc.capset(header, words(kept, kept)) != 0 and libc.capset(header, words()) != 0:
        raise OSError(ctypes.get_errno(), "rights cannot be given up")
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)


def limit(seconds: float, mib: int, file_mib: int) -> None:
    """Bounds on processor time, memory, files; and no further process or thread."""
    bounds = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: mib << 20,
        resource.RLIMIT_FSIZE: file_mib << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, bound in bounds.items():
        with contextlib.suppress(ValueError, OSError):  # macOS lacks some of them
            resource.setrlimit(kind, (bound, bound))


def filter_calls(libc: Any, steps: bytes) -> None:
    """Allows the system calls of a filter and no others."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]

    program = Program(len(steps) // 8, steps)
    if libc.prctl(SECCOMP, FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "system calls cannot be filtered")


def confine(libc: Any, setup: dict[str, Any]) -> None:
    """Gives up all that a program does not need, for good."""
    if sys.platform == "linux":
        drop_rights(libc, reads_any_file=setup["reads_any_file"])
    limit(setup["seconds"], setup["mib"], setup["file_mib"])
    if setup["calls"]:
        filter_calls(libc, bytes.fromhex(setup["calls"]))


def wait(child: int, seconds: float) -> NoReturn:
    """Ends a process when its time is up, or when this one is told to end."""
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)  # as shells do


def main() -> None:
    """Reads what to be, and is that in a process without rights."""
    messages, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    setup = json.loads(messages.readline())
    libc = ctypes.CDLL(None, use_errno=True)
    if setup["scratch"]:
        mount_scratch(libc, setup["scratch"])
    if child := os.fork():
        answers.close()
        os.close(1)
        wait(child, setup["until"])
    confine(libc, setup)
    roles = types.ModuleType("roles")
    exec(compile(setup["roles"], "roles.py", "exec"), roles.__dict__)
    # The one way out for a verdict, which the candidate does not have.
    report = os.dup(2) if setup["role"] == "checker" else None
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    roles.play(setup, messages, answers, report)
    os._exit(0)


if __name__ == "__main__":
    main()
