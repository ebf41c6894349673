"""Adapters that version 0.1 wrote: they load, and stand for the factors that they stood for."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from baseline_methods import EPS
from flax.traverse_util import flatten_dict
from tiny_models import random_llama

import genlora_jax as gl
from genlora_jax.methods import config_from_json, config_to_json

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "0.1"
NAMES = sorted(path.name for path in (FIXTURES / "adapters").iterdir())


@pytest.fixture(scope="module")
def stored():
    """The factors that version 0.1 generated, by adapter and by path."""
    found = {}
    with np.load(FIXTURES / "factors.npz") as archive:
        for key, value in archive.items():
            name, path = key.split("/", 1)
            found.setdefault(name, {})[path] = value
    return found


def rounding(cfg):
    """By how much a leaf may be off: what its float32 sums and products can round.

    LoRA, DoRA, PiSSA, VeRA and full fine-tuning multiply at most three numbers. A generator sums
    `K g + g` terms (groupwise) or `K + 1`, of features whose statistics are sums over a latent of
    at most 48 values: the sum of both counts, in units of rounding, bounds the error.
    """
    if not isinstance(cfg, gl.GenLoRAConfig):
        return 3 * EPS
    return (48 + cfg.group_size * (cfg.kernels + 1)) * EPS


def test_there_is_an_adapter_of_every_method(stored):
    assert set(NAMES) == set(stored)
    assert {"genlora", "lora", "dora", "pissa", "vera", "full"} <= set(NAMES)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_generates_the_factors_that_it_did(name, with_base, stored):
    model, params = random_llama()
    options = {"params": params, "model": model} if with_base else {}
    cfg, adapter = gl.load_adapter(FIXTURES / "adapters" / name, **options)
    assert cfg == adapter.config
    found = flatten_dict(gl.generate_factors(cfg, adapter), sep="/")
    assert set(found) == set(stored[name])
    for path, theirs in stored[name].items():
        assert found[path].shape == theirs.shape
        largest = np.abs(theirs).max()
        assert largest > 0
        bound = rounding(cfg) * largest
        np.testing.assert_allclose(found[path], theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_saved_again_as_one_of_this_version(name, tmp_path):
    cfg, adapter = gl.load_adapter(FIXTURES / "adapters" / name)
    gl.save_adapter(tmp_path / "again", cfg, adapter)
    again, loaded = gl.load_adapter(tmp_path / "again")
    assert again == cfg
    assert loaded.spec == adapter.spec


def settings_of(name):
    settings = json.loads((FIXTURES / "adapters" / name / "adapter.json").read_text())
    return settings["config"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("genlora", {"latents_per_side": 2}, "latents_per_side is no longer supported"),
        ("genlora", {"share_inputs": True}, "share_inputs is no longer supported"),
        (
            "genlora_rbf",
            {"basis": "rbf_grid"},
            "'rbf_grid' with a groupwise generator is no longer supported",
        ),
    ],
)
def test_a_setting_that_is_gone_is_named(name, changes, message, tmp_path):
    path = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "adapters" / name, path)
    settings = json.loads((path / "adapter.json").read_text())
    settings["config"] |= changes
    (path / "adapter.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message) as caught:
        gl.load_adapter(path)
    assert str(path / "adapter.json") in str(caught.value)
    assert "merge with version 0.1" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"basis": "auto"}, {}),
        ({"basis": None, "kernels": 4}, {}),
        ({"basis": None, "rbf_init": 0.5, "kernels": 4}, {}),
        ({"basis": "rbf", "kernels": 4}, {"kernels": 4}),
        (
            {"basis": "rbf_grid", "kernels": 4, "generator": "elementwise"},
            {"kernels": 4, "generator": "elementwise"},
        ),
        (
            {"basis": "bspline", "kernels": 4, "bandwidth": 0.5},
            {"basis": "bspline", "kernels": 4, "bandwidth": 0.5},
        ),
    ],
)
def test_settings_of_basis_functions_mean_what_they_meant(changes, expected):
    older = settings_of("genlora") | changes
    cfg = config_from_json(older)
    shape = {"rank": 4, "alpha": 8.0, "group_size": 4, "targets": ["q_proj", "down_proj"]}
    assert cfg == gl.GenLoRAConfig(**shape, **expected)
    assert config_from_json(config_to_json(cfg)) == cfg
