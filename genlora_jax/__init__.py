"""GenLoRA in JAX / Flax: low-rank adapters whose basis vectors are generated."""

from genlora_jax.adapter import (
    Adapter,
    count_parameters,
    generate_factors,
    init_adapter,
)
from genlora_jax.combine import combine, stack
from genlora_jax.config import (
    AdapterConfig,
    DoRAConfig,
    FullConfig,
    GenLoRAConfig,
    LoRAConfig,
    PiSSAConfig,
    VeRAConfig,
)
from genlora_jax.fit import FitReport, fit
from genlora_jax.hf.export import export_hf
from genlora_jax.hf.load import load_llama
from genlora_jax.hf.peft import export_peft, import_peft
from genlora_jax.inject import apply
from genlora_jax.merge import merge, unmerge
from genlora_jax.storage import load_adapter, save_adapter

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "DoRAConfig",
    "FitReport",
    "FullConfig",
    "GenLoRAConfig",
    "LoRAConfig",
    "PiSSAConfig",
    "VeRAConfig",
    "apply",
    "combine",
    "count_parameters",
    "export_hf",
    "export_peft",
    "fit",
    "generate_factors",
    "import_peft",
    "init_adapter",
    "load_adapter",
    "load_llama",
    "merge",
    "save_adapter",
    "stack",
    "unmerge",
]
