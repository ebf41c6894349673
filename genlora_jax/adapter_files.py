"""Adapters on disk: tensors in safetensors, settings in JSON."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors.numpy import load, load_file, save_file

from genlora_jax.adapter import Adapter, AdapterSpec, adapter_shapes, adapter_spec, base_fingerprint
from genlora_jax.atomic_files import new_directory
from genlora_jax.base.quantise import Quantisation
from genlora_jax.methods import config_from_json, config_to_json
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.sharding import place_state
from genlora_jax.storage import is_remote, storage_path
from genlora_jax.targets import KernelLocation, Target
from genlora_jax.validation import refuse_pointer

FORMAT = 1
TENSORS, SETTINGS = "adapter.safetensors", "adapter.json"


def config_fingerprint(model: nn.Module | None) -> str | None:
    """Digest of the base's config: of the fields that differ from their defaults."""
    if model is None:
        return None
    values = [(field, getattr(model.config, field.name)) for field in fields(model.config)]
    changed = sorted((field.name, value) for field, value in values if value != field.default)
    return hashlib.sha256(repr(changed).encode()).hexdigest()[:16]


def save_adapter(
    path: str | Path,
    cfg: AdapterConfig,
    adapter: Adapter,
    *,
    model: nn.Module | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter as a directory of `adapter.safetensors` and `adapter.json`.

    What is rebuilt from the seed is not stored.

    Args:
        path: The directory to make.
        cfg: The adapter's config, `adapter.config`.
        adapter: The adapter.
        model: The base's model. With it, a base of the same shapes whose config differs (in
            `rope_theta`, say) is refused when the adapter is loaded.
        overwrite: Replace an existing directory.

    Raises:
        FileExistsError: If the directory exists and is not to be overwritten.
        FloatingPointError: If a number is not finite.
        ValueError: If the config is not the adapter's.
    """
    cfg.check_is(adapter.config)
    settings = spec_to_json(adapter.spec, config_fingerprint(model))
    write_adapter(path, settings, adapter, overwrite=overwrite)


def write_adapter(
    path: str | Path, settings: Mapping[str, Any], adapter: Adapter, *, overwrite: bool = False
) -> None:
    """Writes an adapter with the settings that `spec_to_json` made; see `save_adapter`."""
    flat = flatten_dict({"trainable": adapter.trainable, "frozen": adapter.frozen}, sep="/")
    arrays = {name: np.asarray(leaf) for name, leaf in flat.items() if leaf is not None}
    for name, value in arrays.items():
        if not np.isfinite(value).all():
            raise FloatingPointError(f"{path} is not written: {name} holds a NaN or an infinity")
    with new_directory(path, overwrite=overwrite) as directory:
        save_file(arrays, directory / TENSORS, metadata={"format": "genlora"})
        (directory / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


def load_adapter(
    path: str | Path,
    params: Mapping[str, Any] | None = None,
    *,
    model: nn.Module | None = None,
    mesh: Mesh | None = None,
) -> tuple[AdapterConfig, Adapter]:
    """Reads what `save_adapter` wrote.

    Args:
        path: The adapter's directory, here or at `gs://` or `s3://`.
        params: The base for which it is loaded, scanned or unrolled. It is checked against the
            adapter's fingerprint, and a warning says if it is quantised otherwise. Without it the
            adapter fits a base whose layers are stored like those of the base that it was made
            for.
        model: The base's model, to check its config as well.
        mesh: Devices over which the adapter is sharded, as in training on them; all processes
            read the file. By default it is on one device.

    Returns:
        The config and the adapter.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, the adapter was made for another base, or a number in it
            is not finite.
    """
    path = storage_path(path)
    spec, base_config = _read_settings(path)
    trained_on = spec.quantisation
    if params is not None:
        if base_fingerprint(params) != spec.fingerprint:
            raise ValueError(
                f"{path} was made for another base: its names or shapes differ from these "
                f"parameters' (fingerprint {spec.fingerprint}, not {base_fingerprint(params)})"
            )
        try:
            spec = adapter_spec(spec.config, params)
        except ValueError as error:
            raise ValueError(f"{path / SETTINGS}: {error!s:.200}") from error
        if spec.quantisation != trained_on:
            warnings.warn(
                f"{path} was trained on a base in {trained_on or 'full precision'}; this one is in "
                f"{spec.quantisation or 'full precision'}: outputs differ by the rounding of the "
                "kernels (model.base_dtype)",
                stacklevel=2,
            )
    if model is not None and base_config not in (None, config_fingerprint(model)):
        raise ValueError(
            f"{path} was made for another base: shapes agree, but not the rest of config.json"
        )
    try:
        remote = is_remote(path)
        arrays = load((path / TENSORS).read_bytes()) if remote else load_file(path / TENSORS)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path / TENSORS} is damaged: {error}") from error
    _check_arrays(path / TENSORS, arrays, adapter_shapes(spec))
    tree = unflatten_dict(arrays, sep="/")
    tree = jax.tree.map(jax.numpy.asarray, tree) if mesh is None else place_state(mesh, tree)
    trainable, frozen = tree.get("trainable", {}), tree.get("frozen", {})
    return spec.config, Adapter(trainable=trainable, frozen=frozen, spec=spec)


def load_spec(path: str | Path) -> AdapterSpec:
    """The static part of an adapter that `save_adapter` wrote; its tensors are not read.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the settings are damaged.
    """
    return _read_settings(storage_path(path))[0]


def _read_settings(path: Path) -> tuple[AdapterSpec, str | None]:
    """The adapter's static part, and the digest of its base's config."""
    for name in (SETTINGS, TENSORS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no adapter: {name} is missing")
        refuse_pointer(path / name)
    try:
        settings = json.loads((path / SETTINGS).read_text())
        return spec_from_json(settings), settings["base"].get("config")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path / SETTINGS}: {error!s:.200}") from error


def spec_to_json(spec: AdapterSpec, base_config: str | None) -> dict[str, Any]:
    """An adapter's static part, and the digest of its base's config, as JSON has it."""
    return {
        "format": FORMAT,
        "config": config_to_json(spec.config),
        "base": {
            "shapes": spec.fingerprint,
            "config": base_config,
            "quantisation": None if spec.quantisation is None else asdict(spec.quantisation),
        },
        "targets": [asdict(target) for target in spec.targets],
    }


def spec_from_json(settings: Mapping[str, Any]) -> AdapterSpec:
    """What `spec_to_json` was given; ValueError, KeyError or TypeError if it is damaged."""
    if settings["format"] != FORMAT:
        raise ValueError(f"its format is {settings['format']}; this version reads {FORMAT}")
    quantisation = settings["base"].get("quantisation")
    spec = AdapterSpec(
        config=config_from_json(settings["config"]),
        targets=tuple(map(_target, settings["targets"])),
        fingerprint=settings["base"]["shapes"],
        quantisation=None if quantisation is None else Quantisation(**quantisation),
    )
    hash(spec)  # a TypeError if a list stands where a text or a number should
    return spec


def _target(entry: dict[str, Any]) -> Target:
    kernels = tuple(
        KernelLocation(**k | {"path": tuple(k["path"]), "layers": tuple(k["layers"])})
        for k in entry["kernels"]
    )
    return Target(**entry | {"kernels": kernels})


def _check_arrays(file: Path, arrays: Mapping[str, np.ndarray], expected: Adapter) -> None:
    trees = {"trainable": expected.trainable, "frozen": expected.frozen}
    shapes = {name: leaf.shape for name, leaf in flatten_dict(trees, sep="/").items()}
    for name, shape in shapes.items():
        if name not in arrays:
            raise ValueError(f"{file}: tensor {name} is missing")
        if arrays[name].shape != shape:
            raise ValueError(f"{file}: tensor {name} has shape {arrays[name].shape}, not {shape}")
        if not jax.numpy.issubdtype(arrays[name].dtype, jax.numpy.floating):
            raise ValueError(f"{file}: tensor {name} is of dtype {arrays[name].dtype}, no float")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{file}: tensor {name} holds a NaN or an infinity: train it again")
    if unknown := sorted(set(arrays) - set(shapes)):
        raise ValueError(f"{file}: unknown tensor {unknown[0]}")
