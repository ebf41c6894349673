"""Programs that attack the sandbox, or the score: what was done to it, and what is like that."""

import contextlib
import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from genlora_jax.evaluation.sandbox import namespaces, sandbox, system_calls
from genlora_jax.evaluation.sandbox.sandbox import Trial
from genlora_jax.evaluation.sandbox.walls import open_walls
from genlora_jax.evaluation.tasks import code

AMPLE = 60.0
WAYS = {way.name: way for way in sandbox._ways(None)}
PRELUDE = """
import ctypes, os, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are those of Linux")


def works(way):
    """The way, if it runs a harmless program here; CI's machines give namespaces."""
    runs = way in WAYS and WAYS[way].run(sandbox.HARMLESS, seconds=AMPLE).passed
    return pytest.param(way, marks=pytest.mark.skipif(not runs, reason=f"no {way} here"))


CLOSED = [works("bubblewrap"), works("namespaces")]
closed = pytest.mark.parametrize("way", CLOSED)
every_way = pytest.mark.parametrize("way", [*CLOSED, "none"])
in_namespaces = pytest.mark.parametrize("way", CLOSED[1:])


def attack(way, program, *, seconds=AMPLE, mib=128, **tests):
    return WAYS[way].run(Trial(PRELUDE + program, **tests), seconds=seconds, mib=mib)


def test_namespaces_are_not_missing_where_the_kernel_gives_them():
    """Where namespaces do not work, their tests are skipped: only the kernel may be at fault."""
    given = f"""
import ctypes, os
libc = ctypes.CDLL(None)
user = {namespaces.NEW_USER} if os.geteuid() else 0
refused = libc.unshare({namespaces.NEW_PLACES} | user)
print(refused or libc.mount(None, b"/", None, {namespaces.RECURSIVE | namespaces.PRIVATE}, None))
"""
    command = [sys.executable, "-I", "-c", given]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    works = "namespaces" in WAYS and WAYS["namespaces"].run(sandbox.HARMLESS, seconds=AMPLE).passed
    assert works == (found == "0")


@pytest.fixture
def outside(tmp_path):
    """A directory that everybody may write to."""
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o777)
    return tmp_path


# Ways out. A program that gets to its end has found one.

NUMBERS = {  # of system calls, by machine
    "x86_64": {
        "ptrace": 101,
        "process_vm_readv": 310,
        "userfaultfd": 323,
        "add_key": 248,
        "keyctl": 250,
        "inotify_init1": 294,
        "bpf": 321,
        "perf_event_open": 298,
        "mount": 165,
        "unshare": 272,
        "personality": 135,
        "clock_settime": 227,
        "sethostname": 170,
        "sched_setaffinity": 203,
        "io_uring_setup": 425,
        "pidfd_open": 434,
        "memfd_secret": 447,
        "x32 getpid": 0x40000000 | 39,
    },
    "aarch64": {
        "ptrace": 117,
        "process_vm_readv": 270,
        "userfaultfd": 282,
        "add_key": 217,
        "keyctl": 219,
        "inotify_init1": 26,
        "bpf": 280,
        "perf_event_open": 241,
        "mount": 40,
        "unshare": 97,
        "personality": 92,
        "clock_settime": 112,
        "sethostname": 161,
        "sched_setaffinity": 122,
        "io_uring_setup": 425,
        "pidfd_open": 434,
        "memfd_secret": 447,
    },
}.get(os.uname().machine, {})


def passing(way, programs, tests=""):
    """The names of programs that come to their end, and how the others fail."""
    trials = [Trial(PRELUDE + program, tests) for program in programs.values()]
    outcomes = sandbox.run_all(WAYS[way], trials, seconds=AMPLE, mib=128)
    ended = dict(zip(programs, outcomes, strict=True))
    return [n for n, o in ended.items() if o.passed], {n: o.detail for n, o in ended.items()}


@every_way
def test_system_calls_of_attackers_are_refused(way):
    # Any other error would say that the kernel has looked at the arguments.
    programs = {
        name: f"try:\n    call({number}, 0, 0, 0, 0, 0)\nexcept PermissionError:\n    raise\n"
        "except OSError:\n    pass"
        for name, number in NUMBERS.items()
    }
    passed, details = passing(way, programs)
    assert not passed
    assert {detail.partition(":")[0] for detail in details.values()} == {"PermissionError"}


