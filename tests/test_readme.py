"""Python, recipes, command lines and links of the README and the docs are real."""

import functools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

import genlora_jax
from genlora_jax import cli
from genlora_jax.evaluation.run import Evaluation
from genlora_jax.settings import parse
from genlora_jax.training.recipe import Recipe
from genlora_jax.training.sweep.members import SweepRecipe

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS = [page for page in PAGES if page.parent == ROOT / "docs"]
STUDY = ROOT / "train" / "benchmarks"
FINDINGS = STUDY / "results" / "frontier" / "findings.md"
SETTINGS = {
    "finetune": Recipe,
    "sweep": SweepRecipe,
    "tokenize": Recipe,
    "evaluate": Evaluation,
}


def blocks(language, text=TEXT):
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def command_lines(text):
    """Each command of a page's shell blocks, in words."""
    lines = "\n".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def name_of(page):
    return page.name


def having(language):
    return [page for page in PAGES if blocks(language, page.read_text())]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder to write to, with the README's recipe and the embedded model in it."""
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "train").symlink_to(ROOT / "train")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_of_the_readme_runs(checkout, capsys):
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    count, difference = capsys.readouterr().out.split()
    assert int(count) > 0
    assert float(difference) < 1e-4
    assert {path.name for path in (checkout / "out").iterdir()} == {"merged", "peft", "adapter"}


@pytest.mark.parametrize("page", [page for page in having("python") if page in DOCS], ids=name_of)
def test_python_of_a_page_runs(page, checkout):
    code = "\n".join(blocks("python", page.read_text()))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users run
        exec(compile(code, page.name, "exec"), {"__name__": "page"})


@pytest.mark.docs
def test_command_lines_of_the_readme_run_in_order(checkout):
    # `make` is what runs this; `pip install` is in the Makefile.
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines = [line for line in lines if not line.startswith(("make ", "pip "))]
    commands = [line.split()[:2] for line in lines]
    assert {name for program, name in commands if program == "genlora"} == {
        *cli.COMMANDS,
        *cli.RECIPES,
    }
    assert len(commands) == 10
    # Here most of the time goes into steps, and users' programs are optimised.
    users = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        "\n".join(["set -e", *lines]),
        shell=True,
        cwd=checkout,
        env=os.environ | users | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "rank: 8" in done.stdout
    assert "Mia has 14 plums." in done.stdout
    assert {entry.name for entry in checkout.iterdir()} >= {"runs", "merged", "peft", "scores"}


@pytest.mark.parametrize("page", having("bash"), ids=name_of)
def test_commands_of_a_page_are_real(page, checkout, monkeypatch):
    asked = []
    for name, function in list(cli.COMMANDS.items()):
        stub = functools.wraps(function)(lambda name=name, **settings: asked.append(name))
        monkeypatch.setitem(cli.COMMANDS, name, stub)
    targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for words in command_lines(page.read_text()):
        program, *args = words
        if program == "genlora" and args[0] in SETTINGS:
            assert parse(SETTINGS[args[0]], [arg for arg in args[1:] if arg != "--print_config"])
        elif program == "genlora":
            cli.main(args)
            assert asked.pop() == args[0]
        elif program == "make":
            assert {arg for arg in args if "=" not in arg} <= set(targets), words
        elif program == "python" and args[0] == "-m":
            assert find_spec(args[1]), words
        elif program == "python" and not args[0].startswith("llama.cpp/"):
            assert (ROOT / args[0]).is_file(), words
        elif program == "pip":
            extras = re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
            assert set(re.findall(r"\[([a-z,-]+)\]", " ".join(args))) <= set(extras), words
        else:
            assert program in ("python", "vllm", "ct2-transformers-converter"), (
                words
            )  # other projects' commands


@pytest.mark.parametrize("page", having("yaml"), ids=name_of)
def test_settings_of_a_page_are_valid(page, checkout):
    for number, text in enumerate(blocks("yaml", page.read_text())):
        file = checkout / f"{number}.yaml"
        file.write_text(text)
        if text.startswith("model") and re.search(r"^train:", text, re.M):
            assert parse(Recipe, ["--config", str(file)])
        elif text.startswith("model"):
            assert parse(Evaluation, ["--config", str(file)])
        else:  # a part of a recipe
            assert parse(Recipe, ["--config", "recipe.yaml", "--config", str(file)])


def test_recipes_are_valid():
    for file in (ROOT / "train" / "recipes").glob("*.yaml"):
        assert parse(Recipe, ["--config", str(file)]).train.output


@pytest.mark.parametrize(
    "page", [*PAGES, STUDY / "README.md", FINDINGS, FINDINGS.with_name("tables.md")], ids=name_of
)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text()
    linked = {link.partition("#")[0] for link in re.findall(r"\]\((?!http)([^)#][^)]*)\)", text)}
    assert {link for link in linked if not (page.parent / link).exists()} == set()
    named = set(re.findall(r"`((?:train|tests|docs|genlora_jax|notebooks)/[\w./-]*)`", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_every_page_can_be_reached():
    site = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS:
        assert f"docs/{page.name}" in TEXT, page
        assert f": {page.name}\n" in site, page


def test_pages_are_short():
    assert len(TEXT.split()) <= 800
    assert len((ROOT / "docs" / "results.md").read_text().split()) <= 600


def test_the_results_tell_no_figure_that_the_study_has_not():
    known = FINDINGS.read_text() + (STUDY / "README.md").read_text()
    pattern = r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?[kM]?\b"
    results = (ROOT / "docs" / "results.md").read_text()
    told = set(re.findall(pattern, results))
    assert len(told) > 60
    assert {figure for figure in told if not re.search(rf"(?<![\d.]){figure}\b", known)} == set()
    assert set(re.findall(r"\b[1-9]\.\d{3}\b", TEXT)) <= set(re.findall(r"\b[1-9]\.\d{3}\b", known))
    table = TEXT.partition("## When to use it")[2].partition("## Install")[0]
    accuracies = set(re.findall(r"\b\d+\.\d\b", table))
    assert len(accuracies) == 8
    assert accuracies <= set(re.findall(r"\b\d+\.\d\b", results))


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    named = set(re.findall(r"^::: genlora_jax\.(?:\w+\.)*(\w+)$", text, flags=re.MULTILINE))
    assert set(genlora_jax.__all__) - named == {"fit"}  # another name of `compress`


def test_contributing_names_every_room_and_no_file_that_is_not_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tree,) = blocks("text", text)
    library = ROOT / "genlora_jax"
    rooms = {path.stem for path in library.iterdir() if not path.stem.startswith("__")}
    assert {room for room in rooms if not re.search(rf"\b{room}(\.py|/)", tree)} == set()
    table = text.partition("## I want to ...")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!I want|---)(.*?) \| (.*) \|$", table, flags=re.MULTILINE)
    assert len(rows) == 11
    for wish, files in rows:
        named = [name.removeprefix("genlora_jax/") for name in re.findall(r"`([\w/]+\.py)`", files)]
        assert named, wish
        assert {n for n in named if "NAME" not in n and not (library / n).is_file()} == set(), wish


def test_contributing_gives_a_reason_for_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"]]
    for extra in ("train", "datasets", "gcs", "s3", "lm-eval", "wandb", "docs", "test"):
        needed += project["optional-dependencies"][extra]
    names = {re.match(r"[\w-]+", need)[0] for need in needed} - {"genlora_jax"}
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Why each dependency")[2]
    assert {name for name in names if not re.search(rf"[| ,]{name}[, |]", table)} == set()
