"""Runs a command in its own namespaces: `python -I -c SOURCE SCRATCH PLACE ... -- COMMAND ...`.

The command sees the places, read-only, four devices, a directory in memory (`SCRATCH`: options of
its mount) where it starts, and no other file; no network; no process but its own. It ends when this
one does. Used where bubblewrap, which does the same, is missing.
"""

import ctypes
import os
import signal
import sys
from typing import Any

NEW_USER = 0x10000000
NEW_PLACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
PRIVATE, RECURSIVE, BIND, DETACH = 0x40000, 0x4000, 0x1000, 2
MOUNT_SETATTR, HERE, WHOLE_TREE = 442, -100, 0x8000
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
READ_ONLY, NO_SUID, NO_DEVICES = 1, 2, 4  # the same for mount and mount_setattr
DIE_WITH_PARENT = 1
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def must(result: int, what: str) -> None:
    """Ends this process, with the reason, if a call of the kernel failed."""
    if result != 0:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")


def enter(libc: Any) -> None:
    """New namespaces; an ordinary user is given one of users too, and is himself in it."""
    user, group = os.geteuid(), os.getegid()
    must(libc.unshare(NEW_PLACES | (0 if user == 0 else NEW_USER)), "no new namespaces")
    if user != 0:
        for name, text in (
            ("uid_map", f"{user} {user} 1"),
            ("setgroups", "deny"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def protect(libc: Any, place: str, attributes: int, flags: int) -> None:
    """Sets attributes of a mount, or of all below it."""
    words = (ctypes.c_uint64 * 4)(attributes)  # to set, to clear, propagation, user namespace
    result = libc.syscall(MOUNT_SETATTR, HERE, os.fsencode(place), flags, words, 32)
    must(result, f"cannot protect {place}")


def show(libc: Any, root: str, place: str, attributes: int) -> None:
    """Shows a file or a directory, read-only, under a new root."""
    target = root + place
    if os.path.isdir(place):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    source = os.fsencode(os.path.realpath(place))
    must(libc.mount(source, os.fsencode(target), None, BIND | RECURSIVE, None), f"{place}: hidden")
    protect(libc, target, READ_ONLY | NO_SUID | attributes, WHOLE_TREE)


def change_root(libc: Any, scratch: str, places: list[str]) -> None:
    """Makes a new root, where only the places and a directory in memory are.

    It is put together in the working directory.
    """
    root = os.getcwd()
    must(libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None), "cannot part from other mounts")
    must(libc.mount(b"root", os.fsencode(root), b"tmpfs", 0, b"size=1m"), "no files in memory")
    os.makedirs(f"{root}/tmp")
    target, flags = os.fsencode(f"{root}/tmp"), NO_SUID | NO_DEVICES
    must(libc.mount(b"scratch", target, b"tmpfs", flags, scratch.encode()), "no files in memory")
    for place in places:  # Python itself may lie below /tmp
        show(libc, root, place, NO_DEVICES)
    for device in DEVICES:
        show(libc, root, device, 0)
    os.chdir(root)
    must(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "no new root")
    must(libc.umount2(b".", DETACH), "the old root stays")
    os.chdir("/")
    protect(libc, "/", READ_ONLY | NO_SUID, 0)
    os.chdir("/tmp")


def main() -> None:
    """Enters the namespaces; the command is the first process of its own."""
    split = sys.argv.index("--")
    scratch, *places = sys.argv[1:split]
    command = sys.argv[split + 1 :]
    libc = ctypes.CDLL(None, use_errno=True)
    enter(libc)
    change_root(libc, scratch, places)
    child = os.fork()
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if child == 0:
        os.execv(command[0], command)
    os.closerange(0, 3)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
