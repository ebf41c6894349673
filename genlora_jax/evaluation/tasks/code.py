"""Code: the model writes programs, and tests decide whether they are right."""

import ast
import contextlib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from genlora_jax.data.forms import text_field
from genlora_jax.evaluation.sandbox import sandbox
from genlora_jax.evaluation.sandbox.sandbox import Trial
from genlora_jax.evaluation.sandbox.walls import ESCAPES, open_walls
from genlora_jax.evaluation.tasks.task import (
    AnswerConfig,
    Result,
    Say,
    ask,
    read_examples,
    read_items,
    with_examples,
)
from genlora_jax.generation.subject import Prompt, Subject

# What follows an answer of a model that was never trained to stop.
AFTER_FUNCTION = ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n```"]
AFTER_PROGRAM = ["\nassert ", '\n"""', "\nprint(", "\nif __name__", "\n```"]
FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class CodeConfig(AnswerConfig):
    """Programs to write.

    Rows are HumanEval's (`prompt`, `test`, `entry_point`) or MBPP's (`text` or `prompt`,
    `test_list`; `code` for worked examples). With `chat` the model is asked for a program in a
    fenced block.

    Attributes:
        allow_code: Must be true: this runs programs that a model wrote. `sandbox.py` says what
            guards against them and what does not.
        allow_open_sandbox: Run them even where a wall of the sandbox is missing.
        container: A command that runs the rest of its line in a container, instead of a sandbox
            found on the machine (`docker run --rm -i --network none python:3.12-slim`).
        k: The k of pass@k; `samples` must reach the largest.
        max_new_tokens: Longest program.
        seconds: Limit of each program's wall-clock time.
        mib: Limit of its memory, MiB.
    """

    allow_code: bool = False
    allow_open_sandbox: bool = False
    container: str | None = None
    k: list[int] = field(default_factory=lambda: [1])
    max_new_tokens: int = 512
    seconds: float = 5.0
    mib: int = 1024

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        if not self.k or min(self.k) < 1 or max(self.k) > self.samples:
            raise ValueError(f"k must lie between 1 and samples ({self.samples}), got {self.k}")
        if not 0 < self.seconds < math.inf or self.mib < 1:
            raise ValueError(
                f"seconds ({self.seconds}) and mib ({self.mib}) must be positive and finite"
            )
        if self.container is not None and not self.container.strip():
            raise ValueError("container must be a command")


class Exercise(NamedTuple):
    """What to ask, and what to put around the answer.

    Attributes:
        prompt: For a model that continues text.
        request: For a model that answers in a chat.
        before: What the answer continues; it stays when a fenced block repeats it.
        after: The tests.
        names: What the tests take from the answer even if Python has the name too.
        stop: Strings before which an answer ends.
        solution: The row's answer, for worked examples.
    """

    prompt: str
    request: str
    before: str
    after: str
    names: tuple[str, ...]
    stop: list[str]
    solution: str | None


def read(source: str, limit: int | None = None, say: Say = print) -> list[Exercise]:
    """The exercises of a source; raises as `read_items` does."""
    return read_items(source, limit, _exercise, say)


def _exercise(place: str, row: dict[str, Any]) -> tuple[Exercise, Collection[str]]:
    if "entry_point" in row:
        prompt, name = text_field(place, row, "prompt"), text_field(place, row, "entry_point")
        after = f"{text_field(place, row, 'test')}\n\ncheck({name})\n"
        request = f"Complete this function. Give all of it.\n\n```python\n{prompt}\n```"
        solution = row.get("canonical_solution")
        exercise = Exercise(prompt, request, prompt, after, (name,), AFTER_FUNCTION, solution)
        return exercise, ("prompt", "test", "entry_point", "canonical_solution")
    asked = text_field(place, row, field := "text" if "text" in row else "prompt")
    tests = _texts(place, row, "test_list")
    if not tests:
        raise ValueError(f"{place}: test_list is missing or empty")
    imports = "".join(f"{line}\n" for line in _texts(place, row, "test_imports"))
    setup = text_field(place, row, "test_setup_code") if row.get("test_setup_code") else ""
    after = "\n".join([setup, *tests, ""])
    listed = "\n".join(tests)
    prompt = f'"""\n{asked}\n{listed}\n"""\n'
    request = f"{asked} Write Python that passes these tests:\n\n```python\n{listed}\n```"
    solution = row.get("code")
    names = _defined(solution)
    exercise = Exercise(prompt, request, imports, after, names, AFTER_PROGRAM, solution)
    return exercise, (field, "test_list", "test_imports", "test_setup_code", "code")


