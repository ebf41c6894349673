"""What a process in the sandbox can be: the candidate, or the checker of its answers.

The *candidate* runs a model's program and answers calls of its functions. The *checker* runs the
tests. They never share a process: each name that the tests take from the program is a `Remote`,
whose calls go to the candidate and come back as plain values, in JSON. What the program says of
itself decides nothing, and what the tests expect never comes near it.

This file is sent as text into the sandbox and imports nothing but the standard library.
"""

import ast
import builtins
import contextlib
import importlib
import json
import os
import signal
import sys
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

ENDED = "ended early"
CONTAINERS = (list, dict, set, bytearray)  # what a called function may have changed

# Values between candidate and checker. Those of a subclass travel as the class's.
VALUES: dict[str, tuple[type, Callable[[Any], list[Any]], Callable[[list[Any]], Any]]] = {
    "int": (int, lambda v: [hex(v)], lambda p: int(p[0], 16)),
    "complex": (complex, lambda v: [v.real, v.imag], lambda p: complex(*p)),
    "bytes": (bytes, list, bytes),
    "bytearray": (bytearray, list, bytearray),
    "list": (list, list, list),
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "counter": (Counter, lambda v: [*v.items()], lambda p: Counter(dict(p))),
    "ordered": (OrderedDict, lambda v: [*v.items()], OrderedDict),
    "dict": (dict, lambda v: [*v.items()], dict),
    "keys": (type({}.keys()), list, lambda p: dict.fromkeys(p).keys()),
    "items": (type({}.items()), list, lambda p: dict(p).items()),
    "deque": (deque, list, deque),
    "range": (range, lambda v: [v.start, v.stop, v.step], lambda p: range(*p)),
    "fraction": (Fraction, lambda v: [v.numerator, v.denominator], lambda p: Fraction(*p)),
    "decimal": (Decimal, lambda v: [str(v)], lambda p: Decimal(*p)),
    "datetime": (datetime, lambda v: [v.isoformat()], lambda p: datetime.fromisoformat(*p)),
    "date": (date, lambda v: [v.isoformat()], lambda p: date.fromisoformat(*p)),
    "timedelta": (
        timedelta,
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda p: timedelta(*p),
    ),
}


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """A value as JSON; `keep` gives a number to what is no plain value."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int) and abs(value) < 1 << 63:
        return int(value)
    dtype: Any = getattr(value, "dtype", None) if type(value).__module__ == "numpy" else None
    if getattr(dtype, "kind", "-") in "biufc":
        return ["numpy", [dtype.str, encode(value.tolist(), keep)]]
    if isinstance(value, type) and value in vars(builtins).values():
        return ["type", [value.__name__]]
    for name, (kind, parts, _) in VALUES.items():
        if isinstance(value, kind):
            return [name, [encode(part, keep) for part in parts(value)]]
    return ["remote", [keep(value)]]


def decode(form: Any, find: Callable[[int], Any]) -> Any:
    """The value of a form that `encode` made; `find` knows what a number stands for."""
    if not isinstance(form, list):
        return form
    name, forms = form
    parts = [decode(part, find) for part in forms]
    if name == "remote":
        return find(*parts)
    if name == "type" and isinstance(named := getattr(builtins, *parts), type):
        return named
    if name == "numpy":
        return importlib.import_module("numpy").array(parts[1], parts[0])[()]
    return VALUES[name][2](parts)


# The candidate

OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    **{f.__name__: f for f in (getattr, setattr, len, bool, str, iter, next)},
    "item": lambda value, index: value[index],
    "equal": lambda one, other: one == other,
}


def answer_calls(program: str, messages: Any, answers: Any) -> None:
    """Runs a program as a module, and then what the checker asks of it."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # where dataclasses and pickle look
    kept: list[Any] = []
    send(answers, "started")

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def perform(operation: str, args: Any, kwargs: Any) -> Any:
        values = decode(args, kept.__getitem__)
        if operation == "program":
            exec(compile(program, "candidate.py", "exec"), module.__dict__)
            return [None, None]
        if operation == "name":
            return [encode(module.__dict__[values[0]], keep), None]
        result = OPERATIONS[operation](*values, **decode(kwargs, kept.__getitem__))
        changed = [value if isinstance(value, CONTAINERS) else None for value in values]
        return [encode(result, keep), encode(changed, keep)]

    for line in messages:
        try:
            reply = ["value", *perform(*json.loads(line))]
        except BaseException as error:
            reply = ["error", type(error).__name__, str(error)[:500]]
        send(answers, reply)


# The checker


