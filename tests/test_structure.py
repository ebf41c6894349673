"""The direction in which modules import one another."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import genlora_jax
from genlora_jax import adapter, config

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "genlora_jax"
MODULES = sorted(LIBRARY.rglob("*.py"))


def imported(file):
    """Full names of all that a module imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import, which these tests do not follow"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def below(names, *packages):
    return {n for n in names if any(n == p or n.startswith(p + ".") for p in packages)}


def own_imports(*parts):
    return below(imported(LIBRARY.joinpath(*parts)), "genlora_jax")


def test_importing_the_library_imports_no_torch():
    code = "import sys, genlora_jax; print(*{'torch', 'transformers', 'grain'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_there_are_modules_to_look_at():
    assert {"generators.py", "adapter.py", "inject.py"} <= {file.name for file in MODULES}
    assert below(imported(LIBRARY / "adapter.py"), "flax", "genlora_jax.generators")


def test_config_imports_nothing_of_ours_and_no_jax():
    names = imported(LIBRARY / "config.py")
    assert not below(names, "genlora_jax", "jax", "flax")


def test_generators_import_no_flax_and_of_ours_only_config():
    assert not below(imported(LIBRARY / "generators.py"), "flax")
    own = own_imports("generators.py")
    assert own
    assert own == below(own, "genlora_jax.config")


@pytest.mark.parametrize("file", sorted((LIBRARY / "models").glob("*.py")), ids=lambda f: f.name)
def test_models_import_nothing_of_ours_but_models(file):
    own = below(imported(file), "genlora_jax")
    assert own == below(own, "genlora_jax.models")


METHODS = [file.name for file in sorted((LIBRARY / "methods").glob("*.py"))]


@pytest.mark.parametrize("name", METHODS)
def test_methods_know_neither_adapters_nor_models(name):
    below_them = ("config", "factors", "generators", "methods", "targets")
    own = own_imports("methods", name)
    assert own == below(own, *(f"genlora_jax.{part}" for part in below_them))


def test_every_method_has_a_config_a_file_and_a_name_at_the_top():
    kinds = set(config.METHODS.values())
    assert set(adapter.METHODS) == kinds
    assert {f"{name}.py" for name in config.METHODS} == {*METHODS} - {"__init__.py", "method.py"}
    assert {kind.__name__ for kind in kinds} <= set(genlora_jax.__all__)


@pytest.mark.parametrize(
    "name",
    [
        "adapter.py",
        "targets.py",
        "factors.py",
        "merge.py",
        "combine.py",
        "inject.py",
        "analysis.py",
        "fit.py",
    ],
)
def test_adapters_know_no_model(name):
    above = ("models", "hf", "training", "storage", "decoding", "cli", "command")
    assert not below(own_imports(name), *(f"genlora_jax.{part}" for part in above))


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(LIBRARY)))
def test_the_library_imports_nothing_of_train(file):
    assert not below(imported(file), "train")


@pytest.mark.parametrize(
    "file",
    [
        file
        for file in MODULES
        if not {"training", "plan", "evaluation"} & set(file.parts)
        and file.stem not in ("cli", "command")
    ],
    ids=lambda f: str(f.relative_to(LIBRARY)),
)
def test_only_training_and_commands_import_training(file):
    assert not below(imported(file), "genlora_jax.training")


@pytest.mark.parametrize(
    "file",
    [file for file in MODULES if "evaluation" not in file.parts and file.stem != "cli"],
    ids=lambda f: str(f.relative_to(LIBRARY)),
)
def test_nothing_below_imports_evaluation(file):
    assert not below(imported(file), "genlora_jax.evaluation")


def test_only_its_own_model_imports_lm_eval():
    assert [file.name for file in MODULES if below(imported(file), "lm_eval")] == ["lm_eval.py"]


def test_what_runs_in_the_sandbox_imports_the_standard_library_alone():
    names = imported(LIBRARY / "evaluation" / "jail.py")
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(LIBRARY)))
def test_modules_are_short_and_named_for_what_they_hold(file):
    assert len(file.read_text().splitlines()) <= 400
    assert not {"utils", "util", "helpers", "misc"} & {
        part.lower() for part in (file.stem, *file.parts)
    }
