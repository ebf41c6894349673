"""What is asked of the hub, with the hub's functions replaced: no network, no download."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError

from genlora_jax.cli import main
from genlora_jax.hf.checkpoint import CONFIG as CONFIG_FILE
from genlora_jax.hf.checkpoint import locate
from genlora_jax.plan.sizes import model_shape
from genlora_jax.settings import parse
from genlora_jax.training.recipe import Recipe

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
RECIPE = """
model: {path: someone/model, revision: v2}
adapter: {rank: 4, group_size: 8}
data: {train: nowhere.jsonl, length: 12, batch_size: 16}
train: {output: nowhere, steps: 10}
"""
GATED = GatedRepoError(
    "403 Client Error.\n\nlog in", response=SimpleNamespace(headers={}, request=0)
)


@pytest.fixture
def recipe_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The calls of the hub's function; it has one `config.json`."""
    calls = []
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(CONFIG))

    def snapshot_download(name, *, revision, token, allow_patterns):
        calls.append((name, *allow_patterns, revision, token))
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def refuse_with(monkeypatch, error):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


def test_a_plan_without_a_shape_asks_the_hub_for_the_config_alone(recipe_file, asked, capsys):
    main(["plan", "--config", str(recipe_file), "--topology", "gpu:8x80"])
    assert "memory left" in capsys.readouterr().out
    assert set(asked) == {("someone/model", "config.json", "v2", None)}


def test_a_shape_in_the_recipe_asks_for_nothing(recipe_file, asked):
    shape = {name: value for name, value in CONFIG.items() if name != "model_type"}
    shape["head_dim"] = 8
    arguments = [f"--model.shape.{name}={value}" for name, value in shape.items()]
    recipe = parse(Recipe, ["--config", str(recipe_file), *arguments])
    assert model_shape(recipe).hidden_size == 64
    assert asked == []


def test_the_token_is_passed_on_and_the_shape_is_that_of_the_file(asked):
    directory = locate("someone/model", token="secret", files=[CONFIG_FILE])
    assert json.loads((directory / "config.json").read_text()) == CONFIG
    assert asked == [("someone/model", "config.json", None, "secret")]


def test_local_directories_are_taken_as_they_are(tmp_path, asked):
    assert locate(tmp_path, files=[CONFIG_FILE]) == locate(tmp_path) == tmp_path
    assert asked == []


@pytest.mark.parametrize("options", [{}, {"files": [CONFIG_FILE]}], ids=["all", "config"])
def test_a_gated_model_is_refused_with_what_to_do(options, monkeypatch):
    refuse_with(monkeypatch, GATED)
    with pytest.raises(
        FileNotFoundError, match=r"someone/model is a gated model.* HF_TOKEN"
    ) as info:
        locate("someone/model", **options)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("options", [{}, {"files": [CONFIG_FILE]}], ids=["all", "config"])
def test_other_refusals_are_one_line_with_the_hubs_reason(options, monkeypatch):
    refuse_with(monkeypatch, RuntimeError("404\n\n  no such repository"))
    message = "someone/model is no local directory, and the hub did not give it: 404 no such"
    with pytest.raises(FileNotFoundError, match=message) as info:
        locate("someone/model", **options)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("path", ["MISSING", "owner/missing", "./runs/a/merged", "/data/a", "a b"])
def test_a_model_that_is_not_there_is_said_in_three_lines_of_80(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"is no local .*: check the path") as info:
        locate(path)
    assert len(f"error: {info.value}") <= 240


def test_the_command_reports_a_gated_model_in_one_line(recipe_file, monkeypatch, capsys):
    refuse_with(monkeypatch, GATED)
    recipe_file.write_text(RECIPE.replace("someone/model", "someone/gated"))
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(recipe_file), "--topology", "gpu:8x80"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: someone/gated is a gated model")
