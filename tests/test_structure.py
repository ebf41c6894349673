"""What each part of the library may import, and how large its modules and functions may be."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import genlora_jax
from genlora_jax.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "genlora_jax"
FILES = sorted(LIBRARY.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(LIBRARY)))

# A package, or a module beside them -> what it may import of ours. `cli`, `__main__` and the
# library's own `__init__` stand above all and may import anything.
ARROWS: dict[str, set[str]] = {
    # One latent to basis vectors, and what an adapter is: no model, no files.
    "validation": set(),
    "patterns": set(),
    "seeded_random": set(),
    "threads": set(),
    "remote_path": {"threads"},
    "storage": {"remote_path"},
    "bucket_directories": {"remote_path", "storage", "threads"},
    "basis_functions": set(),
    "generators": {"basis_functions", "seeded_random", "validation"},
    "base": {"targets", "validation"},
    "factors": set(),
    "targets": {"patterns", "validation"},
    "methods": {
        "base",
        "basis_functions",
        "validation",
        "factors",
        "generators",
        "seeded_random",
        "targets",
    },
    "mesh": set(),
    "sharding": {"base", "factors", "mesh", "targets"},
    "adapter": {"base", "methods", "sharding", "targets"},
    # What is done with factors.
    "inject": {"base", "factors"},
    "merge_gpu": set(),
    "merge": {"base", "factors", "merge_gpu", "targets"},
    "combine": {"factors"},
    "analysis": {"adapter", "factors", "targets"},
    "compression": {"adapter", "analysis", "deltas", "factors", "merge", "methods", "targets"},
    "deltas": {"adapter", "analysis", "targets"},
    # Models know no adapters.
    "models": {"base", "mesh"},
    # Files.
    "atomic_files": {"bucket_directories", "storage"},
    "adapter_files": {
        *("adapter", "atomic_files", "base", "methods", "sharding", "storage", "targets"),
        "validation",
    },
    "data": {"atomic_files", "remote_path", "storage", "threads", "validation"},
    "settings": {"methods", "storage", "validation"},
    "hf": {
        *(
            "adapter",
            "adapter_files",
            "base",
            "data",
            "factors",
            "atomic_files",
            "methods",
            "models",
            "patterns",
            "sharding",
            "storage",
            "targets",
            "threads",
            "validation",
        ),
    },
    "merge_files": {"adapter_files", "base", "hf", "inject", "merge", "models"},
    # What runs.
    "generation": {"data", "hf", "inject", "mesh", "models", "validation"},
    "training": {
        *(
            "adapter",
            "adapter_files",
            "base",
            "validation",
            "compression",
            "data",
            "factors",
            "atomic_files",
            "hf",
        ),
        *("inject", "mesh", "methods", "settings", "sharding", "storage"),
        *("bucket_directories", "remote_path"),
    },
    "evaluation": {
        *("data", "atomic_files", "generation", "hf", "inject", "mesh", "models", "settings"),
        *("threads", "training", "validation"),
    },
    "plan": {"adapter", "base", "factors", "hf", "mesh", "models", "sharding", "training"},
}
ABOVE_ALL = {"cli", "__main__", "__init__"}
# Of other people's libraries: packages that only some parts may import.
ONLY_FOR = {
    "flax": {
        *("adapter", "adapter_files", "combine", "compression", "factors", "generation", "hf"),
        *(
            "analysis",
            "base",
            "inject",
            "merge",
            "models",
            "plan",
            "sharding",
            "targets",
            "training",
        ),
        *("evaluation", "cli"),
    },
    "optax": {"compression", "training", "plan"},
    "safetensors": {"adapter_files", "hf"},
    "orbax": {"training"},
    "lm_eval": {"evaluation"},
}


def part_of(module):
    """The part of the library that a full module name lies in; None for other libraries."""
    library, _, rest = module.partition(".")
    if library != "genlora_jax":
        return None
    return rest.partition(".")[0] or "__init__"


def name_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(file) for file in FILES}


def without_type_checking(node):
    """All nodes below one, but for what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from without_type_checking(child)


