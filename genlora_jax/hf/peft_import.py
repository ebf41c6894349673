"""From PEFT: LoRA, DoRA and HiRA adapters, as `peft` saves them, to factors."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.adapter import generate_factors
from genlora_jax.adapter_files import load_adapter
from genlora_jax.factors import KINDS, LOW_RANK
from genlora_jax.factors.kind import Kind, Leaves
from genlora_jax.hf.checkpoint import refuse_pointers
from genlora_jax.hf.names import natural_order, tensors
from genlora_jax.hf.peft_base import (
    EMBEDDING_A,
    EMBEDDING_B,
    TOKENS,
    BaseChanges,
    base_changes,
    change_base,
    parts_head,
)
from genlora_jax.hf.peft_export import SETTINGS, TENSORS
from genlora_jax.hf.peft_settings import EMBEDDING, HEAD, PeftSettings, read_settings
from genlora_jax.hf.peft_tensors import PREFIX, Parts, read_tensors
from genlora_jax.models.llama import LlamaForCausalLM
from genlora_jax.storage import storage_path
from genlora_jax.validation import listed

SIDES = ("_A", "_B")


def import_peft(path: str | Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a plain PEFT LoRA, DoRA or HiRA adapter into factors.

    They apply, merge and export as generated ones do. Modules of one stack that differ in rank
    (`rank_pattern`) are padded with zeros to the largest.

    Args:
        path: The adapter's directory.
        params: The base's parameters. Unless the adapter carries tensors of the base, only names
            and shapes matter, so the result of `jax.eval_shape` will do.

    Returns:
        A tree that mirrors `params`, float32, with the scale (`lora_alpha`, `alpha_pattern`,
        `use_rslora`) folded into b; HiRA's are `gain_a` and `gain_b`. Layers that the adapter
        leaves alone have zeros.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the adapter is none of these (the setting is named), is damaged or
            incomplete, or was made for modules or shapes that the base does not have; or if it
            changes the base as well, which `load_peft` takes over.
    """
    with_head, factors, changes = _read(storage_path(path), params)
    changed = change_base(with_head, changes)[1]
    if len(with_head) > len(params):
        changed.append(HEAD)
    if changed:
        raise ValueError(
            f"{path} changes the base's {listed(changed)} beside its factors: load it with "
            "gl.load_peft, or merge it (genlora merge) and go on from the merged model"
        )
    return factors


def load_peft(
    path: str | Path, model: LlamaForCausalLM, params: Mapping[str, Any]
) -> tuple[LlamaForCausalLM, Any, dict[str, Any]]:
    """Reads a PEFT adapter that may change the base as well: `modules_to_save` and the like.

    Whole tensors (an embedding, a head, norms, biases) take the place of the base's, rows of
    `trainable_token_indices` are set, and LoRA on the embedding is merged into it. A head that is
    tied to the embedding becomes one of its own where the adapter changes one of the two alone. A
    warning names what is no longer the base's.

    Args:
        path: The adapter's directory.
        model: The base's model.
        params: The base's parameters.

    Returns:
        The model and the base's parameters with these changes, and the factors that `import_peft`
        describes.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: As `import_peft`, but for what changes the base.
    """
    with_head, factors, changes = _read(storage_path(path), params)
    changed_params, changed = change_base(with_head, changes)
    if len(with_head) > len(params):
        config = dataclasses.replace(model.config, tie_word_embeddings=False)
        model = model.clone(config=config)
        changed.append(f"{HEAD}, which was tied to the embedding")
    if changed:
        warnings.warn(f"{path} changes the base's {listed(changed)}", stacklevel=2)
    return model, changed_params, factors


def _read(
    path: Path, params: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, Any], BaseChanges]:
    """The base, with a head of its own if the adapter needs it; factors; changes of the base."""
    refuse_pointers(path)
    settings = read_settings(path / SETTINGS)
    if settings.get("fan_in_fan_out"):
        warnings.warn(
            f"{settings.file}: fan_in_fan_out is for Conv1D, which the base has none of: taken as "
            "false, as peft does",
            stacklevel=3,
        )
    parts, whole = read_tensors(path / TENSORS)
    if parts_head(settings, parts, whole, HEAD in params):
        params = {**params, HEAD: {"kernel": _head_of_embedding(params)}}
    flat = flatten_dict(dict(params))
    places = {t.name: t for t in tensors(params)}
    shapes = {name: t.shape_in_file(flat[t.path].shape) for name, t in places.items()}
    kernels = {n.removesuffix(".weight"): t for n, t in places.items() if t.path[-1] == "kernel"}
    kind = _kind(settings)
    ranks = _check_parts(path / TENSORS, settings, kind, parts)
    _check_modules(path, settings, set(ranks), kernels)
    stacks: dict[tuple[str, ...], dict[int | None, Leaves]] = {}
    scales = settings.scales(ranks)
    for name in sorted(set(ranks) - {EMBEDDING}, key=natural_order):
        leaves = _leaves(path, kind, name, parts[name], scales[name])
        kernel = kernels[name]
        if not kind.fits(leaves, shape := flat[kernel.path].shape[-2:]):
            raise ValueError(
                f"{path}: {name} has factors {kind.describe(leaves)}; the base's kernel has shape "
                f"{shape}"
            )
        stacks.setdefault(kernel.path, {})[kernel.index] = leaves
    factors: dict[tuple[str, ...], Any] = {}
    for kernel_path, modules in stacks.items():
        for leaf, value in _stack(kind, modules, flat[kernel_path].shape).items():
            factors[(*kernel_path[:-1], leaf)] = jnp.asarray(value)
    changes = base_changes(path / TENSORS, settings, parts, whole, scales, shapes)
    return params, unflatten_dict(factors), changes


