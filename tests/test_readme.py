"""The README's Python runs as it stands, and its recipe is a recipe."""

import re
from pathlib import Path

from genlora_jax.command import parse
from train.finetune import Recipe

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_python_of_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    count, difference = capsys.readouterr().out.split()
    assert int(count) > 0
    assert float(difference) < 1e-4


def test_recipe_of_the_readme_is_valid(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = parse(Recipe, ["--config", str(tmp_path / "recipe.yaml"), "--adapter.rank", "16"])
    assert recipe.adapter.rank == 16


def test_recipes_are_valid():
    for file in (ROOT / "train" / "recipes").glob("*.yaml"):
        assert parse(Recipe, ["--config", str(file)]).train.output
