"""Which modules an adapter adapts: patterns over module paths, and what a Dense is."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flax.traverse_util import flatten_dict

from genlora_jax.patterns import full_matches
from genlora_jax.validation import listed, require, require_int

_INDEXED = re.compile(r"(.+)_(\d+)")
_SCANNED = re.compile(r"layers|Scan.*")  # names that say `nn.scan`: ours, and Linen's own


@dataclass(frozen=True, kw_only=True)
class TargetSelection:
    """Which modules are adapted.

    Attributes:
        targets: `"all-linear"` (every Dense but `lm_head`), or patterns. A pattern is the last
            part(s) of a module's dotted path without layer index (`"q_proj"`), or a regular
            expression that matches the whole of it.
        exclude: Patterns of modules to leave out of `targets`.
        layers: Indices of the layers to adapt; `None` means all.
    """

    targets: str | list[str] | tuple[str, ...] = "all-linear"
    exclude: list[str] | tuple[str, ...] = ()
    layers: list[int] | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        # Tuples, so that a config is hashable and can be a static argument of a jitted function.
        for field in ("targets", "exclude", "layers"):
            value = getattr(self, field)
            if isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
        if isinstance(self.targets, str) and self.targets != "all-linear":
            object.__setattr__(self, "targets", (self.targets,))
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", (self.exclude,))
        for field in ("targets", "exclude"):
            value = getattr(self, field)
            listed = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
            require(
                listed or value == "all-linear",
                f"{field} must be a list of names or regular expressions, got {value!r}",
            )
        require(len(self.targets) > 0, "targets is empty: name at least one module")
        if self.layers is not None:
            require(isinstance(self.layers, tuple), f"layers must be a list, got {self.layers!r}")
            require(len(self.layers) > 0, "layers is empty: leave it out to adapt every layer")
            for layer in self.layers:
                require_int("layers", layer, 0)
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))


@dataclass(frozen=True, kw_only=True)
class KernelLocation:
    """One array of a base's parameters that holds kernels of a target.

    Attributes:
        path: Path of the module in the tree of parameters.
        stack: Number of layers stacked in the array (`nn.scan`), or None if it holds one kernel.
        layers: Indices of the adapted layers; positions in the stack if there is one.
    """

    path: tuple[str, ...]
    stack: int | None
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        named = self.path and all(isinstance(part, str) for part in self.path)
        require(bool(named), f"path must be names of modules, got {self.path!r}")
        if self.stack is not None:
            require_int("stack", self.stack, 1)
        require(len(self.layers) > 0, "layers is empty")
        for layer in self.layers:
            require_int("layers", layer, 0)
        inside = self.stack is None or max(self.layers) < self.stack
        require(inside, f"layers {self.layers} are not all in a stack of {self.stack}")


@dataclass(frozen=True, kw_only=True)
class Target:
    """Dense modules of one name and shape `[d_in, d_out]`, over all adapted layers.

    Attributes:
        name: Dotted module path without layer index, such as `model.layers.self_attn.q_proj`.
        d_in: Inputs of the kernel.
        d_out: Outputs of the kernel.
        kernels: Where they lie, in the order of layers.
    """

    name: str
    d_in: int
    d_out: int
    kernels: tuple[KernelLocation, ...]

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        require(isinstance(self.name, str), f"name must be a text, got {self.name!r}")
        for field in ("d_in", "d_out"):
            require_int(field, getattr(self, field), 1)
        require(len(self.kernels) > 0, f"{self.name} has no kernels")

    @property
    def lengths(self) -> dict[Literal["a", "b"], int]:
        """Lengths of the sides: of A's columns, and of B's rows."""
        return {"a": self.d_in, "b": self.d_out}

    @property
    def depth(self) -> int:
        """Number L of adapted layers."""
        return sum(len(kernel.layers) for kernel in self.kernels)


def module_of(target: str) -> str:
    """The module's dotted path in a target's name, which may tell shapes apart as well."""
    return target.partition("[")[0]


def split_layer(path: tuple[str, ...]) -> tuple[str, int | None]:
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


def matching(pattern: str, names: Collection[str]) -> set[str]:
    """The dotted names of which a pattern is the last part(s), or a regex for the whole.

    Raises:
        ValueError: If the pattern is no regular expression, or takes too long.
    """
    ends = {name for name in names if name == pattern or name.endswith(f".{pattern}")}
    return ends | set(full_matches(pattern, names))


def kernel_path(module: tuple[str, ...]) -> tuple[str, ...]:
    """Path of the parameter that an adapter of a module changes."""
    return (*module, "kernel")


def is_scanned(module: tuple[str, ...], flat: Mapping[tuple[str, ...], Any]) -> bool:
    """Whether a module's leaves are stacked by an `nn.scan` around it.

    Only parameters are known here, and a stack of Dense kernels has as many dimensions as the
    kernel of a `DenseGeneral` or of a one-dimensional `Conv`. A scan shows in the tree: all leaves
    of the scanned module have the layers as their first axis. Besides, its name says so (`layers`,
    or `Scan...`, which Linen gives), or it holds more than kernels: biases or norms, `[layers, n]`.
    Kernels alone share a first axis without a scan, too: the inputs of several `DenseGeneral`, or
    the width of several `Conv`; and the scale `[n]` of a norm before them is as long.

    Args:
        module: Path of the module.
        flat: Flattened parameters, arrays or shapes.
    """
    layers = flat[kernel_path(module)].shape[0]
    if _SCANNED.fullmatch(module[-1]):
        return True
    for depth in range(len(module) - 1, -1, -1):
        scanned = module[:depth]
        leaves = {path: leaf.shape for path, leaf in flat.items() if path[:depth] == scanned}
        if any(not shape or shape[0] != layers for shape in leaves.values()):
            return False
        # The children of an unrolled `layers` are numbers.
        if scanned and _SCANNED.fullmatch(scanned[-1]) and not module[depth].isdecimal():
            return True
        kernels = [shape for path, shape in leaves.items() if path[-1] == "kernel"]
        if min(map(len, kernels)) < 3:
            return False
        if any(len(shape) > 1 for path, shape in leaves.items() if path[-1] != "kernel"):
            return True
    return False


def refuse_other_than_dense(module: tuple[str, ...], flat: Mapping[tuple[str, ...], Any]) -> None:
    """Raises ValueError unless a module's kernel is a Dense's, or a stack of them by `nn.scan`."""
    shape = flat[kernel_path(module)].shape
    if len(shape) != 2 and not (len(shape) == 3 and is_scanned(module, flat)):
        raise ValueError(
            f"{'.'.join(module)} is no Dense: its kernel has shape {tuple(shape)}, as those of "
            "DenseGeneral and Conv have. Leave it out of targets, or name it in exclude; if "
            'nn.scan stacks it, name the scanned module "layers"'
        )


def find_targets(selection: TargetSelection, params: Mapping[str, Any]) -> tuple[Target, ...]:
    """The Dense modules of a base that are selected.

    Args:
        selection: Patterns and layers.
        params: The base's tree of parameters, arrays or shapes. Kernels are leaves named
            `kernel` of shape `[d_in, d_out]`, or `[layers, d_in, d_out]` under `nn.scan`.

    Returns:
        Targets in the order of their names.

    Raises:
        ValueError: If a pattern matches nothing, or a module that is no Dense, or a layer does
            not exist.
    """
    flat = flatten_dict(dict(params))
    found: dict[str, list[tuple[str, ...]]] = {}
    for path in flat:
        if path[-1] == "kernel" and len(path) > 1:
            found.setdefault(split_layer(path[:-1])[0], []).append(path[:-1])
    selected = _selected(selection, sorted(found))

    targets, present = [], set()
    for name in sorted(selected):
        shapes: dict[tuple[int, int], list[KernelLocation]] = {}
        for module in found[name]:
            refuse_other_than_dense(module, flat)
            shape = flat[kernel_path(module)].shape
            stack = shape[0] if len(shape) == 3 else None
            layers = tuple(range(stack)) if stack else (split_layer(module)[1] or 0,)
            location = KernelLocation(path=module, stack=stack, layers=layers)
            shapes.setdefault(shape[-2:], []).append(location)
            present |= set(layers)
        for (d_in, d_out), kernels in shapes.items():
            # Modules of one name and several shapes share nothing: a target each.
            suffix = f"[{d_in}x{d_out}]" if len(shapes) > 1 else ""
            kept = _narrow(kernels, selection.layers)
            if kept:
                targets.append(Target(name=name + suffix, d_in=d_in, d_out=d_out, kernels=kept))
    if missing := sorted(set(selection.layers or ()) - present):
        names = listed([str(layer) for layer in missing])
        raise ValueError(
            f"layers: {names} not in the base, whose targets have layers 0 to {max(present)}"
        )
    return tuple(targets)


def _selected(selection: TargetSelection, names: list[str]) -> set[str]:
    """The names that are selected."""
    if selection.targets == "all-linear":
        selected = {name for name in names if name.rsplit(".", 1)[-1] != "lm_head"}
        require(bool(selected), "targets: the base has no kernel to adapt")
    else:
        selected = _match("targets", tuple(selection.targets), names)
    if selection.exclude:
        selected -= _match("exclude", tuple(selection.exclude), names)
    require(bool(selected), "exclude: leaves none of the targets")
    return selected


def _match(field: str, patterns: tuple[str, ...], names: list[str]) -> set[str]:
    """The names that any of the patterns matches; every pattern must match one."""
    selected: set[str] = set()
    for pattern in patterns:
        try:
            hits = matching(pattern, [*names, "lm_head"])
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        if hits and hits.isdisjoint(names):
            raise ValueError(
                f"{field}: this base's lm_head is tied to the embedding and has no kernel of its "
                "own; to adapt it would change the embedding, too"
            )
        if not hits:
            raise ValueError(
                f"{field}: {pattern!r} matches no kernel of the base. There are: {', '.join(names)}"
            )
        selected |= hits & set(names)
    return selected


def _narrow(
    kernels: list[KernelLocation], layers: list[int] | tuple[int, ...] | None
) -> tuple[KernelLocation, ...]:
    """The kernels in the order of their layers, less the layers that are not asked for."""
    kept = []
    for kernel in sorted(kernels, key=lambda kernel: kernel.layers):
        inside = tuple(i for i in kernel.layers if layers is None or i in layers)
        if inside:
            kept.append(KernelLocation(path=kernel.path, stack=kernel.stack, layers=inside))
    return tuple(kept)
