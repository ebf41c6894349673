"""The families of models that are read: what the `config.json` of each means for `LlamaConfig`.

A family is one entry of `FAMILIES`. Names of tensors need no entry: the modules of
`genlora_jax.models` have Hugging Face's, and `names.py` holds the rest.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from genlora_jax.models.config import LlamaConfig, RopeScaling
from genlora_jax.validation import require, require_float, require_int

Fields = dict[str, Any]
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
COUNTS = ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
DTYPES = ("float64", "float32", "float16", "bfloat16")
LONGEST = 300  # characters of a message of transformers, which quotes values whole
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
# Fields that all families have, and `LlamaConfig` under the same name.
COMMON = (
    *SIZES,
    *COUNTS,
    *("rms_norm_eps", "tie_word_embeddings"),
)


def _biases(config: Any) -> Fields:
    return dict.fromkeys(("attention_bias", "attention_output_bias"), config.attention_bias)


def _windows(config: Any) -> Fields:
    sliding = [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
    if not sliding:
        return {}
    layers = None if len(sliding) == config.num_hidden_layers else tuple(sliding)
    return {"sliding_window": config.sliding_window, "sliding_layers": layers}


# By `model_type`: fields of `LlamaConfig` beyond those that all families have. The argument is the
# config of `transformers`, where a field that the file leaves out has the family's default.
FAMILIES: dict[str, Callable[[Any], Fields]] = {
    "llama": lambda config: _biases(config) | {"mlp_bias": config.mlp_bias},
    "mistral": lambda config: {"sliding_window": config.sliding_window},
    "qwen2": lambda config: {"attention_bias": True} | _windows(config),
    "qwen3": lambda config: _biases(config) | {"qk_norm": "head"} | _windows(config),
    "phi3": lambda config: {
        "fused_projections": True,
        "sliding_window": config.sliding_window,
        "partial_rotary_factor": config.rope_parameters["partial_rotary_factor"],
    },
    "olmo2": lambda config: _biases(config) | {"qk_norm": "whole", "post_norm": True},
}


def parse_config(file: Path, data: Mapping[str, Any]) -> LlamaConfig:
    """The shape of the model that the contents of a `config.json` describe.

    What a field means, and what it is when it is left out, is for `transformers` to say.

    Raises:
        ValueError: If the architecture, or an option of it, is not supported; names the field.
    """
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{file}: model_type {kind!r} is not supported; there are {', '.join(FAMILIES)}"
        )
    for field in SIZES:
        if field not in data:  # `transformers` would fill in the default size of the family
            raise ValueError(f"{file}: field {field!r} is missing")
    rope = data.get("rope_scaling") or data.get("rope_parameters")
    try:
        if isinstance(rope, dict) and "llama3" in (rope.get("rope_type"), rope.get("type")):
            _ = [rope[field] for field in LLAMA3]  # a KeyError names one that is missing
        for field in ("dtype", "torch_dtype"):
            if data.get(field) not in (None, *DTYPES):  # which `transformers` does not read either
                known = f"write one of {', '.join(DTYPES)}, or remove it for that of the tensors"
                raise ValueError(f"{field} {data[field]!r} is not read: {known}")
        # Before `transformers` sees it, which makes a list of so many entries.
        require_int("num_hidden_layers", data["num_hidden_layers"], 1)
        require(data["num_hidden_layers"] < 2**16, "num_hidden_layers is larger than any model's")
        config = _read_by_transformers(kind, data)
        fields = {field: getattr(config, field) for field in COMMON}
        size = fields["hidden_size"] // fields["num_attention_heads"]
        fields["head_dim"] = getattr(config, "head_dim", None) or size
        for field in (*SIZES, *COUNTS, "head_dim"):
            require_int(field, fields[field], 1)
            require(fields[field] < 2**31, f"{field} is larger than any model's")
        if config.hidden_act not in ("silu", "swish"):
            raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; silu is")
        return LlamaConfig(
            **fields,
            rope_theta=_positive(config.rope_parameters, "rope_theta"),
            rope_scaling=_rope_scaling(config.rope_parameters),
            **FAMILIES[kind](config),
        )
    except KeyError as error:
        raise ValueError(f"{file}: field {error} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{file}: {error}") from error


def _read_by_transformers(kind: str, data: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING  # which imports torch where there is one

    try:
        config = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(data)))  # it writes into dicts
        config.standardize_rope_params()  # as its models do, now that all fields are set
    except Exception as error:  # its errors have no common base class
        raise ValueError(" ".join(str(error).split())[:LONGEST]) from error
    return config


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope["rope_type"]
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1):
        return None
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported; llama3 and none are")
    scaling = RopeScaling(
        **{field: _positive(rope, field) for field in LLAMA3},
        original_max_position_embeddings=int(_positive(rope, "original_max_position_embeddings")),
    )
    if scaling.low_freq_factor == scaling.high_freq_factor:
        raise ValueError("low_freq_factor and high_freq_factor of the rope scaling are equal")
    return scaling


def _positive(fields: Mapping[str, Any], name: str) -> float:
    require_float(name, fields[name], 0, above=True)
    return float(fields[name])
