"""PEFT: plain LoRA adapters, as `peft` and vLLM load them, out of factors and into them."""

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from genlora_jax.adapter import generate_factors
from genlora_jax.config import AdapterConfig
from genlora_jax.hf.checkpoint import read_json
from genlora_jax.hf.names import natural_order, tensors
from genlora_jax.storage import load_adapter, new_directory

PREFIX = "base_model.model."
TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
SERVED_RANK = 512  # the last of the choices for vLLM's `max_lora_rank`
# Settings under which an adapter is more than A and B on the base's own kernels.
REFUSED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "velora_config",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
# Initialisations that subtract the initial delta from the base.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    ignores rslora is right as well. Factors of several ranks are padded with zeros to the largest.

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
    if rank > SERVED_RANK:
        warnings.warn(
            f"rank {rank} exceeds {SERVED_RANK}, the largest that vLLM serves: merge instead",
            stacklevel=2,
        )
    arrays = {}
    for name, (a, b) in modules.items():
        missing = (0, rank - a.shape[1])  # one rank for all: servers know no `rank_pattern`
        arrays[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(
            np.pad(a.T, (missing, (0, 0)))
        )
        arrays[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(
            np.pad(b.T, ((0, 0), missing))
        )
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
        save_file(arrays, directory / TENSORS, metadata={"format": "pt"})
        (directory / SETTINGS).write_text(json.dumps(config, indent=1) + "\n")


def _everywhere(cfg: AdapterConfig | None, factors: Mapping[str, Any], count: int) -> bool:
    """Whether each target is adapted in every layer of the base, as far as can be told."""
    if cfg is not None:
        return cfg.layers is None
    flat = flatten_dict(dict(factors))
    return count == sum(leaf.shape[0] for path, leaf in flat.items() if path[-1] == "a")


def import_peft(path: str | Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a plain PEFT LoRA adapter into factors.

    They apply, merge and export as generated ones do. Modules of one stack that differ in rank
    (`rank_pattern`) are padded with zeros to the largest.

    Args:
        path: The adapter's directory.
        params: The base's parameters; only names and shapes matter, so the result of
            `jax.eval_shape` will do.

    Returns:
        A tree that mirrors `params`, float32, with the scale (`lora_alpha`, `alpha_pattern`,
        `use_rslora`) folded into b. Layers that the adapter leaves alone have zeros.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the adapter is not plain LoRA (the setting is named), is damaged, or was
            made for modules or shapes that the base does not have.
    """
    path = Path(path)
    settings = read_json(path / SETTINGS)
    _refuse_other_than_lora(path / SETTINGS, settings)
    kernels = {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in tensors(params)
        if tensor.path[-1] == "kernel"
    }
    shapes = {path: leaf.shape for path, leaf in flatten_dict(dict(params)).items()}
    stacks: dict[tuple[str, ...], dict[int | None, tuple[np.ndarray, np.ndarray]]] = {}
    for name, (a, b) in sorted(
        _read_pairs(path / TENSORS).items(), key=lambda item: natural_order(item[0])
    ):
        if name not in kernels:
            raise ValueError(f"{path}: adapts {name}, which the base does not have")
        kernel = kernels[name]
        shape = (a.shape[0], b.shape[1])
        if shapes[kernel.path][-2:] != shape or a.shape[1] != b.shape[0]:
            raise ValueError(
                f"{path}: {name} has factors {a.shape} and {b.shape}; the base's kernel has shape "
                f"{shapes[kernel.path][-2:]}"
            )
        scale = _scale(path / SETTINGS, settings, name, a.shape[1])
        stacks.setdefault(kernel.path, {})[kernel.index] = (a, b * np.float32(scale))
    flat: dict[tuple[str, ...], Any] = {}
    for kernel_path, pairs in stacks.items():
        sides = _stack(pairs, shapes[kernel_path])
        flat |= {(*kernel_path[:-1], side): jnp.asarray(sides[side]) for side in "ab"}
    return unflatten_dict(flat)


def load_factors(path: str | Path, params: Mapping[str, Any], model: Any = None) -> dict[str, Any]:
    """The factors of an adapter's directory, ours (see `load_adapter`) or a PEFT LoRA adapter's."""
    if (Path(path) / SETTINGS).is_file():
        return import_peft(path, params)
    cfg, adapter = load_adapter(path, params, model=model)
    return generate_factors(cfg, adapter)


def _refuse_other_than_lora(file: Path, settings: Mapping[str, Any]) -> None:
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"{file}: peft_type {kind!r} is not supported; LORA is")
    for field in REFUSED:
        if settings.get(field):
            raise ValueError(f"{file}: {field} = {settings[field]!r} is not supported")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias = {settings['bias']!r} is not supported; none is")
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING):
        raise ValueError(
            f"{file}: init_lora_weights = {init!r} changes the base's own kernels: convert the "
            "adapter to plain LoRA with peft first"
        )


def _read_pairs(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A `[d_in, r]` and B `[r, d_out]` in float32 by the module's name."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; pickled adapters are not read")
    try:
        arrays = load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    sides: dict[str, dict[str, np.ndarray]] = {}
    for name, value in arrays.items():
        parts = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
        if parts is None or value.ndim != 2:
            raise ValueError(f"{file}: tensor {name} is none of plain LoRA on a linear layer")
        sides.setdefault(parts[1], {})[parts[2]] = value.astype(np.float32).T
    if not sides:
        raise ValueError(f"{file} holds no factors")
    for name, pair in sides.items():
        if len(pair) != 2:
            raise ValueError(f"{file}: {name} has only one of lora_A and lora_B")
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}


def _scale(file: Path, settings: Mapping[str, Any], name: str, rank: int) -> float:
    """The factor on a module's delta, by PEFT's rules for patterns."""

    def setting(field: str, pattern: str) -> Any:
        for key, value in (settings.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return settings[field]

    try:
        alpha, said = setting("lora_alpha", "alpha_pattern"), setting("r", "rank_pattern")
    except KeyError as error:
        raise ValueError(f"{file}: field {error} is missing") from None
    if said != rank:
        raise ValueError(f"{file}: gives {name} rank {said}, but its factors have {rank}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _stack(
    pairs: Mapping[int | None, tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The factors of one kernel in the layout of the base."""
    if None in pairs:
        a, b = pairs[None]
        return {"a": a, "b": b}
    rank = max(a.shape[1] for a, _ in pairs.values())
    whole = {
        "a": np.zeros((shape[0], shape[1], rank), np.float32),
        "b": np.zeros((shape[0], rank, shape[2]), np.float32),
    }
    for index, (a, b) in pairs.items():
        whole["a"][index, :, : a.shape[1]] = a
        whole["b"][index, : b.shape[0]] = b
    return whole