def _defined(solution: object) -> tuple[str, ...]:
    """The functions and classes of a solution, since some are called as Python's own are."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        body = ast.parse(solution if isinstance(solution, str) else "").body
        return tuple(n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    return ()


def _texts(place: str, row: dict[str, Any], name: str) -> list[str]:
    """A field that must be a list of texts if it is there."""
    value = [] if row.get(name) is None else row[name]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{place}: {name} must be a list of texts")
    return value


def trial(exercise: Exercise, answer: str) -> Trial:
    """What is run: the answer, or the first fenced block in it, and the tests beside it."""
    fenced = FENCED.search(answer)
    program = (
        f"{exercise.before}{answer}\n" if fenced is None else f"{exercise.before}\n\n{fenced[1]}\n"
    )
    return Trial(program, exercise.after, exercise.before, exercise.names)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k programs passes, from more of them.

    One minus the share of the k-subsets that have none of the passing ones (Chen et al.,
    arXiv 2107.03374).
    """
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def prompts(cfg: CodeConfig, exercises: list[Exercise]) -> list[Prompt]:
    """What the model is asked; ValueError if a worked example has no solution."""
    examples = read_examples(cfg, read)
    if any(example.solution is None for example in examples):
        raise ValueError(f"{cfg.examples}: a worked example has neither code nor solution")
    fence = "```python\n{}\n```" if cfg.chat else "{}"
    shown = [(_question(cfg, e), fence.format(e.solution)) for e in examples]
    return [with_examples(_question(cfg, e), shown, chat=cfg.chat) for e in exercises]


def run(subject: Subject, cfg: CodeConfig, exercises: list[Exercise]) -> Result:
    """Has the model write programs, and runs them.

    Returns:
        `pass@k` for every k; `cut_prompts`, how many prompts were too long and lost their
        beginning; `not_run`, how many programs failed because the sandbox did.

    Raises:
        ValueError: If programs may not be run, a worked example has no solution, or as `ask` does.
    """
    check_allowed(cfg)
    asked = prompts(cfg, exercises)
    answers, too_long = ask(subject, cfg, asked, [[] if cfg.chat else e.stop for e in exercises])
    trials = [trial(e, text) for e, texts in zip(exercises, answers, strict=True) for text in texts]
    place = sandbox.choose(cfg.container)
    ended = sandbox.run_all(place, trials, seconds=cfg.seconds, mib=cfg.mib)
    if not_run := [outcome.detail for outcome in ended if not outcome.ran]:
        print(f"warning: {len(not_run)} programs count as failed but were not run: {not_run[0]}")
    outcomes = iter(ended)
    rows: list[dict[str, Any]] = []
    for prompt, texts in zip(asked, answers, strict=True):
        own = [next(outcomes) for _ in texts]
        passed, details = [o.passed for o in own], [o.detail for o in own]
        rows.append({"prompt": prompt, "answers": texts, "passed": passed, "details": details})
    metrics: dict[str, Any] = {
        f"pass@{k}": float(np.mean([pass_at_k(cfg.samples, sum(r["passed"]), k) for r in rows]))
        for k in cfg.k
    }
    counts = {"cut_prompts": too_long, "not_run": len(not_run)}
    return Result(metrics | counts, rows)


def _question(cfg: CodeConfig, exercise: Exercise) -> str:
    return exercise.request if cfg.chat else exercise.prompt


def check_allowed(cfg: CodeConfig) -> None:
    """Raises ValueError unless programs may be run."""
    if not cfg.allow_code:
        raise ValueError(
            "this runs programs that a model wrote, in a sandbox that is no virtual machine: set "
            "code.allow_code to true if that is what you want"
        )


def check_sandbox(cfg: CodeConfig) -> dict[str, str | list[str]]:
    """The sandbox of this machine: what it is, which walls it has, which are missing.

    Raises:
        ValueError: If programs may not be run, or a wall is missing and that is not allowed.
        OSError: If not even a harmless program runs.
    """
    check_allowed(cfg)
    place = sandbox.choose(cfg.container)
    missing = open_walls(place)
    found = f"the sandbox ({place.name}) leaves open on this machine: {', '.join(missing)}"
    if missing and not cfg.allow_open_sandbox:
        raise ValueError(
            f"{found}\ninstall bubblewrap, or name a container command (code.container), or accept"
            " that with code.allow_open_sandbox true"
        )
    if missing:
        print(f"warning: {found}")
    return {"with": place.name, "closed": [w for w in ESCAPES if w not in missing], "open": missing}
