"""`adapter_config.json`: which modules PEFT adapts by it, at what rank and scale."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genlora_jax.hf.checkpoint import read_json
from genlora_jax.patterns import full_matches
from genlora_jax.validation import LARGEST_FLOAT

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
# Settings that say nothing about what a trained adapter computes on a model of `nn.Linear`.
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config"),
    *("lora_dropout", "hira_dropout", "init_weights", "megatron_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
# Initialisations that subtract the initial delta from the base.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not _is_bool(value) and value >= 1


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not _is_bool(value) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not _is_bool(value) and abs(value) <= LARGEST_FLOAT


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _map_to(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _any_of(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(check(value) for check in checks)


_NAMES = _any_of(_is_text, _list_of(_is_text)), "a list of names or a regular expression"
# What is read: the check of a value that is on, and what it has to be. PEFT's defaults are off.
READ: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (_is_text, "a name"),
    "base_model_name_or_path": (_is_text, "a name"),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": (_any_of(_is_index, _list_of(_is_index)), "indices of layers"),
    "layers_pattern": _NAMES,
    "r": (_is_count, "a whole number >= 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "rank_pattern": (_map_to(_is_count), "a map of whole numbers >= 1"),
    "alpha_pattern": (_map_to(_is_number), "a map of finite numbers"),
    "use_rslora": (_is_bool, "true or false"),
    "use_dora": (_is_bool, "true or false"),
    "fan_in_fan_out": (_is_bool, "true or false"),
    "lora_bias": (_is_bool, "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (_any_of(_is_bool, _is_text), "true, false or a name"),
    "modules_to_save": (_list_of(_is_text), "a list of names"),
    "ensure_weight_tying": (_is_bool, "true or false"),
    "trainable_token_indices": (
        _any_of(_list_of(_is_index), _map_to(_list_of(_is_index))),
        "token ids, or a map of them",
    ),
}


@dataclass(frozen=True)
class PeftSettings:
    """The settings of an adapter that is factors and tensors of the base.

    Attributes:
        file: Where they stand.
        fields: What the file says of the settings in `READ`, checked; what is off is not in it.
    """

    file: Path
    fields: Mapping[str, Any]

    def get(self, field: str) -> Any:
        """A setting; None if it is off."""
        return self.fields.get(field)

    def selected(self, names: Collection[str]) -> set[str]:
        """Which of a base's modules are adapted, by PEFT's rules."""
        targets = self.get("target_modules") or []
        if not isinstance(targets, str):
            whole = set(names) & set(targets)  # PEFT does not ask for the layer of these
            chosen = whole | self._in_layers({name for name in names if _ends(name, targets)})
        elif targets.lower() == "all-linear":
            chosen = set(names) - {HEAD, EMBEDDING}
        else:
            chosen = set(self._matches("target_modules", targets, names))
        exclude = self.get("exclude_modules") or []
        if isinstance(exclude, str):
            chosen -= set(self._matches("exclude_modules", exclude, names))
        chosen -= {name for name in chosen if not isinstance(exclude, str) and _ends(name, exclude)}
        for module in self.get("modules_to_save") or []:
            pattern = rf"(^|.*\.){module}($|\..*)"
            chosen -= set(self._matches("modules_to_save", pattern, chosen))
        return chosen

    def _in_layers(self, names: set[str]) -> set[str]:
        """The names whose layer is one of `layers_to_transform`, if that is on."""
        layers = self.get("layers_to_transform")
        if layers is None:
            return names
        patterns = self.get("layers_pattern") or [r"[^.]*"]
        index: dict[str, int] = {}
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            # The first number in a name is the layer's, as in PEFT.
            whole = rf"(?:.*?\.)??{pattern}\.(?P<layer>\d+)\..*"
            for name, match in self._matches("layers_pattern", whole, names).items():
                index.setdefault(name, int(match["layer"]))
        return {name for name in names if index.get(name) in layers}

    def tokens(self, module: str) -> list[int]:
        """The ids whose rows of a module are trained on their own."""
        tokens = self.get("trainable_token_indices") or []
        if isinstance(tokens, list):
            return tokens if module == EMBEDDING else []
        return next((ids for name, ids in tokens.items() if module.endswith(name)), [])

    def saved(self, tensors: Collection[str]) -> set[str]:
        """Which of a base's tensors `modules_to_save` names: those of the modules and below."""
        ends = tuple(self.get("modules_to_save") or ())

        def named(tensor: str) -> bool:
            parts = tensor.split(".")
            return any(".".join(parts[:i]).endswith(ends) for i in range(1, len(parts)))

        return {tensor for tensor in tensors if ends and named(tensor)}

    def scales(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """The factor on each module's delta; checks the ranks of its factors.

        Raises:
            ValueError: If a module's factors have another rank than the settings give it.
        """
        hira = self.get("peft_type") == "HIRA"  # has no scale; peft ignores its `rank_pattern`
        stated = {} if hira else self._by_pattern("rank_pattern", ranks)
        alphas = self._by_pattern("alpha_pattern", ranks)
        scales = {}
        for name, rank in ranks.items():
            if (given := stated.get(name, self.fields["r"])) != rank:
                raise ValueError(
                    f"{self.file}: gives {name} rank {given}, but its factors have {rank}"
                )
            alpha = alphas.get(name, self.fields["lora_alpha"])
            root = math.sqrt(rank) if self.get("use_rslora") else rank
            scales[name] = 1.0 if hira else alpha / root
        return scales

    def _by_pattern(self, field: str, names: Collection[str]) -> dict[str, Any]:
        """The values of a map from patterns, for the names that match one: the first counts."""
        values: dict[str, Any] = {}
        for pattern, value in (self.get(field) or {}).items():
            for name in self._matches(field, rf"(.*\.)?({pattern})", names):
                values.setdefault(name, value)
        return values

    def _matches(self, field: str, pattern: str, names: Collection[str]) -> dict[str, Any]:
        try:
            return full_matches(pattern, names)
        except ValueError as error:
            raise ValueError(f"{self.file}: {field}: {error}") from None


def _ends(name: str, ends: Collection[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def read_settings(file: Path) -> PeftSettings:
    """The settings of a LoRA, DoRA or HiRA adapter.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the adapter is of another kind, or a setting has no such value or is one
            that would change the base or the factors in a way that is not known here.
    """
    raw = read_json(file)
    if not isinstance(raw, dict) or raw.get("peft_type") not in ("LORA", "HIRA"):
        kind = raw.get("peft_type") if isinstance(raw, dict) else None
        raise ValueError(f"{file}: peft_type {kind!r} is not supported; LORA and HIRA are")
    hira = raw["peft_type"] == "HIRA"
    fields: dict[str, Any] = {"r": 32 if hira else 8, "lora_alpha": 8}  # PEFT's defaults
    for field, value in raw.items():
        if field in fields or (value and field in READ):
            fields[field] = value
        elif field not in HARMLESS and (value or _is_all_defaults(field, value)):
            raise ValueError(
                f"{file}: {field} = {_short(value)} is not supported: merge the adapter with peft, "
                "or set it to null if it was not used"
            )
    if (layers := raw.get("layers_to_transform")) == 0 and not _is_bool(layers):
        fields["layers_to_transform"] = 0  # a layer, not off
    for field, value in fields.items():
        check, words = READ[field]
        if not check(value):
            raise ValueError(f"{file}: {field} must be {words}, got {_short(value)}")
    _check_together(file, fields)
    if isinstance(layers := fields.get("layers_to_transform"), int):
        fields["layers_to_transform"] = [layers]
    return PeftSettings(file, fields)


def _check_together(file: Path, fields: Mapping[str, Any]) -> None:
    """What PEFT refuses as well, and what it computes from the base."""
    if isinstance(fields.get("target_modules"), str) and "layers_to_transform" in fields:
        raise ValueError(f"{file}: layers_to_transform needs target_modules to be a list of names")
    if fields.get("lora_bias") and fields.get("use_dora"):
        raise ValueError(f"{file}: lora_bias and use_dora exclude each other")
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING):
        raise ValueError(
            f"{file}: init_lora_weights = {init!r} changes the base's kernels: convert the "
            "adapter to plain LoRA with peft first"
        )


def _is_all_defaults(field: str, value: Any) -> bool:
    """Whether a setting is an empty group of settings, which PEFT takes as on, at its defaults."""
    return value == {} and (field.endswith("_config") or field == "use_bdlora")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
