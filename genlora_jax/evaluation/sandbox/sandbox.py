"""Runs programs that nobody has read, and decides outside of their process whether they are right.

Two walls stand around a program. The outer one shows it no file but Python's, no network and no
other process: bubblewrap if it is installed, a container command if one is named, namespaces of our
own (`namespaces.py`) else. The inner one (`jail.py`, `system_calls.py`) is put up by the process
itself before it runs the program: bounds on time, memory and files, no rights, and system calls
from a short list. `walls.py` tries which of them hold on a machine.

It is no virtual machine: the operating system is shared. For models that you distrust, use a
machine that you can lose.
"""

import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from genlora_jax.evaluation.sandbox.roles import ENDED
from genlora_jax.evaluation.sandbox.system_calls import call_filter
from genlora_jax.threads import processors

SOURCES = Path(__file__).parent
GRACE = 10.0  # seconds for Python itself to start and end
FILE_MIB = 16
SCRATCH = f"size={FILE_MIB}m,nr_inodes=4096,mode=1777"  # the directory that a program may fill
CONTAINER = "container"
# Numerical libraries would otherwise try to start threads, which is forbidden.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# What Python and libraries of C are made of; nothing of it is a user's.
SYSTEM = (
    *("/usr", "/bin", "/lib", "/lib64", "/nix/store", "/gnu/store"),
    *("/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime"),
)
# The rights are for the directory in memory and for becoming nobody; the jail drops them.
BUBBLEWRAP = (
    *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
    *("--die-with-parent", "--as-pid-1", "--dir", "/tmp", "--dir", "/dev"),
    *("--chdir", "/tmp", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"),
    *("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"),
    *("--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/zero", "/dev/zero"),
    *("--dev-bind", "/dev/random", "/dev/random", "--dev-bind", "/dev/urandom", "/dev/urandom"),
)


@dataclass(frozen=True)
class Trial:
    """A program and the tests that it has to pass.

    Attributes:
        program: The program; it must run to its end.
        tests: Code that calls it and raises where it is wrong.
        before: Code that the tests build on.
        names: What the tests take from the program although others know the name too.
    """

    program: str
    tests: str = ""
    before: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: Whether it and all its tests ran to their end.
        detail: If not, why: what was raised, `timed out`, or its exit status.
        ran: Whether there was a verdict; False says that the sandbox failed, not the program.
    """

    passed: bool
    detail: str = ""
    ran: bool = True


HARMLESS = Trial(
    "import dataclasses, math, socket, tempfile\ndef one(): return 1", "assert one() == 1"
)


@dataclass(frozen=True)
class Sandbox:
    """A way of running programs.

    Attributes:
        name: What the outer wall is.
        command: What stands before the interpreter.
        python: The interpreter.
        mounts: Whether the process inside has to make its directory in memory by itself.
    """

    name: str
    command: tuple[str, ...] = ()
    python: str = sys.executable
    mounts: bool = False

    def run(self, trial: Trial, *, seconds: float = 5.0, mib: int = 1024) -> Outcome:
        """Runs a program and its tests, each in a process of its own.

        Limits are `seconds` of wall-clock time, from when the program starts, and `mib` MiB of
        address space.
        """
        common = {
            "seconds": seconds,
            "until": seconds + GRACE,
            "mib": mib,
            "file_mib": FILE_MIB,
            "scratch": SCRATCH if self.mounts else None,
            "calls": (call_filter() or b"").hex(),
            "reads_any_file": not self.command,
            "roles": _source("roles"),
        }
        asked: dict[str, Any] = {"role": "checker", "before": trial.before, "tests": trial.tests}
        asked |= {"names": list(trial.names)}
        with contextlib.ExitStack() as stack:
            here = stack.enter_context(_directory())
            said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
            checker_in, to_checker = _pipe(stack)
            candidate_in, to_candidate = _pipe(stack)
            # Each writes where the other reads, after the line that says what to be.
            checker = self._start(stack, here, checker_in, to_candidate, said[0])
            candidate = self._start(stack, here, candidate_in, to_checker, said[1])
            late = threading.Timer(seconds + GRACE, _end, (checker, candidate))
            stack.callback(late.cancel)
            late.start()
            checker_in.close()
            candidate_in.close()
            _tell(to_checker, common | asked)
            _tell(to_candidate, common | {"role": "candidate", "program": trial.program})
            checker.wait()
            timed_out = late.finished.is_set()
            report, trouble = map(_last_line, said)
            try:
                passed, detail = json.loads(report)
            except ValueError:  # no verdict
                reason = trouble or report or "no result"
                return Outcome(False, "timed out" if timed_out else reason, ran=timed_out)
            if detail == ENDED:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    detail = trouble or f"{ENDED}, with status {candidate.wait(GRACE)}"
            return Outcome(passed, detail)

    def _start(
        self,
        stack: contextlib.ExitStack,
        here: str,
        stdin: IO[bytes],
        stdout: IO[bytes],
        stderr: IO[bytes],
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*self.command, self.python, "-I", "-X", "utf8", "-c", _source("jail")],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=here,
            env=None if self.name == CONTAINER else ENVIRONMENT,
            start_new_session=True,
        )
        stack.callback(_end, process)
        return process


@functools.cache
def choose(container: str | None = None) -> Sandbox:
    """The first way that runs a program on this machine.

    Args:
        container: A command that runs another in a container that has `python3`, with its stdin,
            stdout and stderr (`docker run --rm -i --network none python:3.12-slim`).

    Raises:
        OSError: If there is none.
    """
    reasons = []
    for sandbox in _ways(container):
        if (outcome := sandbox.run(HARMLESS, seconds=GRACE)).passed:
            return sandbox
        reasons.append(f"{sandbox.name}: {outcome.detail}")
    raise OSError(f"the sandbox runs no program on this machine ({'; '.join(reasons)})")


def run_all(
    sandbox: Sandbox, trials: Sequence[Trial], *, seconds: float = 5.0, mib: int = 1024
) -> list[Outcome]:
    """Runs programs, as many at a time as there are processors for this process."""
    with ThreadPoolExecutor(processors()) as pool:
        return list(pool.map(lambda trial: sandbox.run(trial, seconds=seconds, mib=mib), trials))


def _ways(container: str | None) -> list[Sandbox]:
    if container is not None:
        return [Sandbox(CONTAINER, tuple(shlex.split(container)), "python3")]
    if sys.platform != "linux":
        return [Sandbox("none")]
    places = _places()
    own = (sys.executable, "-I", "-c", _source("namespaces"), SCRATCH, *places, "--")
    ways = [Sandbox("namespaces", own), Sandbox("none")]
    if program := shutil.which("bwrap"):
        # It makes what leads to a place for its own user alone, unless it is told of it.
        ways_to = dict.fromkeys(str(p) for place in places for p in Path(place).parents[-2::-1])
        shown = [word for way in ways_to for word in ("--dir", way)]
        shown += [word for place in places for word in ("--ro-bind", place, place)]
        command = (program, *BUBBLEWRAP, *shown, "--remount-ro", "/", "--")
        ways.insert(0, Sandbox("bubblewrap", command, mounts=True))
    return ways


def _places() -> list[str]:
    """What a program sees: the system and Python, without what lies in another."""
    found: list[str] = []
    for place in (*SYSTEM, sys.base_prefix, sys.prefix):
        if os.path.exists(place) and not any(Path(place).is_relative_to(p) for p in found):
            found.append(place)
    return found


@functools.cache
def _source(name: str) -> str:
    return (SOURCES / f"{name}.py").read_text(encoding="utf-8")


def _pipe(stack: contextlib.ExitStack) -> list[IO[bytes]]:
    """The two ends of a pipe."""
    ends = zip(os.pipe(), ("rb", "wb"), strict=True)
    return [stack.enter_context(os.fdopen(end, mode, buffering=0)) for end, mode in ends]


def _tell(stream: IO[bytes], setup: dict[str, Any]) -> None:
    """Gives a process its first line; this end of the pipe is then of no more use."""
    with contextlib.suppress(BrokenPipeError), stream:
        rest = memoryview(json.dumps(setup).encode() + b"\n")
        while rest:
            rest = rest[stream.write(rest) :]


@contextlib.contextmanager
def _directory() -> Iterator[str]:
    """A working directory; where it is not hidden by one in memory, programs may fill it."""
    here = tempfile.mkdtemp(prefix="candidate-")
    try:
        yield here
    finally:
        _remove(here)


def _remove(directory: str) -> None:
    """Removes what a program may have made: shutil.rmtree is no match for it.

    rm goes by file descriptor to any depth; chmod, where a directory is closed, follows no link.
    """
    with contextlib.suppress(OSError):
        os.rmdir(directory)
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
        if os.path.lexists(directory):
            subprocess.run([*command, directory], stderr=subprocess.DEVNULL, check=False)


def _end(*processes: subprocess.Popen[bytes]) -> None:
    """Asks processes to end, as a container's command must be, and then makes them."""
    for process in processes:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(GRACE)


def _last_line(file: IO[bytes]) -> str:
    file.seek(-min(file.seek(0, os.SEEK_END), 4096), os.SEEK_END)
    return file.read().decode(errors="replace").strip().rpartition("\n")[2]
