"""The sandbox: right programs pass, and nothing else does (attacks: `real/test_sandbox.py`)."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from genlora_jax.evaluation.sandbox import sandbox
from genlora_jax.evaluation.sandbox.sandbox import Trial
from genlora_jax.evaluation.tasks import code
from genlora_jax.threads import processors

# Only what waits for ever may meet its limit: on a machine at work a second is soon over.
AMPLE = 60.0
# Below its directory a program sees Python alone, if it lies there, as in a clone in /tmp.
PYTHONS = [Path(prefix).parts for prefix in (sys.prefix, sys.base_prefix)]
BELOW_TMP = [parts[2] for parts in PYTHONS if parts[:2] == ("/", "tmp")]


@pytest.fixture(scope="module")
def place():
    """The best sandbox of this machine."""
    return sandbox.choose()


@pytest.mark.parametrize(
    "program",
    [
        "x = 1",
        f"import os\nassert not {{*os.listdir()}} - {{*{BELOW_TMP}}}\nopen('x', 'w').write('a')",
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 3\nassert A().x == 3",
        "import os\nassert not [name for name in os.environ if 'HOME' in name or 'PYTHON' in name]",
        "print('x' * 100_000_000)",
        "assert 'é' == '\\xe9'",
    ],
)
def test_what_reaches_its_end_passes(place, program):
    assert place.run(Trial(program), seconds=AMPLE) == sandbox.Outcome(True)


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "ended early, with status 0"),
        ("import os\nos.execv('/bin/true', ['true'])", "PermissionError"),
        ("import ctypes\nctypes.string_at(0)", "ended early, with status 139"),
        ("raise BaseException", "BaseException"),
        ("input()", "EOFError"),
        ("x = [0] * 10**10", "MemoryError"),
        ("x = []\nwhile True: x.append(' ' * 2**20)", "MemoryError"),
        ("open('x', 'w').write('a' * 2**25)", "OSError: [Errno 2"),  # too large, or no space
    ],
)
def test_what_does_not_reach_its_end_fails(place, program, detail):
    outcome = place.run(Trial(program), seconds=AMPLE, mib=256)
    assert not outcome.passed
    assert outcome.detail.startswith(detail)


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("while True: pass", ""),
        ("import time\ntime.sleep(1000)", ""),
        ("def f():\n    while True: pass", "f()"),
        ("def f(): pass", "while True: f()"),
    ],
)
def test_what_waits_for_ever_is_ended(place, program, tests):
    began = time.monotonic()
    outcome = place.run(Trial(program, tests), seconds=1.0)
    assert outcome == sandbox.Outcome(False, "timed out")
    assert time.monotonic() - began < 1.0 + sandbox.GRACE


def test_programs_run_side_by_side_keep_their_order(place):
    trials = [Trial(f"assert {i} % 3 == 0") for i in range(9)]
    outcomes = sandbox.run_all(place, trials, seconds=AMPLE)
    assert [o.passed for o in outcomes] == [i % 3 == 0 for i in range(9)]


@pytest.mark.parametrize("allowed", [{5}, {0, 3, 64}])
def test_as_many_programs_run_at_a_time_as_processors_are_allowed(monkeypatch, allowed):
    """Each has some seconds of the clock: right ones must not run late in a job of few cores."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: allowed, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    running, most, lock = 0, 0, threading.Lock()

    class Place:
        def run(self, trial, **options):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.02)
            with lock:
                running -= 1
            return sandbox.Outcome(True, "")

    sandbox.run_all(Place(), [Trial("pass")] * 12)
    assert most == len(allowed)


