"""Our own adapters' files, damaged or not finite, and the commands that read them."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_peft import FUZZ, damaged, outcome
from tiny_base import write_base

import genlora_jax as gl
from genlora_jax import cli

CFG = gl.GenLoRAConfig(rank=3, alpha=6.0, group_size=4, kernels=2, targets=["q_proj", "down_proj"])


@pytest.fixture
def saved(tmp_path):
    """A base, its parameters and the directory of an adapter for it."""
    base = write_base(tmp_path / "base")
    model, params = gl.load_llama(base, dtype=jnp.float32, param_dtype=jnp.float32)
    adapter = jax.jit(gl.init_adapter, static_argnums=0)(CFG, jax.random.key(0), params)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    gl.save_adapter(tmp_path / "adapter", CFG, adapter, model=model)
    return base, model, params, tmp_path / "adapter"


def test_damaged_settings_are_the_user_s_error(saved):
    _, model, params, path = saved
    file = path / "adapter.json"
    settings = json.loads(file.read_text())
    for name in sorted(settings["config"]):  # so that values of every field are replaced
        settings["config"].setdefault(name, None)

    @FUZZ
    @given(st.data(), st.booleans())
    def run(data, with_base):
        file.write_text(json.dumps(damaged(data, settings)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given_base = {"params": params, "model": model} if with_base else {}
            outcome(lambda: gl.load_adapter(path, **given_base), "adapter")

    run()
    for text in ("", "[]", "null", "3", "{", "[" * 100_000, "\udcff"):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises((ValueError, OSError), match=r"adapter\.json"):
            gl.load_adapter(path)
