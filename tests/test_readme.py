"""Python, recipe and command lines of the README and the docs run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from genlora_jax.settings import parse
from genlora_jax.training.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


DOCS = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text()]


def blocks(language, text=TEXT):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_python_of_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    count, difference = capsys.readouterr().out.split()
    assert int(count) > 0
    assert float(difference) < 1e-4


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_python_of_a_page_runs(page):
    (code,) = blocks("python", page.read_text())
    exec(compile(code, page.name, "exec"), {"__name__": "page"})


@pytest.mark.long
def test_command_lines_of_the_readme_run_in_order(tmp_path):
    # `make` is what runs this; `pip install` is in the Makefile.
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines = [line for line in lines if not line.startswith(("make ", "pip "))]
    assert [line.split()[0] for line in lines] == ["python"] * 3 + ["genlora"] * 6 + ["python"]
    (text,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "train").symlink_to(ROOT / "train")
    # Here most of the time goes into steps, and users' programs are optimised.
    users = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        "\n".join(["set -e", *lines]),
        shell=True,
        cwd=tmp_path,
        env=os.environ | users | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "rank: 8" in done.stdout
    assert "Mia has 14 plums." in done.stdout
    assert {entry.name for entry in tmp_path.iterdir()} >= {"runs", "merged", "peft", "scores"}


def test_recipes_are_valid():
    for file in (ROOT / "train" / "recipes").glob("*.yaml"):
        assert parse(Recipe, ["--config", str(file)]).train.output