def _kind(settings: PeftSettings) -> Kind:
    wanted = (settings.get("peft_type"), bool(settings.get("use_dora")))
    return next(kind for kind in KINDS if (kind.peft_type, kind.peft_dora) == wanted)


def read_modules(path: str | Path) -> tuple[PeftSettings, Kind, dict[str, Leaves], list[str]]:
    """What a PEFT adapter holds, without its base.

    Returns:
        Its settings, the kind of its factors, those of each linear module by its name, and the
        names of what else it holds.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the adapter is damaged, or not of a kind that `import_peft` reads.
    """
    path = storage_path(path)
    settings = read_settings(path / SETTINGS)
    parts, whole = read_tensors(path / TENSORS)
    kind = _kind(settings)
    ranks = _check_parts(path / TENSORS, settings, kind, parts)
    scales = settings.scales(ranks)
    modules = {
        name: _leaves(path, kind, name, parts[name], scales[name])
        for name in sorted(set(ranks) - {EMBEDDING}, key=natural_order)
    }
    return settings, kind, modules, sorted([*whole, *(set(parts) - set(modules))])


def _head_of_embedding(params: Mapping[str, Any]) -> Any:
    embedding = params["model"]["embed_tokens"]["embedding"]
    if isinstance(embedding, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(embedding.shape[::-1], embedding.dtype)
    return embedding.T


def _leaves(path: Path, kind: Kind, name: str, found: Mapping[str, Any], scale: float) -> Leaves:
    """A module's factors in our layout, with the scale folded in."""
    leaves = {
        leaf: found[part].T if transposed else found[part]
        for leaf, (part, transposed) in kind.peft.items()
    }
    if "b" in leaves:
        with np.errstate(over="ignore"):
            leaves["b"] = leaves["b"] * np.float32(scale)
        if not np.isfinite(leaves["b"]).all():
            raise ValueError(f"{path}: lora_B of {name} times its scale {scale:g} leaves float32")
    return leaves


def _check_parts(file: Path, settings: PeftSettings, kind: Kind, parts: Parts) -> dict[str, int]:
    """Checks that each module has the parts of its kind, and no others; returns the ranks."""
    plain = "plain LoRA" if kind is LOW_RANK else kind.name
    needed = {part for part, _ in kind.peft.values()}
    if settings.get("lora_bias"):
        needed.add("lora_B.bias")
    if not parts:
        raise ValueError(f"{file} holds no factors")
    ranks = {}
    for module, found in parts.items():
        if not (names := set(found) - {TOKENS}) and module in (EMBEDDING, HEAD):
            continue
        embeds = module == EMBEDDING and kind is LOW_RANK
        expected = {EMBEDDING_A, EMBEDDING_B} if embeds else needed
        if unknown := names - expected:
            raise ValueError(
                f"{file}: tensor {PREFIX}{module}.{min(unknown)} is none of {plain} on a linear "
                "layer with these settings"
            )
        if missing := expected - names:
            setting = " (lora_bias is true)" if "lora_B.bias" in missing else ""
            raise ValueError(f"{file}: {module} has no {min(missing)}{setting}")
        a, b = (next(found[part] for part in sorted(expected) if side in part) for side in SIDES)
        if embeds and a.shape[0] != b.shape[1]:
            raise ValueError(f"{file}: {module} has factors {a.shape} and {b.shape}")
        ranks[module] = a.shape[0]
    return ranks


def _check_modules(
    path: Path, settings: PeftSettings, found: set[str], base: Mapping[str, Any]
) -> None:
    """Checks the modules that have factors against those that the settings select."""
    if unknown := sorted(found - {*base, EMBEDDING}, key=natural_order):
        raise ValueError(f"{path}: adapts {unknown[0]}, which the base does not have")
    selected = settings.selected({*base, EMBEDDING, HEAD})
    if settings.get("ensure_weight_tying") and EMBEDDING in selected:
        selected |= {HEAD} & found  # PEFT adapts a tied head with the embedding
    if missing := selected - found:
        raise ValueError(
            f"{path / TENSORS} has no factors for {listed(missing)}, which {SETTINGS} selects: it "
            "is incomplete. Get it whole, or narrow target_modules to what it has"
        )
    if extra := found - selected:
        raise ValueError(
            f"{path / TENSORS} has factors for {listed(extra)}, which {SETTINGS} does not select: "
            "peft would leave them out. Name them in target_modules, or remove them"
        )


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
    return (storage_path(path) / SETTINGS).is_file()


def load_onto(
    path: str | Path, model: LlamaForCausalLM, params: Mapping[str, Any], base: str | Path
) -> tuple[LlamaForCausalLM, Any, dict[str, Any]]:
    """An adapter's directory, one of `save_adapter` or of PEFT, on its base.

    Args:
        path: The adapter's directory.
        model: The base's model.
        params: The base's parameters.
        base: The base's name or directory. A warning says if a PEFT adapter names another.

    Returns:
        The model and the base's parameters, which PEFT's `modules_to_save` change; the factors.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the adapter is damaged or was made for another base.
    """
    if not is_peft(path):
        cfg, adapter = load_adapter(path, params, model=model)
        return model, params, generate_factors(cfg, adapter)
    named = read_settings(storage_path(path) / SETTINGS).get("base_model_name_or_path")
    if named and _model_name(named) != _model_name(base):
        warnings.warn(f"{path} was made for the base {named}, not {base}", stacklevel=2)
    return load_peft(path, model, params)


def _model_name(base: str | Path) -> str:
    """The last part of a hub id or directory; that of the id for a directory of the hub's cache."""
    parts = Path(base).parts
    if "snapshots" in parts[1:]:
        parts = parts[: parts.index("snapshots")]
    return parts[-1].rsplit("--", 1)[-1].lower() if parts else ""
