"""The sandbox: right programs pass, and nothing else does or gets out."""

import os
import subprocess
import time

import pytest

from genlora_jax.evaluation.sandbox import sandbox
from genlora_jax.evaluation.tasks import code

# Only what waits for ever may meet its limit: on a machine at work a second is soon over.
AMPLE = 60.0
# Some containers refuse them, even to root; util-linux asks for them as the sandbox does.
ASKED = ["unshare", "--mount", "--net", "--pid", *([] if os.geteuid() == 0 else ["--user"]), "true"]
NAMESPACES = subprocess.run(ASKED, stderr=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    "program",
    [
        "x = 1",
        "import os\nassert not os.listdir()\nopen('x', 'w').write('a' * 1000)",
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 3\nassert A().x == 3",
        "import os\nassert not [name for name in os.environ if 'HOME' in name or 'PYTHON' in name]",
        "print('x' * 100_000_000)",
        "assert 'é' == '\\xe9'",
    ],
)
def test_what_reaches_its_end_passes(program):
    assert sandbox.run(program, seconds=AMPLE) == sandbox.Outcome(True)


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "ended early, with status 0"),
        ("import os\nos.execv('/bin/true', ['true'])", "ended early, with status 0"),
        ("import ctypes\nctypes.string_at(0)", "ended early, with status 139"),
        ("raise BaseException", "BaseException"),
        ("input()", "EOFError"),
        ("x = [0] * 10**10", "MemoryError"),
        ("x = []\nwhile True: x.append(' ' * 2**20)", "MemoryError"),
        ("open('x', 'w').write('a' * 2**25)", "OSError: [Errno 27]"),
        ("import os\nos.write(int(os.listdir('/proc/self/fd')[3]), b'a')", ""),
    ],
)
def test_what_does_not_reach_its_end_fails(program, detail):
    outcome = sandbox.run(program, seconds=AMPLE, mib=256)
    assert not outcome.passed
    assert outcome.detail.startswith(detail)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "import os, time\nos.setsid()\ntime.sleep(1000)",
    ],
)
def test_what_waits_for_ever_is_ended(program):
    began = time.monotonic()
    assert sandbox.run(program, seconds=1.0) == sandbox.Outcome(False, "timed out")
    assert time.monotonic() - began < 1.0 + sandbox.GRACE


def test_all_walls_stand_where_the_machine_gives_namespaces():
    walls = sandbox.isolation()
    assert walls["processes"]
    assert (walls["network"], walls["files"]) == (NAMESPACES, NAMESPACES)
    assert walls["signals"] or not NAMESPACES


def test_a_fork_bomb_is_over_at_once_and_leaves_nobody():
    began = time.monotonic()
    outcome = sandbox.run("import os\nwhile True:\n    os.fork()", seconds=AMPLE)
    assert outcome.detail.startswith("BlockingIOError")
    assert time.monotonic() - began < 10


@pytest.mark.skipif(not NAMESPACES, reason="this machine gives no namespaces")
def test_files_outside_cannot_be_changed_and_the_directory_is_removed(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o777)
    place = tmp_path / "place"
    for program in (
        f"open({str(kept)!r}, 'w')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.chmod({str(kept)!r}, 0)",
        f"open({str(place)!r}, 'w')",
    ):
        assert sandbox.run(program).detail.startswith(("OSError: [Errno 30]", "PermissionError"))
    assert kept.read_text() == "mine"
    assert not place.exists()
    # Where it ran: a name that it can only tell by failing.
    message = sandbox.run("import os\nraise ValueError(os.getcwd())").detail
    assert "candidate-" in message
    assert not os.path.exists(message.removeprefix("ValueError: "))


def test_programs_run_side_by_side_keep_their_order():
    programs = [f"assert {i} % 3 == 0" for i in range(9)]
    outcomes = sandbox.run_all(programs, seconds=AMPLE)
    assert [o.passed for o in outcomes] == [i % 3 == 0 for i in range(9)]


HUMAN_EVAL = {
    "prompt": 'def add(a, b):\n    """Adds."""\n',
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}
MBPP = {
    "text": "Adds.",
    "test_setup_code": "one = Number(1)",
    "test_list": ["assert add(one.value, 2) == 3", "assert add(0, 0) == 0"],
    "test_imports": ["import math"],
}
NUMBER = "class Number:\n    def __init__(self, value):\n        self.value = value\n\n"


@pytest.mark.parametrize(
    ("row", "answer", "passes"),
    [
        (HUMAN_EVAL, "    return a + b\n", True),
        (HUMAN_EVAL, "    return a - b\n", False),
        (HUMAN_EVAL, "    pass\n\nimport sys\nsys.exit(0)\n", False),
        (HUMAN_EVAL, "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds.", True),
        (HUMAN_EVAL, "Here:\n```\ndef add(a, b):\n    return a + b", True),
        (MBPP, f"{NUMBER}def add(a, b):\n    return math.fsum([a, b])\n", True),
        (MBPP, f"{NUMBER}def add(a, b):\n    return 3\n", False),
    ],
)
def test_an_answer_passes_if_the_tests_do(row, answer, passes):
    exercise = code._exercise("here", row)
    assert sandbox.run(code.program(exercise, answer), seconds=AMPLE).passed == passes


def test_bad_exercises_are_named():
    for row, message in (
        ({"prompt": "a", "test_list": []}, "test_list is missing or empty"),
        ({"prompt": "a", "entry_point": "f"}, "'test' is missing"),
        ({"test_list": ["x"]}, "'prompt' is missing"),
        (MBPP | {"test_setup_code": 3}, "'test_setup_code' is missing or no text"),
        (MBPP | {"test_imports": "math"}, "test_imports must be a list"),
    ):
        with pytest.raises(ValueError, match=f"here: .*{message}"):
            code._exercise("here", row)


@pytest.mark.shared
def test_real_solutions_pass_their_tests_and_not_those_of_others(shared):
    exercises = code.read(str(shared / "data" / "mbpp.jsonl"), 16)
    solutions = [exercise.solution for exercise in exercises]
    right = [code.program(e, s) for e, s in zip(exercises, solutions, strict=True)]
    wrong = [code.program(e, s) for e, s in zip(exercises, solutions[::-1], strict=True)]
    outcomes = sandbox.run_all([*right, *wrong], seconds=AMPLE)
    assert [o.passed for o in outcomes] == [True] * 16 + [False] * 16
