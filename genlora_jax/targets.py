"""Which kernels an adapter adapts: patterns over module paths."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax.traverse_util import flatten_dict

from genlora_jax.config import AdapterConfig

Path = tuple[str, ...]
# Modules of one parent that read the same vector, under one word.
_INPUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
}
_INDEXED = re.compile(r"(.+)_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One array of a base's parameters that holds kernels of a target.

    Attributes:
        path: Path of the module in the tree of parameters.
        stack: Number of layers stacked in the array (`nn.scan`), or None if it holds one kernel.
        layers: Indices of the adapted layers; positions in the stack if there is one.
    """

    path: Path
    stack: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Kernels of one name and shape `[d_in, d_out]`, over all adapted layers.

    Attributes:
        name: Dotted module path without layer index, such as `model.layers.self_attn.q_proj`.
        d_in: Inputs of the kernel.
        d_out: Outputs of the kernel.
        kernels: Where they lie, in the order of layers.
    """

    name: str
    d_in: int
    d_out: int
    kernels: tuple[Kernel, ...]

    @property
    def input(self) -> tuple[str, int, tuple[int, ...]]:
        """What the target's kernels read, by their names: equal for those that read the same."""
        parent, _, own = module_of(self.name).rpartition(".")
        layers = tuple(layer for kernel in self.kernels for layer in kernel.layers)
        return f"{parent}.{_INPUTS.get(own, own)}", self.d_in, layers

    @property
    def depth(self) -> int:
        """Number L of adapted layers."""
        return sum(len(kernel.layers) for kernel in self.kernels)


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The static part of an adapter: hashable, no arrays.

    Attributes:
        targets: What is adapted and where it lies in the base.
        seed: Seed of what is rebuilt rather than stored.
        fingerprint: Digest of the names and sizes of all the base's parameters.
    """

    targets: tuple[Target, ...]
    seed: int
    fingerprint: str


def module_of(target: str) -> str:
    """The module's dotted path in a target's name, which may tell shapes apart as well."""
    return target.partition("[")[0]


def split_layer(path: Path) -> tuple[str, int | None]:
    """The dotted name of a module without its layer index, and that index.

    A layer index is a part of the path that is a number (`layers/3`) or ends with one
    (`layers_3`). The module's own name is left alone: `Dense_0` is not the layer 0 of `Dense`.
    """
    parts, index = [], None
    for part in path[:-1]:
        numbered = _INDEXED.fullmatch(part)
        if part.isdecimal():
            index = int(part)
        elif numbered:
            parts.append(numbered[1])
            index = int(numbered[2])
        else:
            parts.append(part)
    return ".".join([*parts, path[-1]]), index


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is the last part(s) of a dotted name, or a regex for the whole of it."""
    return name == pattern or name.endswith("." + pattern) or bool(re.fullmatch(pattern, name))


def _select(field: str, patterns: tuple[str, ...], names: list[str]) -> set[str]:
    """The names that any of the patterns matches; every pattern must match one."""
    selected: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if matches(pattern, name)}
        except re.error as error:
            raise ValueError(f"{field}: {pattern!r} is no regular expression: {error}") from error
        if not hits and matches(pattern, "lm_head"):
            raise ValueError(
                f"{field}: this base's lm_head is tied to the embedding and has no kernel of its "
                "own; to adapt it would change the embedding, too"
            )
        if not hits:
            raise ValueError(
                f"{field}: {pattern!r} matches no kernel of the base. There are: {', '.join(names)}"
            )
        selected |= hits
    return selected


def find_targets(cfg: AdapterConfig, params: Mapping[str, Any]) -> tuple[Target, ...]:
    """The kernels of a base that a config asks for.

    Args:
        cfg: Its `targets`, `exclude` and `layers`.
        params: The base's tree of parameters, arrays or shapes. Kernels are leaves named
            `kernel` of shape `[d_in, d_out]`, or `[layers, d_in, d_out]` under `nn.scan`.

    Returns:
        Targets in the order of their names.

    Raises:
        ValueError: If a pattern matches nothing, or a layer does not exist.
    """
    found: dict[str, dict[tuple[int, int], list[Kernel]]] = {}
    for path, leaf in flatten_dict(dict(params)).items():
        if path[-1] != "kernel" or len(leaf.shape) not in (2, 3) or len(path) < 2:
            continue
        name, index = split_layer(path[:-1])
        stack = leaf.shape[0] if len(leaf.shape) == 3 else None
        layers = tuple(range(stack)) if stack else (index or 0,)
        kernel = Kernel(path=path[:-1], stack=stack, layers=layers)
        found.setdefault(name, {}).setdefault(leaf.shape[-2:], []).append(kernel)

    names = sorted(found)
    if cfg.targets == "all-linear":
        selected = {name for name in names if name.rsplit(".", 1)[-1] != "lm_head"}
        if not selected:
            raise ValueError("targets: the base has no kernel to adapt")
    else:
        selected = _select("targets", tuple(cfg.targets), names)
    if cfg.exclude:
        selected -= _select("exclude", tuple(cfg.exclude), names)
    if not selected:
        raise ValueError("exclude: leaves none of the targets")

    targets = []
    for name in sorted(selected):
        for (d_in, d_out), kernels in found[name].items():
            # Modules of one name and several shapes share nothing: a target each.
            suffix = f"[{d_in}x{d_out}]" if len(found[name]) > 1 else ""
            kept = _narrow(kernels, cfg.layers)
            if kept:
                targets.append(Target(name=name + suffix, d_in=d_in, d_out=d_out, kernels=kept))
    _check_layers(cfg, [k for name in selected for ks in found[name].values() for k in ks])
    return tuple(targets)


def _narrow(kernels: list[Kernel], layers: Any) -> tuple[Kernel, ...]:
    """The kernels in the order of their layers, less the layers that are not asked for."""
    kept = []
    for kernel in sorted(kernels, key=lambda kernel: kernel.layers):
        inside = tuple(i for i in kernel.layers if layers is None or i in layers)
        if inside:
            kept.append(Kernel(path=kernel.path, stack=kernel.stack, layers=inside))
    return tuple(kept)


def _check_layers(cfg: AdapterConfig, kernels: list[Kernel]) -> None:
    present = {layer for kernel in kernels for layer in kernel.layers}
    missing = sorted(set(cfg.layers or ()) - present)
    if missing:
        raise ValueError(
            f"layers: {missing} not in the base, whose targets have layers 0 to {max(present)}"
        )
