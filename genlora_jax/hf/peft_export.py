"""To PEFT: factors as LoRA, DoRA and HiRA adapters, which `peft` and vLLM load."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from genlora_jax.atomic_files import new_directory
from genlora_jax.base.quantise import Quantisation
from genlora_jax.factors import by_module
from genlora_jax.factors.kind import Kind, Leaves
from genlora_jax.hf.checkpoint import CONFIG
from genlora_jax.hf.names import module_name, natural_order
from genlora_jax.hf.peft_tensors import PREFIX
from genlora_jax.hf.tokenizer import GENERATION, changed_generation_config, copy_tokenizer
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.storage import storage_path

TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
FRONT_MATTER = """---
base_model: {base}
library_name: peft
---

"""
MODEL_CARD = """Trained on {base} with its kernels quantised to {form}.
Load the base in that form, or merge the adapter onto kernels dequantised from it: on the original
ones it is a little off.
"""
SERVED_RANK = 512  # the last of the choices for vLLM's `max_lora_rank`


def export_peft(
    out_dir: str | Path,
    cfg: AdapterConfig | None,
    factors: Mapping[str, Any],
    *,
    base: str | Path,
    adapter: str | Path | None = None,
    quantisation: Quantisation | None = None,
    overwrite: bool = False,
) -> None:
    """Writes factors as a PEFT adapter: LoRA; DoRA or HiRA if the factors are of that kind.

    The scale is folded into B, and `lora_alpha` is the rank: consumers that ignore `use_rslora` are
    then right as well. Factors of several ranks are padded with zeros to the largest. The tokenizer
    of a base that is a local directory goes along, as from trainers on top of PEFT, and where the
    base's generation config lacks a token that ends a text in training, one that has it.

    Args:
        out_dir: The directory to make.
        cfg: The config that generated the factors, or None for factors from elsewhere.
        factors: The factors.
        base: Name or path of the base, for PEFT to find it.
        adapter: Directory of the adapter, for a tokenizer or chat template of its own.
        quantisation: How the base was quantised that the factors were trained on: an adapter's
            `spec.quantisation`. PEFT's config has no field for it; a `README.md` says it.
        overwrite: Replace an existing directory.

    Raises:
        FileExistsError: If the directory exists and is not to be overwritten.
        ValueError: If PEFT has no such factors (whole deltas), modules differ in kind, a number is
            not finite, or the tokenizer does not fit the base.
    """
    source = storage_path(base) if base and (storage_path(base) / CONFIG).is_file() else None
    generation = changed_generation_config(source, adapter) if source else None
    kind, modules = _modules(factors)
    names = list(modules)
    if _in_every_layer(cfg, factors, len(modules)):  # `q_proj` and so on, as servers expect
        names = sorted({name.rsplit(".", 1)[-1] for name in modules})
    rank = max(kind.rank(leaves) or 0 for leaves in modules.values())
    if kind.peft_type == "LORA" and not kind.peft_dora and rank > SERVED_RANK:
        warnings.warn(
            f"rank {rank} exceeds {SERVED_RANK}, the largest that vLLM serves: merge instead",
            stacklevel=2,
        )
    arrays = {}
    for name, leaves in modules.items():
        # One rank for all: servers know no `rank_pattern`.
        for leaf, value in kind.padded(leaves, rank, np.pad).items():
            suffix, transposed = kind.peft[leaf]
            value = value.T if transposed else value
            if not np.isfinite(value).all():
                raise ValueError(
                    f"{PREFIX}{name}.{suffix} holds a NaN or an infinity, and is not exported"
                )
            arrays[f"{PREFIX}{name}.{suffix}"] = np.ascontiguousarray(value)
    config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "target_modules": names,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    dropout = cfg.dropout if cfg else 0.0
    if kind.peft_type == "HIRA":
        config |= {"peft_type": "HIRA", "hira_dropout": dropout}
    else:
        config |= {"peft_type": "LORA", "lora_alpha": rank, "lora_dropout": dropout}
        config |= {"use_rslora": False, "use_dora": kind.peft_dora, "bias": "none"}
    with new_directory(out_dir, overwrite=overwrite) as directory:
        save_file(arrays, directory / TENSORS, metadata={"format": "pt"})
        if quantisation is not None:
            card = MODEL_CARD.format(base=base or "a base", form=quantisation)
            if base:
                card = FRONT_MATTER.format(base=base) + card
            (directory / "README.md").write_text(card)
        (directory / SETTINGS).write_text(json.dumps(config, indent=1) + "\n")
        if generation:
            (directory / GENERATION).write_text(json.dumps(generation, indent=1) + "\n")
        if source:
            copy_tokenizer(source, adapter, directory)


def _modules(factors: Mapping[str, Any]) -> tuple[Kind, dict[str, Leaves]]:
    """The one kind of the factors, and the leaves of each adapted module: one entry a layer."""
    modules: dict[str, Leaves] = {}
    kinds: dict[Kind, str] = {}
    for path, (kind, leaves) in by_module(factors).items():
        kinds.setdefault(kind, ".".join(path))
        if not kind.peft:
            raise ValueError(
                f"{'.'.join(path)} has a whole delta ({kind.option}), which is no LoRA adapter: "
                "merge it and write the model with export_hf"
            )
        arrays = {leaf: np.asarray(value, dtype=np.float32) for leaf, value in leaves.items()}
        leaf, axes = next(iter(kind.axes.items()))
        if arrays[leaf].ndim == len(axes):
            modules[module_name(path, None)] = arrays
            continue
        for i in range(len(arrays[leaf])):
            layer = {leaf: value[i] for leaf, value in arrays.items()}
            if any(value.any() for value in layer.values()):  # else the layer is not adapted
                modules[module_name(path, i)] = layer
    if len(kinds) > 1:
        found = " and ".join(f"{kind.name} ({name})" for kind, name in kinds.items())
        raise ValueError(f"a PEFT adapter is of one kind; these factors are {found}")
    ordered = sorted(modules.items(), key=lambda item: natural_order(item[0]))
    return next(iter(kinds)), dict(ordered)


def _in_every_layer(cfg: AdapterConfig | None, factors: Mapping[str, Any], count: int) -> bool:
    """Whether each target is adapted in every layer of the base, as far as can be told."""
    if cfg is not None:
        return cfg.layers is None
    modules = by_module(factors).values()
    return count == sum(leaves[next(iter(kind.axes))].shape[0] for kind, leaves in modules)