def imported(file):
    """Full names of the modules that a file imports, at its top or inside functions."""
    names = set()
    for node in without_type_checking(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import, which these tests do not follow"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in full}
    return names


# The arrows.


def test_the_table_names_every_part_and_nothing_else():
    parts = {part_of(module) for module in MODULES}
    assert parts - ABOVE_ALL == set(ARROWS)
    assert set().union(*ARROWS.values()) <= set(ARROWS)


def test_the_table_has_no_cycle():
    assert len(list(TopologicalSorter(ARROWS).static_order())) == len(ARROWS)


@every_file
def test_a_module_imports_what_its_part_may(file):
    part = part_of(name_of(file))
    ours = {part_of(name) for name in imported(file)} - {None, part}
    if part not in ABOVE_ALL:
        assert ours <= ARROWS[part]


@every_file
def test_a_module_imports_nothing_of_the_scripts_and_tests(file):
    assert not {name.partition(".")[0] for name in imported(file)} & {"train", "tests"}


def test_every_arrow_of_the_table_is_used():
    used = {part: set() for part in ARROWS}
    for file in FILES:
        part = part_of(name_of(file))
        if part in ARROWS:
            used[part] |= {part_of(name) for name in imported(file)} - {None, part}
    assert used == ARROWS


@pytest.mark.parametrize("package", ONLY_FOR)
def test_other_libraries_are_imported_where_they_belong(package):
    parts = {
        part_of(name_of(file))
        for file in FILES
        if package in {name.partition(".")[0] for name in imported(file)}
    }
    assert parts
    assert parts <= ONLY_FOR[package]


def test_only_one_module_imports_lm_eval():
    users = [
        file.name for file in FILES if any("lm_eval" in n.split(".")[0] for n in imported(file))
    ]
    assert users == ["lm_eval.py"]


@pytest.mark.parametrize("name", ["jail", "roles", "namespaces"])
def test_what_runs_in_the_sandbox_imports_the_standard_library_alone(name):
    names = imported(LIBRARY / "evaluation" / "sandbox" / f"{name}.py")
    assert names
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_every_method_is_a_file_with_its_config_and_a_name_at_the_top():
    others = {"__init__.py", "config.py"}
    files = {file.name for file in (LIBRARY / "methods").glob("*.py")} - others
    assert files == {f"{name}.py" for name in METHODS}
    for name, config in METHODS.items():
        assert config.__module__ == f"genlora_jax.methods.{name}"
        assert config.__name__ in genlora_jax.__all__


# What an import of the library costs.

SLOW = {
    *("torch", "transformers", "grain", "optax", "huggingface_hub", "safetensors", "orbax"),
    *("jax.experimental.pallas", "tensorboardX", "rich", "jsonargparse"),
}


def test_importing_the_library_loads_no_slow_package_that_flax_does_not():
    code = (
        "import sys, jax, flax.linen; before = {*sys.modules}; import genlora_jax; "
        "print(*{*sys.modules} - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split())
    assert "genlora_jax.inject" in loaded
    slow = SLOW & loaded
    assert not slow


def test_what_is_imported_at_first_use_is_listed_and_there():
    assert set(genlora_jax.__all__) <= set(dir(genlora_jax))
    for name in genlora_jax.__all__:
        assert getattr(genlora_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        genlora_jax.nothing  # noqa: B018


# Sizes.

NESTING = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.If, ast.For, ast.While),
    *(ast.With, ast.Try, ast.Match),
)


def functions(file):
    tree = ast.parse(file.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(function):
    """Lines of a function's body, less its docstring."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def depth(node):
    """How many blocks lie within one another in a function."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        below = depth(child)
        # A chain of `elif`s is one level, however long.
        deepest = max(deepest, below + (isinstance(child, NESTING) and not is_elif))
    return deepest


def test_sizes_are_measured_as_a_reader_counts_them():
    source = '''
def f(x):
    """Docstring."""
    for i in x:
        if i:
            pass
        elif not i:
            with i:
                pass
    return x
'''
    (function,) = ast.parse(source).body
    assert body_lines(function) == 7
    assert depth(function) == 3


@every_file
def test_modules_are_short_and_named_for_what_they_hold(file):
    assert len(file.read_text().splitlines()) <= 300
    assert not {"utils", "util", "helpers", "misc"} & {
        part.lower() for part in file.relative_to(ROOT).with_suffix("").parts
    }


@every_file
def test_functions_are_short_and_shallow(file):
    long = {f.name: body_lines(f) for f in functions(file) if body_lines(f) >= 60}
    deep = {f.name: depth(f) for f in functions(file) if depth(f) > 4}
    assert not long
    assert not deep
