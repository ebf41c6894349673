"""The methods, a file each: config, initial values, and the factors that they stand for."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from genlora_jax.methods.config import AdapterConfig
from genlora_jax.methods.dora import DoRAConfig
from genlora_jax.methods.full import FullConfig
from genlora_jax.methods.genlora import GenLoRAConfig
from genlora_jax.methods.lora import LoRAConfig
from genlora_jax.methods.nola import NOLAConfig
from genlora_jax.methods.pissa import PiSSAConfig
from genlora_jax.methods.sine_lora import SineLoRAConfig
from genlora_jax.methods.tied_lora import TiedLoRAConfig
from genlora_jax.methods.uni_lora import UniLoRAConfig
from genlora_jax.methods.vera import VeRAConfig

METHODS: dict[str, type[AdapterConfig]] = {
    "genlora": GenLoRAConfig,
    "lora": LoRAConfig,
    "dora": DoRAConfig,
    "pissa": PiSSAConfig,
    "vera": VeRAConfig,
    "uni_lora": UniLoRAConfig,
    "tied_lora": TiedLoRAConfig,
    "sine_lora": SineLoRAConfig,
    "nola": NOLAConfig,
    "full": FullConfig,
}


def config_to_json(cfg: AdapterConfig) -> dict[str, Any]:
    """A JSON-able dict with every field and the `method`'s name."""
    method = next(name for name, kind in METHODS.items() if kind is type(cfg))
    fields = json.loads(json.dumps(dataclasses.asdict(cfg)))  # tuples to lists
    return {"method": method, **fields}


def config_from_json(data: Mapping[str, Any]) -> AdapterConfig:
    """Inverse of `config_to_json`; reads what version 0.1 wrote as well.

    Raises:
        ValueError: On an unknown method or field, or a value that the field does not take.
    """
    fields = dict(data)
    method = fields.pop("method", None)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: this version knows {sorted(METHODS)}")
    kind = METHODS[method]
    fields = kind.from_older(fields)
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}")
    return kind(**fields)
