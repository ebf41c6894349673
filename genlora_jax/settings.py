"""Command lines: typed settings from YAML and flags, errors in one line."""

import contextlib
import copy
import dataclasses
import functools
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import jax
import jsonargparse
import yaml

from genlora_jax.methods.config import AdapterConfig
from genlora_jax.storage import is_remote, storage_path
from genlora_jax.validation import listed

T = TypeVar("T")
OPTIONAL = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - (.*) "
    r"- Expected a <class 'NoneType'>.*"
)
# What is said of a setting of several forms: its name, the forms, why it is none, the value.
FORMS = re.compile(r'(Parser key "[^"]*": ).*?Subtypes: \[(.*?)\] Errors: .*Given value: (.*)')
CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>|genlora_jax(?:\.\w+)*\.")
OUR_REASON = re.compile(r"- ([\w.]+: \w+ must .*?) Given value type: ")
LONGEST = 300  # characters, above which it is shortened

OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED.*(Out of memory|device buffer|memory space hbm)", re.DOTALL
)
# What the user can mend.
USERS_ERRORS = (
    *(ValueError, OSError, FloatingPointError, OverflowError),
    jax.errors.JaxRuntimeError,
)
MEMORY_ADVICE = (
    "the device's memory is full. Smaller batches, shorter rows and a mesh of more devices save "
    "some; in training also model.remat full and train.accumulate (genlora plan says what a recipe "
    "needs), in a sweep members_per_pass. The device's message: "
)

NODES, LEVELS = 100_000, 50  # the most in a recipe, an alias counted as what it stands for
load_yaml = jsonargparse.get_loader("yaml")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_bounded_yaml(text: str) -> Any:
    """What YAML stands for; YAMLError if it is damaged, or `beyond_bounds`."""
    return copy.deepcopy(_loaded(text))


@functools.lru_cache(maxsize=8)  # a recipe is checked, and then parsed
def _loaded(text: str) -> Any:
    if reason := beyond_bounds(text) or _named_twice(text):
        raise yaml.YAMLError(reason)
    return load_yaml(text)


def _named_twice(text: str) -> str | None:
    """Which field of a mapping is there twice, of which YAML would keep the last; or None."""
    nodes, seen = [yaml.compose(text, Loader=LOADER)], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        names = set()
        for name, value in node.value:
            if name.value != "<<" and str(name.value) in names:
                return f"line {name.start_mark.line + 1}: {str(name.value)[:40]} is there twice"
            names.add(str(name.value))
            nodes.append(value)
    return None


def beyond_bounds(text: str) -> str | None:
    """How YAML stands for more than a recipe can, which would take all memory; or None.

    An alias of an alias of an alias is short, and has no end.
    """
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # of each: its anchor, its size so far
    for event in yaml.parse(text, Loader=LOADER):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, NODES)  # unknown: an alias of what it lies in
        elif isinstance(event, yaml.ScalarEvent):
            size = sizes[event.anchor] = 1
        anchor, before = open_nodes.pop()
        open_nodes.append((anchor, before + size))
        if before + size >= NODES or len(open_nodes) > LEVELS:
            line = event.start_mark.line + 1
            return f"line {line} is nested too deeply, or its aliases stand for too much"
    return None


jsonargparse.set_loader("yaml", load_bounded_yaml, exceptions=(yaml.YAMLError,))

# `adapter:` in a recipe takes the fields of GenLoRAConfig, or class_path and init_args.
jsonargparse.set_parsing_settings(subclasses_enabled=[AdapterConfig])


def parse(kind: type[T], args: Sequence[str] | None = None, command: str | None = None) -> T:
    """A dataclass from `--config FILE.yaml` and `--field.subfield value`, in that order.

    `--print_config` prints the result as YAML and exits; errors name the field. Without `args`
    they are the script's, else those of a subcommand of `genlora`, of which `--help` has the name.
    """
    parser = _parser(kind, f"genlora {command}" if args is not None and command else None)
    args = sys.argv[1:] if args is None else args
    printing = [argument for argument in args if argument.startswith("--print_config")]
    # Defaults are filled in last, or else those of another config's class would be kept.
    given = parse_arguments(parser, [a for a in args if a not in printing], defaults=False)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if (name := getattr(given.get(field.name), "class_path", None)) is not None:
            parser.set_defaults({field.name: {"class_path": name}})
    parsed = parse_arguments(parser, printing, given)
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and not isinstance(
            parsed.get(name), jsonargparse.Namespace
        ):
            raise ValueError(f"{name} must hold fields, got {parsed.get(name)!r}")
    try:
        fields = parser.instantiate(parsed)
    except ValueError as error:
        raise ValueError(_plain(error)) from error
    return kind(**{name: value for name, value in vars(fields).items() if name != "config"})


def dump(settings: Any) -> str:
    """A dataclass as YAML that `parse` reads with `--config`."""

    def plain(value: Any) -> Any:
        if isinstance(value, AdapterConfig):
            name = f"genlora_jax.{type(value).__name__}"
            return {"class_path": name, "init_args": dataclasses.asdict(value)}
        if dataclasses.is_dataclass(value):
            fields = dataclasses.fields(value)
            return {field.name: plain(getattr(value, field.name)) for field in fields}
        return [plain(each) for each in value] if isinstance(value, list) else value

    parser = _parser(type(settings))
    return str(parser.dump(parser.parse_object(plain(settings)), skip_unset=False))


