"""The program inside a sandbox: it gives up its rights, then runs a candidate.

It runs as `python -I jail.py`, reads `{"program", "token", "seconds", "mib"}` as JSON from stdin,
and writes to stdout the token if the program ran to its end, or else what it raised. It imports
nothing but the standard library. `sandbox.py` starts it and says what it guards against.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import types
from typing import Any

NOBODY = 65534
NEW_USER, NEW_PLACES = 0x10000000, 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000
PRIVATE, RECURSIVE, BIND, READ_ONLY = 0x40000, 0x4000, 0x1000, 1
MOUNT_SETATTR, HERE, WHOLE_TREE = 442, -100, 0x8000
KEEP_CAPABILITIES, NO_NEW_PRIVILEGES, DIE_WITH_PARENT = 8, 38, 1
READ_ANY_FILE = 1 << 2
FILE_MIB = 16


def seclude(libc: Any) -> None:
    """Enters new namespaces of mounts, processes and network, as far as the machine allows.

    All files become read-only except those of the working directory.
    """
    root = os.geteuid() == 0
    if libc.unshare(NEW_PLACES | (0 if root else NEW_USER)) != 0:
        return
    here = os.getcwd().encode()
    libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None)
    libc.mount(here, here, None, BIND, None)
    words = ctypes.c_uint64 * 4  # attributes to set, to clear, propagation, user namespace
    libc.syscall(MOUNT_SETATTR, HERE, b"/", WHOLE_TREE, words(READ_ONLY), 32)
    libc.syscall(MOUNT_SETATTR, HERE, here, 0, words(0, READ_ONLY), 32)
    os.chdir(here)


def drop_rights(libc: Any) -> None:
    """Root becomes nobody, who can read but not write; others lose what `seclude` gave them."""
    root = os.geteuid() == 0
    if root:
        os.chown(".", NOBODY, NOBODY)
        libc.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    words = ctypes.c_uint32 * 6
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    kept = READ_ANY_FILE if root else 0  # Python may be installed where only root can read
    if libc.capset(header, words(kept, kept)) != 0:
        libc.capset(header, words())
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)


def limit(seconds: float, mib: int) -> None:
    """Bounds on processor time, memory, files; and no further process or thread."""
    bounds = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: mib << 20,
        resource.RLIMIT_FSIZE: FILE_MIB << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, bound in bounds.items():
        with contextlib.suppress(ValueError, OSError):  # macOS lacks some of them
            resource.setrlimit(kind, (bound, bound))


def run(program: str, token: str) -> str:
    """Runs a program as a module; returns the token if it got to its end."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # where dataclasses and pickle look
    try:
        exec(compile(program, "candidate.py", "exec"), module.__dict__)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:500]
    return token


def main() -> None:
    """Forks: the parent waits and kills; the child, without rights, runs the program."""
    request = json.load(sys.stdin)
    result, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        seclude(libc)
    child = os.fork()
    if child:
        os.close(result)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)  # as shells do
    if sys.platform == "linux":
        drop_rights(libc)
    limit(request["seconds"], request["mib"])
    report = run(request["program"], request["token"])
    os.write(result, report.encode(errors="replace"))
    os._exit(0)


if __name__ == "__main__":
    main()