def test_without_affinities_all_processors_are_allowed(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert processors() == os.cpu_count()


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
# A name that Python has too, and a function of the prompt that the tests rely on.
SUM = {
    "text": "Adds.",
    "code": "def sum(a, b): return a + b",
    "test_list": ["assert sum(1, 2) == 3"],
}
POLYNOMIAL = {
    "prompt": 'def value(x):\n    return 3 * x + 6\n\n\ndef zero():\n    """Where it is 0."""\n',
    "test": "def check(candidate):\n    assert value(candidate()) == 0\n",
    "entry_point": "zero",
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
        (SUM, "def sum(a, b):\n    return a + b\n", True),
        (SUM, "def sum(a, b):\n    return 4\n", False),
        (POLYNOMIAL, "    return -2\n", True),
        (POLYNOMIAL, "    return 5\n\ndef value(x):\n    return 0\n", False),
    ],
)
def test_an_answer_passes_if_the_tests_do(place, row, answer, passes):
    exercise, _ = code._exercise("here", row)
    assert place.run(code.trial(exercise, answer), seconds=AMPLE).passed == passes


def test_scores_are_the_share_of_answers_that_pass(monkeypatch):
    said = [["    return a + b\n", "    return a\n"], ["    return a\n"] * 2]
    monkeypatch.setattr(code, "ask", lambda *_: (said, 0))
    cfg = code.CodeConfig(data="x", allow_code=True, samples=2, k=[1, 2], temperature=1.0)
    result = code.run(None, cfg, [code._exercise("here", HUMAN_EVAL)[0]] * 2)
    assert result.metrics == {"pass@1": 0.25, "pass@2": 0.5, "cut_prompts": 0, "not_run": 0}
    assert [row["passed"] for row in result.rows] == [[True, False], [False, False]]
    assert result.rows[1]["details"] == ["AssertionError: "] * 2


def test_a_sandbox_that_fails_is_told_from_a_program_that_does(monkeypatch, capsys):
    monkeypatch.setattr(code, "ask", lambda *_: ([["    return a + b\n"]] * 2, 0))
    broken = sandbox.Sandbox("broken", ("/bin/sh", "-c", "echo out of order >&2"))
    monkeypatch.setattr(sandbox, "choose", lambda _: broken)
    cfg = code.CodeConfig(data="x", allow_code=True)
    result = code.run(None, cfg, [code._exercise("here", HUMAN_EVAL)[0]] * 2)
    assert result.metrics == {"pass@1": 0.0, "cut_prompts": 0, "not_run": 2}
    said = "warning: 2 programs count as failed but were not run: out of order\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_time_limit_is_one(seconds):
    with pytest.raises(ValueError, match="seconds"):
        code.CodeConfig(data="x", seconds=seconds)


def test_bad_exercises_are_named():
    for row, message in (
        ({"prompt": "a", "test_list": []}, "test_list is missing or empty"),
        ({"prompt": "a", "entry_point": "f"}, "'test' is missing"),
        ({"test_list": ["x"]}, "'prompt' is missing"),
        (MBPP | {"test_setup_code": 3}, "'test_setup_code' is no text"),
        (MBPP | {"test_imports": "math"}, "test_imports must be a list"),
    ):
        with pytest.raises(ValueError, match=f"here: .*{message}"):
            code._exercise("here", row)


@pytest.mark.shared
def test_real_solutions_pass_their_tests_and_not_those_of_others(shared, place):
    exercises = code.read(str(shared / "data" / "mbpp.jsonl"))
    # The first, and those whose tests need more than plain values and calls.
    odd = {"sum", "is_tree_balanced", "remove_particular_data_type", "tuple_size", "max_height"}
    exercises = exercises[:16] + [e for e in exercises[16:] if odd & {*e.names}]
    solutions = [exercise.solution for exercise in exercises]
    right = [code.trial(e, s) for e, s in zip(exercises, solutions, strict=True)]
    wrong = [code.trial(e, s) for e, s in zip(exercises, solutions[::-1], strict=True)]
    outcomes = sandbox.run_all(place, [*right, *wrong], seconds=AMPLE)
    assert [o.passed for o in outcomes[: len(right)]] == [True] * len(right)
    same = [e is other for e, other in zip(exercises, exercises[::-1], strict=True)]
    assert [o.passed for o in outcomes[len(right) :]] == same