def _parser(kind: type[Any], prog: str | None = None) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(prog=prog, description=kind.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="recipe in YAML")
    parser.add_class_arguments(kind)
    return parser


def parse_arguments(
    parser: jsonargparse.ArgumentParser,
    args: Sequence[str] | None,
    given: jsonargparse.Namespace | None = None,
    *,
    defaults: bool = True,
) -> Any:
    """Parses a command line.

    Args:
        parser: The parser.
        args: The command line; None for this process's.
        given: What has been parsed before.
        defaults: Whether to fill in the defaults.

    Raises:
        ValueError: In one line, instead of a page of usage.
    """
    # A parser of subcommands has no fields of its own.
    known = {action.dest.partition(".")[0] for action in parser._actions} - {"help", "print_config"}
    _check_recipes(args or (), known - {"config"} if "config" in known else ())
    for argument in args or ():  # flags are YAML as well, which no loader of ours reads
        with contextlib.suppress(yaml.YAMLError):
            if reason := beyond_bounds(argument):
                raise ValueError(f"{argument[:20]!r}...: {reason}")
    try:
        return parser.parse_args(args, given, defaults=defaults)
    except jsonargparse.ArgumentError as error:
        raise ValueError(_plain(error)) from error
    except OverflowError as error:  # of hundreds of digits
        raise ValueError(f"a number of the settings is too large: {error}") from error


def _check_recipes(args: Sequence[str], known: Collection[str]) -> None:
    """ValueError, with the file, for a recipe that is no mapping of known fields in UTF-8."""
    for i, argument in enumerate(args):
        name, _, value = argument.partition("=")
        file = value or "".join(args[i + 1 : i + 2])
        if name != "--config" or not (is_remote(file) or os.path.isfile(file)):
            continue
        if is_remote(file):  # the parser reads it once more
            jsonargparse.set_parsing_settings(config_read_mode_fsspec_enabled=True)
        try:
            recipe = load_bounded_yaml(storage_path(file).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error.reason}): save it as UTF-8") from None
        except (yaml.YAMLError, OverflowError, ValueError) as error:
            raise ValueError(f"{file}: no YAML: {error}") from None
        if not isinstance(recipe, dict):
            raise ValueError(f"{file}: must hold the fields of a recipe, such as `model:`")
        for section, fields in recipe.items():
            if known and section not in known:
                name = str(section)[:40]
                raise ValueError(f"{file}: no field is {name!r}; there are {listed(known, 20)}")
            for field, value in fields.items() if isinstance(fields, dict) else ():
                if value == {} and field != "init_args":  # the parser would leave it out unread
                    raise ValueError(f"{file}: {section}.{field} is empty: give it a value")


def _plain(error: Exception) -> str:
    """An error in one line, without the other types that an optional setting could have."""
    text, count = " ".join(str(error).split()), 1
    while count:
        text, count = OPTIONAL.subn(r"\1", text)
    if len(text) <= LONGEST:
        return text
    if found := OUR_REASON.search(text):
        return found[1]
    if found := FORMS.match(text):
        name, forms, value = found.groups()
        forms = CLASS.sub(r"\1", forms)
        return f"{name}must be one of {forms}, got {value:.100}"
    return text


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Turns an error that the user can mend into one line on stderr and exit status 1.

    A device that is out of memory is such an error. `GENLORA_TRACEBACK=1` shows the traceback.
    What is printed appears line by line, in a log file as on a terminal. A warning is one line,
    without the place in the code that gave it.
    """
    warnings.formatwarning = lambda message, *place, **line: f"note: {message}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except USERS_ERRORS as error:
        message = " ".join(str(error).split())
        if isinstance(error, jax.errors.JaxRuntimeError):
            if not OUT_OF_MEMORY.search(message):
                raise
            message = MEMORY_ADVICE + message[:200]
        if os.environ.get("GENLORA_TRACEBACK"):
            raise
        print("error:", message, file=sys.stderr)
        sys.exit(1)


def keep_compilations() -> None:
    """Has JAX keep compiled programs on disk, so that a second start compiles little.

    They lie in `~/.cache/genlora_jax`, at most 4 GiB of them. `JAX_COMPILATION_CACHE_DIR` names
    another directory, and `JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
    """
    config: Any = jax.config  # whose options no type checker knows
    if config.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        config.update("jax_compilation_cache_dir", str(home / "genlora_jax"))
        config.update("jax_compilation_cache_max_size", 4 * 2**30)
        # Small programs too: a start has a dozen of them, a tenth of its time when all are kept.
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def run_command(kind: type[T], run: Callable[[T], int | None], args: Sequence[str] | None) -> None:
    """Runs a command by its settings; exits with 128 + the signal's number if a signal ended it."""
    with report_errors():
        keep_compilations()
        number = run(parse(kind, args, run.__name__))
    if number is not None:
        sys.exit(128 + number)
