"""Settings of JAX for all tests, and the fixtures that several test files use."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the time goes into compiling the same small programs, of which each runs a few times: they
# need not be fast, and workers, subprocesses and later runs share them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # two thirds of the time
# A collective of the eight devices blocks a thread of each while it waits, and a step may have
# several: with eight threads in all, as by default, a loaded machine deadlocks.
os.environ.setdefault("NPROC", "32")
CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import pytest

# Devices for the tests of meshes; all others use the first.
jax.config.update("jax_num_cpu_devices", 8)
# No dtype and no rank changes unseen: what a user's strict program refuses fails here first.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from tiny_models import TINY

# The same examples in every run. `make soak` looks for new ones.
hypothesis.settings.register_profile("suite", derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """The long ones first: begun last, they would leave the other worker with nothing to do."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


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