class Checker:
    """Asks the candidate, and gives the verdict."""

    def __init__(self, messages: Any, answers: Any, report: int) -> None:
        self.messages, self.answers, self.report = messages, answers, report

    def end(self, detail: str, *, passed: bool = False) -> NoReturn:
        """Gives the verdict, which nothing after it can change."""
        os.write(self.report, f"\n{json.dumps([passed, detail[:500]])}\n".encode())
        os._exit(0)

    def ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """What the candidate answers; a program that has ended has failed."""
        question = [operation, encode([*args], _number), encode(kwargs, _number)]
        with contextlib.suppress(OSError):  # it has ended, as the next line finds
            send(self.answers, question)
        if not (line := self.messages.readline()):
            self.end(ENDED)
        try:
            kind, *content = json.loads(line)
            if kind == "value":
                value, changed = (decode(form, lambda n: Remote(self, n)) for form in content)
            else:
                name, text = map(str, content)
        except BaseException as error:
            self.end(f"its answer cannot be read: {type(error).__name__}")
        if kind != "value":
            raise _exception(operation, name, text)
        for before, after in zip(args, changed or [], strict=False):
            _update(before, after)
        return value

    def check(self, before: str, tests: str, names: list[str], seconds: float) -> NoReturn:
        """Runs the tests; `names`, and names that nobody else knows, are the program's."""
        if not self.messages.readline():
            self.end(ENDED)
        signal.signal(signal.SIGALRM, lambda *_: self.end("timed out"))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            self.ask("program")
            namespace = types.ModuleType("tests").__dict__
            exec(_complete(before), namespace)
            tree = ast.parse(tests)
            for name in [*names, *sorted(_free(tree) - {*namespace, *names, *dir(builtins)})]:
                if name in sys.stdlib_module_names and name not in names:
                    namespace[name] = importlib.import_module(name)
                else:
                    with contextlib.suppress(KeyError):
                        namespace[name] = self.ask("name", name)
            exec(compile(tree, "tests.py", "exec"), namespace)
        except BaseException as error:
            self.end(f"{type(error).__name__}: {error}")
        self.end("", passed=True)


class Remote:
    """An object in the candidate's process."""

    def __init__(self, checker: Checker, number: int) -> None:
        self.__dict__.update(_checker=checker, _number=number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._checker.ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # by which libraries ask for memory addresses, among others
            raise AttributeError(name)
        return self._checker.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._checker.ask("setattr", self, name, value)

    def __getitem__(self, index: Any) -> Any:
        return self._checker.ask("item", self, index)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._checker.ask("iter", self)
        with contextlib.suppress(StopIteration):
            while True:
                yield self._checker.ask("next", iterator)

    def __next__(self) -> Any:
        return self._checker.ask("next", self)

    def __len__(self) -> int:
        return int(self._checker.ask("len", self))

    def __bool__(self) -> bool:
        return bool(self._checker.ask("bool", self))

    def __str__(self) -> str:
        return str(self._checker.ask("str", self))

    def __eq__(self, other: object) -> bool:
        """Equal to no value of the tests, whatever its own class says."""
        return isinstance(other, Remote) and bool(self._checker.ask("equal", self, other))

    __hash__ = object.__hash__


def send(stream: Any, message: Any) -> None:
    """Writes a line of JSON."""
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def _number(value: Any) -> int:
    if isinstance(value, Remote):
        return int(value.__dict__["_number"])
    raise TypeError(f"the tests give the program a {type(value).__name__}, which cannot be sent")


def _update(before: Any, after: Any) -> None:
    """Changes an argument as the function that was called with it did."""
    if type(before) is not type(after) or not isinstance(before, CONTAINERS) or before == after:
        return
    if isinstance(before, (list, bytearray)):
        before[:] = after
    else:
        before.clear()
        before.update(after)


def _exception(operation: str, name: str, text: str) -> BaseException:
    """What the program raised; nothing that would end a loop of the tests without a word."""
    kind = getattr(builtins, name, None)
    if operation == "next" and name == "StopIteration":
        return StopIteration()
    silent = (StopIteration, StopAsyncIteration, GeneratorExit)
    if isinstance(kind, type) and issubclass(kind, BaseException) and not issubclass(kind, silent):
        with contextlib.suppress(TypeError):
            return kind(text)
    return type(name, (RuntimeError,), {})(text)


def _complete(source: str) -> str:
    """Source that may end in the head of a function, which the program was to continue."""
    for text in (source, f"{source}\n    pass\n"):
        with contextlib.suppress(SyntaxError):
            compile(text, "before.py", "exec")
            return text
    return ""


def _free(tree: ast.AST) -> set[str]:
    """Names that tests read and do not set."""
    read: set[str] = set()
    known: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else known).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.alias):
            known.add((node.asname or node.name).partition(".")[0])
    return read - known


def play(setup: dict[str, Any], messages: Any, answers: Any, report: int | None) -> None:
    """Is the candidate or, where there is a way to report, the checker."""
    if report is None:
        answer_calls(setup["program"], messages, answers)
    else:
        checker = Checker(messages, answers, report)
        checker.check(setup["before"], setup["tests"], setup["names"], setup["seconds"])
