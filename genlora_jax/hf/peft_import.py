"""From PEFT: LoRA, DoRA and HiRA adapters, as `peft` saves them, to factors."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from genlora_jax.adapter import generate_factors
from genlora_jax.adapter_files import load_adapter
from genlora_jax.factors import KINDS, LOW_RANK
from genlora_jax.factors.kind import Kind, Leaves
from genlora_jax.hf.checkpoint import read_json, refuse_pointers
from genlora_jax.hf.names import natural_order, tensors
from genlora_jax.hf.peft_export import PREFIX, SETTINGS, TENSORS

# Settings under which an adapter is more than factors on the base's kernels as they are.
REFUSED = (
    *("lora_bias", "use_qalora", "modules_to_save", "trainable_token_indices", "fan_in_fan_out"),
    *("layer_replication", "target_parameters", "alora_invocation_tokens", "velora_config"),
    *("monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
)
# Initialisations that subtract the initial delta from the base.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    refuse_pointers(path)
    settings = read_json(path / SETTINGS)
    _refuse_other_than_lora(path / SETTINGS, settings)
    kernels = {t.name.removesuffix(".weight"): t for t in tensors(params) if t.path[-1] == "kernel"}
    shapes = {path: leaf.shape for path, leaf in flatten_dict(dict(params)).items()}
    stacks: dict[tuple[str, ...], dict[int | None, Leaves]] = {}
    wanted = (settings["peft_type"], bool(settings.get("use_dora")))
    kind = next(kind for kind in KINDS if (kind.peft_type, kind.peft_dora) == wanted)
    found = _read_modules(path / TENSORS, kind)
    for name, leaves in sorted(found.items(), key=lambda item: natural_order(item[0])):
        if name not in kernels:
            raise ValueError(f"{path}: adapts {name}, which the base does not have")
        kernel = kernels[name]
        if not kind.fits(leaves, shape := shapes[kernel.path][-2:]):
            raise ValueError(
                f"{path}: {name} has factors {kind.describe(leaves)}; the base's kernel has shape "
                f"{shape}"
            )
        if "b" in leaves:  # HiRA knows no scale, and peft ignores its `rank_pattern`
            scale = _scale(path / SETTINGS, settings, name, leaves["a"].shape[1])
            leaves["b"] *= np.float32(scale)
        stacks.setdefault(kernel.path, {})[kernel.index] = leaves
    flat: dict[tuple[str, ...], Any] = {}
    for kernel_path, modules in stacks.items():
        for leaf, value in _stack(kind, modules, shapes[kernel_path]).items():
            flat[(*kernel_path[:-1], leaf)] = jnp.asarray(value)
    return unflatten_dict(flat)


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
            f"{file}: init_lora_weights = {init!r} changes the base's kernels: convert the "
            "adapter to plain LoRA with peft first"
        )


def _read_modules(file: Path, kind: Kind) -> dict[str, Leaves]:
    """The float32 factors of every module by its name, `[d_in, r]` and `[r, d_out]`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; pickled adapters are not read")
    try:
        arrays = load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    by_suffix = {suffix: (leaf, transposed) for leaf, (suffix, transposed) in kind.peft.items()}
    known = "|".join(map(re.escape, by_suffix))
    modules: dict[str, Leaves] = {}
    for name, value in arrays.items():
        parts = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({known})", name)
        if parts is None or value.ndim != (2 if by_suffix[parts[2]][1] else 1):
            plain = "plain LoRA" if kind is LOW_RANK else kind.name
            raise ValueError(f"{file}: tensor {name} is none of {plain} on a linear layer")
        leaf, _ = by_suffix[parts[2]]
        modules.setdefault(parts[1], {})[leaf] = value.astype(np.float32).T
    if not modules:
        raise ValueError(f"{file} holds no factors")
    for name, leaves in modules.items():
        for leaf, (suffix, _) in kind.peft.items():
            if leaf not in leaves:
                raise ValueError(f"{file}: {name} has no {suffix}")
    return modules


def _scale(file: Path, settings: Mapping[str, Any], name: str, rank: int) -> float:
    """The factor on a module's delta, by PEFT's rules for patterns."""

    def setting(field: str, pattern: str) -> Any:
        for key, value in (settings.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return settings[field]

    try:
        alpha, stated = setting("lora_alpha", "alpha_pattern"), setting("r", "rank_pattern")
    except KeyError as error:
        raise ValueError(f"{file}: field {error} is missing") from None
    if stated != rank:
        raise ValueError(f"{file}: gives {name} rank {stated}, but its factors have {rank}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _stack(kind: Kind, modules: Mapping[int | None, Leaves], shape: tuple[int, ...]) -> Leaves:
    """The factors of one kernel in the layout of the base."""
    if None in modules:
        return modules[None]
    rank = max(kind.rank(leaves) or 0 for leaves in modules.values())
    stacked: Leaves = {}
    for index, leaves in modules.items():
        for leaf, value in kind.padded(leaves, rank, np.pad).items():
            empty = np.zeros((shape[0], *value.shape), np.float32)
            stacked.setdefault(leaf, empty)[index] = value
    return stacked


def is_peft(path: str | Path) -> bool:
    """Whether a directory is a PEFT adapter's."""
    return (Path(path) / SETTINGS).is_file()


def load_factors(path: str | Path, params: Mapping[str, Any], model: Any = None) -> dict[str, Any]:
    """The factors of an adapter's directory, one of `save_adapter` or of PEFT."""
    if is_peft(path):
        return import_peft(path, params)
    cfg, adapter = load_adapter(path, params, model=model)
    return generate_factors(cfg, adapter)
