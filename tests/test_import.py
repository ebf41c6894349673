"""What an import loads: each in a process of its own."""

import subprocess
import sys

import pytest

PALLAS = "jax.experimental.pallas"
HEAVY = ("optax", "huggingface_hub", "safetensors", "transformers", "torch", "grain", PALLAS)


def loaded(statement):
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "light"),
    [
        ("import genlora_jax", HEAVY),
        ("from genlora_jax.models.llama import LlamaForCausalLM", HEAVY),
        ("from genlora_jax import load_llama, export_hf", ("huggingface_hub", PALLAS)),
    ],
)
def test_an_import_loads_nothing_heavy(statement, light):
    modules = loaded(statement)
    assert "genlora_jax" in modules
    assert not modules & set(light)


def test_splash_attention_loads_pallas_when_it_runs():
    arrays = "q = jnp.zeros((1, 128, 1, 8))"
    segments = "segments = jnp.ones((1, 128), int)"
    call = "jax.eval_shape(lambda: attend(q, q, q, None, 'splash', segments=segments))"
    modules = loaded(
        "import jax, jax.numpy as jnp\nfrom genlora_jax.models.attention import attend\n"
        f"{arrays}\n{segments}\n{call}"
    )
    assert PALLAS in modules