ESCAPING = {
    "a process that outlives its parent's death": "assert libc.prctl(1, 0, 0, 0, 0) == 0",
    "a session of its own": "os.setsid()",
    "a group of its own": "os.setpgid(0, 0)",
    "a signal to its group": "os.kill(0, 0)",
    "a signal to all": "os.kill(-1, 0)",
    "a signal to the process that waits": "os.kill(os.getppid() or 1, 0)",
    "a signal by owning a file": (
        "import fcntl\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid() or 1)"
    ),
    "a fork": "os.fork() or os._exit(0)",
    "a double fork": "os.fork() or os.fork() or os._exit(0)",
    "vfork": "import subprocess\nsubprocess.run([sys.executable, '-c', ''])",
    "a thread": "import threading\nthreading.Thread(target=print).start()",
    "another program": "os.execv(sys.executable, [sys.executable, '-c', ''])",
    "an abstract socket": (
        "s = socket.socket(socket.AF_UNIX)\ns.bind(chr(0) + 'genlora')\ns.listen()\n"
    ),
    "a socket of the internet": "socket.socket()",
    "a socket of the kernel": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "its memory as a file": "open('/proc/self/mem', 'r+b')",
    "other processes": "assert [int(n) for n in os.listdir('/proc') if n.isdigit()]",
    "shared memory of System V": "assert libc.shmget(0, 1536 << 20, 0o1600) != -1",
    "a memfd": "os.memfd_create('x')",
    "shared memory of POSIX": "open('/dev/shm/x', 'w')",
    "wide pipes": "import fcntl\nfcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",
    "memory": "bytearray(200 << 20)",
    "a higher bound": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n"
    ),
    "another's bound": "import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
    "root": "os.setuid(0)\nassert os.getuid() == 0\nopen('/etc/x', 'w')",
    "devices": "os.mknod('sda', 0o60600, os.makedev(8, 0))\nopen('sda')",
    "the interpreter's files": "open(os.__file__, 'a')",
    "the root": "open('/x', 'w')",
    "a directory above": "os.chroot('.')",
    "home": "assert os.listdir(os.path.expanduser('~root'))[0] not in ('.pyenv', '.local')",
    "the environment": "assert [n for n in os.environ if 'HOME' in n or 'PATH' in n]",
    "a large file": "open('x', 'w').write('a' * 2**25)",
    "many files": ("for i in range(40):\n    open(str(i), 'wb').write(b'x' * 2**20)\n"),
    "very many files": "for i in range(10_000):\n    open(str(i), 'w')",
}


@closed
def test_a_program_gets_nowhere(way):
    passed, details = passing(way, ESCAPING)
    assert not passed
    kinds = ("Permission", "OS", "Memory", "Assertion", "FileNotFound", "Runtime", "Value")
    errors = {f"{kind}Error" for kind in kinds}
    assert not {n: text for n, text in details.items() if text.partition(":")[0] not in errors}


HANDLE = """
class Handle(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint), ("kind", ctypes.c_int), ("bytes", ctypes.c_ubyte * 128)]

handle = Handle(128)
"""


@closed
def test_a_file_outside_cannot_be_opened_by_its_handle(way, outside):
    names = {}
    exec(PRELUDE + HANDLE, names)
    mount = ctypes.c_int()
    place, handle = str(outside).encode(), names["handle"]
    if ctypes.CDLL(None).name_to_handle_at(
        -100, place, ctypes.byref(handle), ctypes.byref(mount), 0
    ):
        pytest.skip("the file system of the tests has no handles")
    program = f"""{HANDLE}
handle.size, handle.kind = {handle.size}, {handle.kind}
handle.bytes[:{handle.size}] = {list(handle.bytes[: handle.size])}
opened = libc.open_by_handle_at(os.open('/usr', os.O_RDONLY), ctypes.byref(handle), os.O_RDONLY)
assert opened != -1, os.strerror(ctypes.get_errno())
os.open('new', os.O_CREAT | os.O_WRONLY, dir_fd=opened)
"""
    assert attack(way, program).detail == "AssertionError: Operation not permitted"
    assert not os.listdir(outside)


@closed
def test_files_outside_cannot_be_changed_and_the_directory_is_gone(way, outside):
    kept, place = outside / "kept", outside / "place"
    kept.write_text("mine")
    for program in (
        f"open({str(kept)!r}, 'w')",
        f"os.remove({str(kept)!r})",
        f"os.chmod({str(kept)!r}, 0)",
        f"open({str(place)!r}, 'w')",
        f"os.symlink({str(outside)!r}, 'link')\nopen('link/place', 'w')",
        f"open('/proc/self/root{place}', 'w')",
        f"open(os.path.join('..', '..') + {str(place)!r}, 'w')",
    ):
        assert attack(way, program).detail.startswith("FileNotFoundError")
    assert kept.read_text() == "mine"
    assert os.listdir(outside) == ["kept"]
    where = attack(way, "raise ValueError(os.getcwd())").detail
    assert where == "ValueError: /tmp"


