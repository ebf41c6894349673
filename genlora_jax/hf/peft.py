"""PEFT: LoRA, DoRA and HiRA adapters, as `peft` loads them, out of factors and into them."""

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
from genlora_jax.factors import by_module, describe, fits, side_a
from genlora_jax.hf.checkpoint import read_json
from genlora_jax.hf.names import natural_order, tensors
from genlora_jax.storage import load_adapter, new_directory

Arrays = dict[str, np.ndarray]
PREFIX = "base_model.model."
TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
SERVED_RANK = 512  # the last of the choices for vLLM's `max_lora_rank`
# Our leaf -> (their tensor, whether theirs is the transpose of ours).
LEAVES = {
    "a": ("lora_A.weight", True),
    "b": ("lora_B.weight", True),
    "magnitude": ("lora_magnitude_vector", False),
    "gain_a": ("hira_A", True),
    "gain_b": ("hira_B", True),
}
OURS = {theirs: leaf for leaf, (theirs, _) in LEAVES.items()}
KINDS = {"LoRA": ("a", "b"), "DoRA": ("a", "b", "magnitude"), "HiRA": ("gain_a", "gain_b")}
# Settings under which an adapter is more than these on the base's own kernels.
REFUSED = (
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


def _modules(factors: Mapping[str, Any]) -> dict[str, Arrays]:
    """The factors of every adapted module, by its name: one entry a layer."""
    modules: dict[str, Arrays] = {}
    for path, leaves in by_module(factors).items():
        if "delta" in leaves:
            raise ValueError(
                f"{'.'.join(path)} has a whole delta (full fine-tuning), which is no LoRA adapter: "
                "merge it and write the model with export_hf"
            )
        own = {leaf: np.asarray(value, dtype=np.float32) for leaf, value in leaves.items()}
        if side_a(own).ndim == 2:
            modules[".".join(path)] = own
            continue
        at = path.index("layers") + 1
        for i in range(len(side_a(own))):
            layer = {leaf: value[i] for leaf, value in own.items()}
            if any(value.any() for value in layer.values()):  # else the layer is not adapted
                modules[".".join([*path[:at], str(i), *path[at:]])] = layer
    return dict(sorted(modules.items(), key=lambda item: natural_order(item[0])))


def export_peft(
    out_dir: str | Path,
    cfg: AdapterConfig | None,
    factors: Mapping[str, Any],
    *,
    base: str | Path,
    overwrite: bool = False,
) -> None:
    """Writes factors as a plain PEFT LoRA adapter; as DoRA or HiRA if there are such leaves.

    That is, if they have magnitudes, or gains (`hadamard=True`). The scale is folded into B and
    `lora_alpha` set to the rank, so that a consumer which ignores rslora is right as well. Factors
    of several ranks are padded with zeros to the largest.

    Args:
        out_dir: The directory to make.
        cfg: The config that generated the factors, or None for factors from elsewhere.
        factors: The factors.
        base: Name or path of the base, for PEFT to find it.
        overwrite: Replace an existing directory.

    Raises:
        FileExistsError: If the directory exists and is not to be overwritten.
        ValueError: If a factor is a whole delta, or modules have leaves of several kinds.
    """
    modules = _modules(factors)
    names = list(modules)
    if _everywhere(cfg, factors, len(modules)):  # `q_proj` and so on, as servers expect
        names = sorted({name.rsplit(".", 1)[-1] for name in modules})
    rank = max(side_a(own).shape[1] for own in modules.values())
    kind = _kind_of(modules)
    if kind == "LoRA" and rank > SERVED_RANK:
        warnings.warn(
            f"rank {rank} exceeds {SERVED_RANK}, the largest that vLLM serves: merge instead",
            stacklevel=2,
        )
    arrays = {}
    for name, own in modules.items():
        # One rank for all: servers know no `rank_pattern`.
        padded = _padded(own, rank)
        for leaf, value in padded.items():
            theirs, transposed = LEAVES[leaf]
            value = value.T if transposed else value
            arrays[f"{PREFIX}{name}.{theirs}"] = np.ascontiguousarray(value)
    dropout = cfg.dropout if cfg else 0.0
    config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "target_modules": names,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if kind == "HiRA":
        config |= {"peft_type": "HIRA", "hira_dropout": dropout}
    else:
        config |= {
            "peft_type": "LORA",
            "lora_alpha": rank,
            "lora_dropout": dropout,
            "use_rslora": False,
            "use_dora": kind == "DoRA",
            "bias": "none",
        }
    with new_directory(out_dir, overwrite=overwrite) as directory:
        save_file(arrays, directory / TENSORS, metadata={"format": "pt"})
        (directory / SETTINGS).write_text(json.dumps(config, indent=1) + "\n")


def _kind_of(modules: Mapping[str, Arrays]) -> str:
    """The one kind of adapter that modules are."""
    first, *others = modules
    for name in others:
        if set(modules[name]) != set(modules[first]):
            raise ValueError(
                f"{name} has {sorted(modules[name])} and {first} {sorted(modules[first])}: a PEFT "
                "adapter is of one kind"
            )
    return next(kind for kind, leaves in KINDS.items() if set(leaves) == set(modules[first]))


def _padded(own: Arrays, rank: int) -> Arrays:
    """The factors with zeros up to a rank."""
    missing = (0, rank - side_a(own).shape[1])
    widths = {"a": ((0, 0), missing), "b": (missing, (0, 0))}
    return {
        leaf: np.pad(value, widths[leaf.removeprefix("gain_")]) if value.ndim == 2 else value
        for leaf, value in own.items()
    }


def _everywhere(cfg: AdapterConfig | None, factors: Mapping[str, Any], count: int) -> bool:
    """Whether each target is adapted in every layer of the base, as far as can be told."""
    if cfg is not None:
        return cfg.layers is None
    flat = flatten_dict(dict(factors))
    sides = ("a", "gain_a")
    return count == sum(leaf.shape[0] for path, leaf in flat.items() if path[-1] in sides)


def import_peft(path: str | Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a plain PEFT LoRA, DoRA or HiRA adapter into factors.

    They apply, merge and export as generated ones do. Modules of one stack that differ in rank
    (`rank_pattern`) are padded with zeros to the largest.

    Args:
        path: The adapter's directory.
        params: The base's parameters; only names and shapes matter, so the result of
            `jax.eval_shape` will do.

    Returns:
        A tree that mirrors `params`, float32, with the scale (`lora_alpha`, `alpha_pattern`,
        `use_rslora`) folded into b; HiRA's are `gain_a` and `gain_b`. Layers that the adapter
        leaves alone have zeros.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the adapter is none of these (the setting is named), is damaged, or was
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
    stacks: dict[tuple[str, ...], dict[int | None, Arrays]] = {}
    lora = "DoRA" if settings.get("use_dora") else "LoRA"
    found = _read_modules(path / TENSORS, "HiRA" if settings["peft_type"] == "HIRA" else lora)
    for name, own in sorted(found.items(), key=lambda item: natural_order(item[0])):
        if name not in kernels:
            raise ValueError(f"{path}: adapts {name}, which the base does not have")
        kernel = kernels[name]
        if not fits(own, shapes[kernel.path][-2:]):
            raise ValueError(
                f"{path}: {name} has factors {describe(own)}; the base's kernel has shape "
                f"{shapes[kernel.path][-2:]}"
            )
        if "b" in own:  # HiRA knows no scale, and peft ignores its `rank_pattern`
            own["b"] *= np.float32(_scale(path / SETTINGS, settings, name, own["a"].shape[1]))
        stacks.setdefault(kernel.path, {})[kernel.index] = own
    flat: dict[tuple[str, ...], Any] = {}
    for kernel_path, modules in stacks.items():
        for leaf, value in _stack(modules, shapes[kernel_path]).items():
            flat[(*kernel_path[:-1], leaf)] = jnp.asarray(value)
    return unflatten_dict(flat)


def is_peft(path: str | Path) -> bool:
    """Whether a directory is a PEFT adapter's."""
    return (Path(path) / SETTINGS).is_file()


def load_factors(path: str | Path, params: Mapping[str, Any], model: Any = None) -> dict[str, Any]:
    """The factors of an adapter's directory, ours (see `load_adapter`) or a PEFT LoRA adapter's."""
    if is_peft(path):
        return import_peft(path, params)
    cfg, adapter = load_adapter(path, params, model=model)
    return generate_factors(cfg, adapter)


def _refuse_other_than_lora(file: Path, settings: Mapping[str, Any]) -> None:
    if (kind := settings.get("peft_type")) not in ("LORA", "HIRA"):
        raise ValueError(f"{file}: peft_type {kind!r} is not supported; LORA and HIRA are")
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


def _read_modules(file: Path, kind: str) -> dict[str, Arrays]:
    """The factors of every module in float32, by its name, in our layout."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; pickled adapters are not read")
    try:
        arrays = load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    expected = KINDS[kind]
    known = "|".join(re.escape(LEAVES[leaf][0]) for leaf in expected)
    modules: dict[str, Arrays] = {}
    for name, value in arrays.items():
        parts = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({known})", name)
        if parts is None or value.ndim != (2 if LEAVES[OURS[parts[2]]][1] else 1):
            said = "plain LoRA" if kind == "LoRA" else kind
            raise ValueError(f"{file}: tensor {name} is none of {said} on a linear layer")
        modules.setdefault(parts[1], {})[OURS[parts[2]]] = value.astype(np.float32).T
    if not modules:
        raise ValueError(f"{file} holds no factors")
    for name, own in modules.items():
        for leaf in expected:
            if leaf not in own:
                raise ValueError(f"{file}: {name} has no {LEAVES[leaf][0]}")
    return modules


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


def _stack(modules: Mapping[int | None, Arrays], shape: tuple[int, ...]) -> Arrays:
    """The factors of one kernel in the layout of the base."""
    if None in modules:
        return modules[None]
    rank = max(side_a(own).shape[1] for own in modules.values())
    whole: Arrays = {}
    for index, own in modules.items():
        for leaf, value in _padded(own, rank).items():
            empty = np.zeros((shape[0], *value.shape), np.float32)
            whole.setdefault(leaf, empty)[index] = value
    return whole
