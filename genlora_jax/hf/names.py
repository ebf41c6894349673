"""Names of Hugging Face's tensors, as data used in both directions.

Modules of `genlora_jax.models` have Hugging Face's names, so a table of leaves is enough.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flax.traverse_util import flatten_dict

# Leaf in Linen -> (leaf in PyTorch, whether that is the transpose).
LEAVES = {
    "kernel": ("weight", True),  # Linen: [in, out]; PyTorch: [out, in]
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}
LAYERS = "layers"


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and its place in the tree of parameters.

    Attributes:
        name: Hugging Face's name.
        path: Path of the leaf.
        index: Position in a stacked leaf, or None if the leaf is the tensor.
        transposed: Whether the checkpoint holds the transpose.
    """

    name: str
    path: tuple[str, ...]
    index: int | None
    transposed: bool

    def shape_in_file(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor whose place is in a leaf of this shape."""
        shape = leaf if self.index is None else leaf[1:]
        return shape[::-1] if self.transposed else shape


def tensors(params: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor of a tree of parameters, scanned or unrolled, in the tree's order."""
    for path, leaf in flatten_dict(dict(params)).items():
        name, transposed = LEAVES[path[-1]]
        scanned = LAYERS in path and not path[path.index(LAYERS) + 1].isdecimal()
        for i in range(leaf.shape[0]) if scanned else [None]:
            yield Tensor(f"{module_name(path[:-1], i)}.{name}", path, i, transposed)


def module_name(module: tuple[str, ...], layer: int | None) -> str:
    """Hugging Face's name of a module, or of one layer of a scanned one."""
    if layer is None:
        return ".".join(module)
    at = module.index(LAYERS) + 1
    return ".".join((*module[:at], str(layer), *module[at:]))


def natural_order(name: str) -> list[int | str]:
    """Sort key under which layer 10 follows layer 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
