"""Runs programs that nobody has read, each in a process that can do little harm.

On Linux, as an ordinary user or root, a program sees no network, starts no process or thread, can
write only to a temporary directory (removed afterwards), can signal nobody, and has bounds on time,
memory and file size. It is Python's `-I` with an empty environment and no stdin. `isolation` tries
which of these hold, since containers may forbid the namespaces they rest on.

It is no virtual machine. The operating system is shared, a program can read the files that you can
read and fill the disk until its time is up, and one that searches its interpreter's memory for the
token can claim success. For models that you distrust, use a machine that you can lose.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

JAIL = Path(__file__).with_name("jail.py")
GRACE = 5.0  # seconds for Python itself to start and end
# Numerical libraries would otherwise try to start threads, which is forbidden.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Attempts to break out; each reaches its end only if the sandbox does not hold.
ESCAPES = {
    "network": (
        "import socket\n"
        "server = socket.socket()\nserver.bind(('127.0.0.1', 0))\nserver.listen()\n"
        "socket.create_connection(server.getsockname(), timeout=1)"
    ),
    "files": "import tempfile\nopen(tempfile.mkstemp(dir={outside!r})[1], 'w')",
    "processes": "import os\nos.fork() or os._exit(0)",
    "signals": "import os\nos.kill({process}, 0)",
}


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: Whether it ran to its end.
        detail: If not, why: what it raised, `timed out`, or its exit status.
    """

    passed: bool
    detail: str = ""


def run(program: str, *, seconds: float = 5.0, mib: int = 1024) -> Outcome:
    """Runs a Python program in a sandbox.

    It has passed only if its last line was reached: a token that the program does not know is
    written after it. Exiting early, with whatever status, is a failure. Limits are `seconds` of
    wall-clock time and `mib` MiB of address space.
    """
    token = secrets.token_hex(16)
    request = {"program": program, "token": token, "seconds": seconds, "mib": mib}
    with (
        tempfile.TemporaryDirectory(prefix="candidate-", ignore_cleanup_errors=True) as here,
        tempfile.TemporaryFile() as result,
    ):
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(JAIL)],
            stdin=subprocess.PIPE,
            stdout=result,
            stderr=subprocess.DEVNULL,
            cwd=here,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(json.dumps(request).encode(), timeout=seconds + GRACE)
        finally:
            _kill_group(process)
        result.seek(0)
        report = result.read(1000).decode(errors="replace")
    if report == token:
        return Outcome(True)
    if not report and process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return Outcome(False, "timed out")
    return Outcome(False, report or f"ended early, with status {process.returncode}")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(programs: Sequence[str], *, seconds: float = 5.0, mib: int = 1024) -> list[Outcome]:
    """Runs programs, as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda program: run(program, seconds=seconds, mib=mib), programs))


def isolation() -> dict[str, bool]:
    """Which walls hold on this machine, found by trying to break through each.

    Raises:
        OSError: If not even a harmless program runs.
    """
    if not (outcome := run("import math, tempfile, socket, dataclasses")).passed:
        raise OSError(f"the sandbox runs no program on this machine: {outcome.detail}")
    with tempfile.TemporaryDirectory() as outside:
        Path(outside).chmod(0o777)
        place = {"outside": outside, "process": os.getpid()}
        return {name: not run(text.format(**place)).passed for name, text in ESCAPES.items()}
