"""What an import loads: each in a process of its own."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from genlora_jax.hf.checkpoint import model_config
from genlora_jax.hf.tokenizer import load_tokenizer
from genlora_jax.training import host_memory

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


COMMAND = """
import gc, importlib.util, sys
from pathlib import Path
from genlora_jax import __main__, cli
from genlora_jax.hf.checkpoint import model_config
from genlora_jax.hf.tokenizer import load_tokenizer
directory = Path(sys.argv[1])

def main():
    import genlora_jax.training.finetune
    print(model_config(directory))
    print(load_tokenizer(directory)("a b"))
    print("torch" in sys.modules, *({"transformers", "tensorboardX"} & {*sys.modules}))
    print(importlib.util.find_spec("torch") is not None, gc.get_threshold()[0])

cli.main = main
sys.argv = ["genlora", "finetune", "--config", "recipe.yaml"]
__main__.command()
"""


def test_a_command_reads_a_model_as_ever_and_loads_no_torch(torch_twin):
    directory, _ = torch_twin()
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    assert "torch" in sys.modules  # with which the expected values are read
    command = [sys.executable, "-c", COMMAND, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    config, tokens, modules, after = done.stdout.splitlines()
    assert config == repr(model_config(directory))
    assert tokens == repr(load_tokenizer(directory)("a b"))
    assert modules.split()[0] == "False"
    assert {*modules.split()[1:]} == {"transformers", "tensorboardX"}
    assert after == "True 10000"  # who imports it later finds it
    assert done.stderr == ""


STEPS = """
import resource, sys
import jax, jax.numpy as jnp
from genlora_jax import __main__, cli
from genlora_jax.training.host_memory import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def main():
    global step, x
    step, x = jax.jit(lambda x: (x @ x[:16]) @ x[:16, :1]), jnp.ones((2**19, 16))
    before = [faults() for _ in range(3)]
    keep_memory(jax.devices()[0])
    after = [faults() for _ in range(20)]
    print(*before, *after)

cli.main = main
sys.argv = ["genlora", "finetune", "--config", "recipe.yaml"]
__main__.command()
"""


def test_a_step_finds_the_memory_that_the_last_one_freed():
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, _, before, *after = map(int, done.stdout.split())
    assert min(after) < before / 10  # at times a step's results lie where its work would


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"), [(None, [], True), (None, [1], False), ("cpu", [1], True)]
)
def test_threads_share_a_heap_where_jax_has_cpus_alone(monkeypatch, platforms, plugins, expected):
    """Beside another device the host only reads data, which it may do in many threads."""
    options = []
    monkeypatch.setattr(host_memory, "_mallopt", lambda *option: options.append(option))
    monkeypatch.setattr(host_memory, "_one_heap", False)
    config = SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr(host_memory, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: plugins)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    host_memory.share_one_heap()
    assert bool(options) == expected
