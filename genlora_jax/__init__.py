"""GenLoRA in JAX / Flax: low-rank adapters whose basis vectors are generated."""

import importlib
from typing import TYPE_CHECKING, Any

from genlora_jax.adapter import Adapter, count_parameters, generate_factors, init_adapter
from genlora_jax.combine import combine, stack
from genlora_jax.inject import apply, inject
from genlora_jax.merge import merge, unmerge
from genlora_jax.methods import (
    DoRAConfig,
    FullConfig,
    GenLoRAConfig,
    LoRAConfig,
    NOLAConfig,
    PiSSAConfig,
    SineLoRAConfig,
    TiedLoRAConfig,
    UniLoRAConfig,
    VeRAConfig,
)
from genlora_jax.methods.config import AdapterConfig

if TYPE_CHECKING:
    from genlora_jax.adapter_files import load_adapter, save_adapter
    from genlora_jax.compression import compress, fit, lora_from_factors
    from genlora_jax.deltas import FitReport
    from genlora_jax.hf.export import export_hf
    from genlora_jax.hf.load import load_llama
    from genlora_jax.hf.peft_export import export_peft
    from genlora_jax.hf.peft_import import import_peft, load_peft

__version__ = "0.1.0"

# Imported at first use: they take libraries (optax, the hub's client, safetensors) that a notebook
# on generators does without.
_LAZY = {
    "load_adapter": "adapter_files",
    "save_adapter": "adapter_files",
    "FitReport": "deltas",
    "compress": "compression",
    "fit": "compression",
    "lora_from_factors": "compression",
    "export_hf": "hf.export",
    "load_llama": "hf.load",
    "export_peft": "hf.peft_export",
    "import_peft": "hf.peft_import",
    "load_peft": "hf.peft_import",
}

__all__ = [
    "Adapter",
    "AdapterConfig",
    "DoRAConfig",
    "FitReport",
    "FullConfig",
    "GenLoRAConfig",
    "LoRAConfig",
    "NOLAConfig",
    "PiSSAConfig",
    "SineLoRAConfig",
    "TiedLoRAConfig",
    "UniLoRAConfig",
    "VeRAConfig",
    "apply",
    "combine",
    "compress",
    "count_parameters",
    "export_hf",
    "export_peft",
    "fit",
    "generate_factors",
    "import_peft",
    "init_adapter",
    "inject",
    "load_adapter",
    "load_llama",
    "load_peft",
    "lora_from_factors",
    "merge",
    "save_adapter",
    "stack",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'genlora_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"genlora_jax.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
