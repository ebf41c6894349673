"""PEFT: factors as a plain LoRA adapter that `peft` and vLLM load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from genlora_jax.config import AdapterConfig
from genlora_jax.hf.names import natural_order
from genlora_jax.storage import new_directory

PREFIX = "base_model.model."


def _modules(factors: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A `[d_in, r]` and B `[r, d_out]` by the module's name, one entry a layer."""
    modules = {}
    flat = flatten_dict(dict(factors))
    for path in {path[:-1] for path in flat}:
        a, b = (np.asarray(flat[(*path, side)], dtype=np.float32) for side in "ab")
        if a.ndim == 2:
            modules[".".join(path)] = (a, b)
            continue
        at = path.index("layers") + 1
        for i in range(a.shape[0]):
            if a[i].any() or b[i].any():  # a layer that is not adapted has zeros in both
                modules[".".join([*path[:at], str(i), *path[at:]])] = (a[i], b[i])
    return dict(sorted(modules.items(), key=lambda item: natural_order(item[0])))


def export_peft(
    out_dir: str | Path,
    cfg: AdapterConfig | None,
    factors: Mapping[str, Any],
    *,
    base: str | Path,
    overwrite: bool = False,
) -> None:
    """Writes factors as a plain PEFT LoRA adapter.

    The scale is folded into B and `lora_alpha` set to the rank, so that a consumer which
    ignores rslora is right as well.

    Args:
        out_dir: The directory to make.
        cfg: The config that generated the factors, or None for factors from elsewhere.
        factors: The factors.
        base: Name or path of the base, for PEFT to find it.
        overwrite: Replace an existing directory.

    Raises:
        FileExistsError: If the directory exists and is not to be overwritten.
    """
    modules = _modules(factors)
    names = list(modules)
    if _everywhere(cfg, factors, len(modules)):  # `q_proj` and so on, as servers expect
        names = sorted({name.rsplit(".", 1)[-1] for name in modules})
    rank = max(a.shape[1] for a, _ in modules.values())
    tensors = {}
    for name, (a, b) in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b.T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": cfg.dropout if cfg else 0.0,
        "target_modules": names,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_directory(out_dir, overwrite=overwrite) as directory:
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _everywhere(cfg: AdapterConfig | None, factors: Mapping[str, Any], count: int) -> bool:
    """Whether each target is adapted in every layer of the base, as far as can be told."""
    if cfg is not None:
        return cfg.layers is None
    flat = flatten_dict(dict(factors))
    return count == sum(leaf.shape[0] for path, leaf in flat.items() if path[-1] == "a")