STUBBORN = """
import time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
for escape in (
    lambda: libc.prctl(1, 0, 0, 0, 0),
    lambda: os.kill(0, signal.SIGSTOP),
    lambda: os.kill(os.getppid() or 1, signal.SIGSTOP),
    os.setsid,
    lambda: os.fork() and os._exit(0),
    os.setsid,
    lambda: os.fork() and os._exit(0),
):
    try:
        escape()
    except OSError:
        pass
while True:
    time.sleep(1)
"""


def _marked(mark):
    """The processes that were started with a mark in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another's, or gone by now
            found += [place] if mark.encode() in place.read_bytes() else []
    return found


@every_way
def test_nothing_outlives_its_time(way, monkeypatch):
    mark = uuid.uuid4().hex
    monkeypatch.setattr(sandbox, "ENVIRONMENT", {"MARK": mark})
    assert attack(way, STUBBORN, seconds=1.0).detail == "timed out"
    until = time.monotonic() + 10  # the kernel ends them one after the other
    while (left := _marked(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left


@every_way
def test_cleaning_up_changes_no_file_outside(way, outside, monkeypatch):
    kept = outside / "kept"
    kept.write_text("mine")
    kept.chmod(0o640)
    place = outside / "scratch"
    place.mkdir(mode=0o777)
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(place))
    program = f"""
os.mkdir('closed')
os.symlink({str(kept)!r}, 'closed/link')
os.symlink({str(outside)!r}, 'closed/directory')
os.chmod('closed', 0)
try:
    os.chmod('.', 0o500)
except OSError:
    pass
