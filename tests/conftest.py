"""What several test files build on: tiny bases, random and real."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the time goes into compiling the same small programs, of which each runs a few times: they
# need not be fast, and workers, subprocesses and later runs share them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # two thirds of the time
CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

# Devices for the tests of meshes; all others use the first.
jax.config.update("jax_num_cpu_devices", 8)
# No dtype and no rank changes unseen: what a user's strict program refuses fails here first.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def _random_leaf(rng, path, shape):
    """Numbers of a size with which activations neither vanish nor explode."""
    noise = rng.standard_normal(shape)
    if path[-1] == "kernel":
        return noise / np.sqrt(shape[-2])
    if path[-1] == "scale":
        return 1 + 0.1 * noise
    return noise if path[-1] == "embedding" else 0.1 * noise


def pytest_collection_modifyitems(items):
    """The long ones first: begun last, they would leave the other worker with nothing to do."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def random_llama():
    """A function that makes a tiny Linen model and random parameters for it."""

    def make(
        *, scan=True, seed=0, dtype=jnp.float32, remat="none", attention="auto", **changes
    ) -> tuple[LlamaForCausalLM, dict]:
        config = LlamaConfig(**(TINY | changes))
        options = {"dtype": dtype, "param_dtype": dtype, "remat": remat, "attention": attention}
        stacked = flatten_dict(parameter_shapes(LlamaForCausalLM(config, scan=True)))
        rng = np.random.default_rng(seed)
        flat = {
            path: jnp.asarray(_random_leaf(rng, path, leaf.shape), dtype)
            for path, leaf in sorted(stacked.items())
        }
        if not scan:  # the same numbers, a layer at a time
            flat = {
                place: value
                for path, leaf in flat.items()
                for place, value in _unstack(path, leaf).items()
            }
        return LlamaForCausalLM(config, scan=scan, **options), unflatten_dict(flat)

    return make


def _unstack(path, leaf):
    if "layers" not in path:
        return {path: leaf}
    at = path.index("layers") + 1
    return {(*path[:at], str(i), *path[at:]): leaf[i] for i in range(leaf.shape[0])}


@pytest.fixture(scope="session")
def unstack():
    """A function that cuts a scanned tree into the layers of an unrolled one."""

    def cut(tree):
        flat = flatten_dict(tree)
        return unflatten_dict(
            {
                new: value
                for path, leaf in flat.items()
                for new, value in _unstack(path, leaf).items()
            }
        )

    return cut


@pytest.fixture(scope="session")
def perturb():
    """A function that moves every leaf of a pytree by some noise."""

    def move(tree, seed=0, size=0.1):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: leaf + jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype),
            tree,
        )

    return move


@pytest.fixture
def torch_twin(tmp_path):
    """A function that saves a tiny random PyTorch model; returns its directory and the model."""
    import torch
    import transformers

    def make(name="base", *, family="llama", seed=0, dtype=None, max_shard_size="1GB", **changes):
        torch.manual_seed(seed)
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        settings = TINY | ids | {"initializer_range": 0.2} | changes
        config = transformers.CONFIG_MAPPING[family](**settings)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases, which start out as ones and zeros
                    parameter.add_(0.1 * torch.randn_like(parameter))
        if dtype is not None:
            model = model.to(dtype)
        model.save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        return tmp_path / name, model

    return make


@pytest.fixture(scope="session")
def torch_logits():
    """A function that gives a PyTorch model's logits as a NumPy array."""
    import torch

    def logits(model, ids, **inputs):
        tensors = {key: torch.from_numpy(np.array(value)) for key, value in inputs.items()}
        with torch.no_grad():
            return model(torch.from_numpy(np.array(ids)).long(), **tensors).logits.float().numpy()

    return logits


@pytest.fixture
def run_main(monkeypatch, capsys):
    """A function that runs a script's `main`: returns exit status, stdout and stderr."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models, adapters and data, which lie next to the repository."""
    root = Path(__file__).resolve().parent.parent
    return root / os.environ.get("GENLORA_SHARED", "../shared")