"""
    assert attack(way, program).passed
    assert kept.stat().st_mode & 0o777 == 0o640
    assert kept.read_text() == "mine"
    assert not list(place.iterdir())


@every_way
def test_deep_directories_lose_no_result_and_leave_nothing(way, outside, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(outside))
    deep = "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')"
    trials = [Trial("x = 1"), Trial(deep), Trial("x = 1")]
    outcomes = sandbox.run_all(WAYS[way], trials, seconds=AMPLE)
    assert [outcome.passed for outcome in outcomes] == [True] * 3
    assert not list(outside.iterdir())


@every_way
def test_a_fork_bomb_is_over_at_once(way):
    assert attack(way, "while True:\n    os.fork()").detail.startswith("PermissionError")


@pytest.mark.parametrize(
    ("column", "header"), [(1, "x86_64-linux-gnu/asm/unistd_64.h"), (2, "asm-generic/unistd.h")]
)
def test_allowed_calls_have_the_numbers_of_the_kernels_headers(column, header):
    header = Path("/usr/include") / header
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", header.read_text())
    numbers = dict(found) | {
        "newfstatat": dict(found).get("newfstatat", dict(found).get("fstatat"))
    }
    ours = [entry.split() for entry in system_calls.ALLOWED.replace("\n", ";").split(";") if entry]
    assert {e[0]: e[column] for e in ours if e[column] != "-"} == {
        e[0]: numbers[e[0]] for e in ours if e[column] != "-"
    }


# Scores. The tests are right; the program is not, and must not pass them.

SQUARE = "assert square(2) == 4\nassert square(-3) == 9\n"
FAKES = {
    "ends early": "sys.exit(0)",
    "ends at once": "os._exit(0)",
    "ends when it is called": "def square(x):\n    os._exit(0)",
    "leaves when it is called": "def square(x):\n    sys.exit(0)",
    "ends a loop": "def square(x):\n    raise StopIteration",
    "prints a marker": "print('passed', '[true, \"\"]', flush=True)\nos._exit(0)",
    "equals everything": (
        "class Any:\n"
        "    def __eq__(self, other): return True\n"
        "    def __ne__(self, other): return False\n"
        "    def __bool__(self): return True\n"
        "def square(x): return Any()"
    ),
    "is an int that equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\ndef square(x): return Any(1)"
    ),
    "claims a class": (
        "class Any:\n    __class__ = int\n    def __eq__(self, other): return True\n"
        "def square(x): return Any()"
    ),
    "changes the builtins": (
        "import builtins\nbuiltins.AssertionError = None\nbuiltins.all = lambda _: True\n"
        "builtins.__dict__['square'] = lambda x: x\ndef square(x): return x"
    ),
    "reads its callers": (
        "import gc\n"
        "def square(x):\n"
        "    frame = sys._getframe()\n"
        "    while frame := frame.f_back:\n"
        "        for values in (frame.f_locals, frame.f_globals):\n"
        "            for value in list(values.values()):\n"
        "                if 'square(2)' + ' ==' in str(value): return 4 if x == 2 else 9\n"
        "    for value in gc.get_objects():\n"
        "        if 'square(2)' + ' ==' in str(value)[:10000]: return 4 if x == 2 else 9\n"
    ),
    "answers for the other side": (
        "for n in range(3, 64):\n"
        "    for line in (b'[true, \"\"]', b'[\"value\", 4, null]', b'[\"value\", 9, []]'):\n"
        "        try: os.write(n, line + b'\\n')\n"
        "        except OSError: pass\n"
        "os._exit(0)"
    ),
    "talks without end": (
        "for n in range(3, 64):\n    try:\n        while True: os.write(n, b'9' * 65536)\n"
        "    except OSError: pass\n"
    ),
    "answers with what cannot be read": (
        "def square(x):\n"
        "    for n in range(3, 64):\n"
        '        try: os.write(n, b\'["value", ["type", ["eval"]], null]\\n\')\n'
        "        except OSError: pass\n"
        "    os._exit(0)"
    ),
    "answers with an array at an address": (
        "class Array:\n"
        "    __array_interface__ = dict(shape=(), typestr='<i8', data=(1 << 20, False))\n"
        "def square(x): return Array()"
    ),
    "is an exception": "def square(x):\n    raise KeyboardInterrupt",
    "hides the tests": "def check(*_): pass\ndef square(x): return x",
    "reads from disk": (
        "def square(x):\n"
        "    for at, _, names in os.walk('/'):\n"
        "        for name in names:\n"
        "            if name == 'answers.json': return int(open(at + '/' + name).read())\n"
    ),
}


@in_namespaces
def test_a_score_cannot_be_faked(way, outside):
    (outside / "answers.json").write_text("4")
    assert not passing(way, FAKES, SQUARE)[0]
    assert passing(way, {"honest": "def square(x): return x * x"}, SQUARE)[0] == ["honest"]


@in_namespaces
@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x):\n    raise StopIteration", "assert all(map(f, [1, 2]))"),
        ("def f(x):\n    raise GeneratorExit", "assert not [*map(f, [1])]"),
        ("def all(_): return True\ndef f(x): return 0", "assert all(f(n) == n for n in (1, 2))"),
        ("class math:\n    isclose = lambda *_: True\nf = float", "assert math.isclose(f(1), 2)"),
        ("def f(x):\n    os._exit(0)", "try:\n    f(1)\nexcept Exception:\n    pass"),
        ("def f(x):\n    while True: pass", "try:\n    f(1)\nexcept BaseException:\n    pass"),
        # It gives an answer, and has ended before the next question.
        (
            "def f(x):\n    for n in range(3, 64):\n"
            "        try: os.write(n, b'[\"value\", 1, null]\\n')\n"
            "        except OSError: pass\n    os._exit(0)",
            "import time\nassert f(1) == 1\ntime.sleep(0.3)\n"
            "try:\n    f(1)\nexcept Exception:\n    pass",
        ),
        ("def helper(a): return 0\ndef f(x): return 1", "assert helper(f(1)) == 0"),
    ],
)
def test_tests_that_trust_too_much_are_not_misled(way, program, tests):
    before = "def helper(a):\n    return a\n"
    assert not attack(way, program, tests=tests, before=before, seconds=2.0).passed


@in_namespaces
@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x): return x", "for x in VALUES:\n    assert f(x) == x, x\n"),
        ("def f(x): return x", "for x in VALUES:\n    assert type(f(x)) is type(x), x\n"),
        ("def f(x): return x", "assert f(float('nan')) != f(float('nan'))"),
        ("def f(x):\n    x.sort()", "a = [3, 1, 2]\nassert f(a) is None\nassert a == [1, 2, 3]"),
        ("def f(x):\n    x['a'] = 1", "a = {'b': 2}\nf(x=a) or f(a)\nassert a == {'a': 1, 'b': 2}"),
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
        ("def f(n):\n    while True: yield n", "assert [*zip(f(3), 'ab')] == [(3, 'a'), (3, 'b')]"),
        ("f = iter([1, 2])", "assert next(f) == 1\nassert next(f) == 2\nassert next(f, 0) == 0"),
        ("import collections\nf = collections.defaultdict(int, a=1)", "assert f == {'a': 1}"),
        ("import enum\nclass E(enum.IntEnum):\n    A = 1\nf = lambda: E.A", "assert f() == 1"),
        ("import collections\nf = collections.namedtuple('P', 'x y')", "assert f(1, 2) == (1, 2)"),
        (
            "def f(x):\n    raise KeyError(x)",
            "try:\n    f(1)\n    assert 0\nexcept KeyError:\n    pass",
        ),
        (
            "class A:\n    def __len__(self): return 3\n    def __getitem__(self, i): return 2 * i",
            "a = A()\na.b = 5\nassert (len(a), a[4], a.b, bool(a)) == (3, 8, 5, True)",
        ),
        (
            "import asyncio\nasync def g(): return 3\nf = lambda: asyncio.run(g())",
            "assert f() == 3",
        ),
        ("import numpy\ndef f(x): return numpy.arange(x)", "assert (f(3) == [0, 1, 2]).all()"),
        ("import numpy\ndef f(x): return numpy.float32(x)", "assert f(0.1) == numpy.float32(0.1)"),
        (
            "import tempfile\ndef f():\n    with tempfile.TemporaryFile('w+') as t:\n"
            "        t.write('a')\n        t.seek(0)\n        return t.read()",
            "assert f() == 'a'",
        ),
        (
            "def f(kind, *v): return [x for x in v if type(x) is kind]",
            "assert f(str, 1, 'a') == ['a']",
        ),
    ],
)
def test_honest_programs_pass(way, program, tests):
    before = textwrap.dedent("""
        from collections import Counter, OrderedDict, deque
        from datetime import date, datetime, timedelta
        from decimal import Decimal
        from fractions import Fraction
        VALUES = [
            None, True, 0, -1, 2**63, 10**5000, 0.1, -0.0, 1e308, float("inf"), 2 + 3j, "",
            "\\ud800é", b"\\x00", bytearray(b"a"), [], [1, [2]], (), (1,), {}, set(), {1, 2},
            {1: "a", (2,): None}, frozenset("ab"), range(3, 9, 2), Fraction(1, 3), deque([1]),
            Decimal("0.10"), date(2024, 1, 2), datetime(2024, 1, 2, 3, 4), timedelta(1, 2),
            Counter("aab"), OrderedDict(b=1, a=2), {"a": 1}.keys(), {"a": 1}.items(), int,
        ]
    """)
    if "numpy" in tests + program:
        before += "import numpy\n"
    outcome = attack(way, program, tests=tests, before=before, mib=1024)
    assert outcome == sandbox.Outcome(True)


# What is told, and what is refused.


@closed
def test_all_walls_hold(way):
    assert open_walls(WAYS[way]) == []


@in_namespaces
def test_all_walls_hold_for_an_ordinary_user(way):
    """Beside root: a process in a user namespace, which has root's files and none of its rights."""
    script = Path(__file__).with_name("walls_of_a_user.py")
    done = subprocess.run(
        ["unshare", "--user", "--map-user=1000", "--map-group=1000", sys.executable, script],
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    found = dict(line.split(":") for line in done.stdout.splitlines())
    assert found.pop("user") == "1000"
    assert found.pop("cleaned up, mode of a file outside") == "0o640"
    assert found.pop("none").split()
    assert not found[way].split()
    assert not any(names.split() for names in found.values())


def test_without_namespaces_the_walls_that_are_left_are_told_apart():
    missing = open_walls(WAYS["none"])
    assert {"writing", "reading", "sockets", "disk"} <= {*missing}
    assert not {"network", "processes", "signals", "calls"} & {*missing}


def test_an_open_sandbox_is_refused_until_it_is_allowed(monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "choose", lambda container: WAYS["none"])
    with pytest.raises(ValueError, match=r"leaves open.*: .*writing") as refused:
        code.check_sandbox(code.CodeConfig(data="x", allow_code=True))
    assert "code.allow_open_sandbox true" in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3
    found = code.check_sandbox(code.CodeConfig(data="x", allow_code=True, allow_open_sandbox=True))
    assert found["with"] == "none"
    assert "writing" in found["open"]
    assert capsys.readouterr().out.startswith("warning: the sandbox (none) leaves open")


@in_namespaces
def test_the_best_way_is_taken_and_a_named_command_before_it(way, monkeypatch):
    assert sandbox.choose.__wrapped__() == next(iter(WAYS.values()))
    # As a container: any command that runs another, and finds `python3` inside.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    chosen = sandbox.choose.__wrapped__(shlex.join([*WAYS["namespaces"].command, "/usr/bin/env"]))
    assert (chosen.name, chosen.python) == ("container", "python3")
    assert open_walls(chosen) == []
    with pytest.raises(OSError, match="container: "):
        sandbox.choose.__wrapped__("false")
    with pytest.raises(OSError, match="no-such-command"):
        sandbox.choose.__wrapped__("no-such-command run")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert sandbox.choose.__wrapped__().name == "namespaces"
