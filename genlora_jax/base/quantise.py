"""Which kernels of a base are quantised, and how."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.base.fp8 import GPU_OPTIONS, Fp8, Fp8Backward, refuse_without_fp8
from genlora_jax.base.int4 import GROUPS, Int4
from genlora_jax.base.int8 import Int8
from genlora_jax.base.nf4 import NF4
from genlora_jax.base.stored import StoredKernel
from genlora_jax.targets import matching, split_layer
from genlora_jax.validation import require, require_choice

BaseDtype = Literal["bf16", "fp8_backward", "fp8", "int8", "nf4", "int4"]
FORMS: dict[str, type[StoredKernel]] = {
    form.name: form for form in (Fp8Backward, Fp8, Int8, NF4, Int4)
}
FP8 = (Fp8Backward.name, Fp8.name)


@dataclass(frozen=True)
class Quantisation:
    """How a base stores its kernels.

    Embeddings, norms and biases are no kernels and stay as they are.

    Attributes:
        form: `fp8_backward`, `fp8`, `int8`, `nf4` or `int4`; `bf16` for none of them.
        unquantised: Patterns of modules whose kernels stay as they are too; see
            `TargetSelection`. One that the base lacks is no error: its head may be tied.
        group: Inputs that share a scale in `int4`: 64 or 128.
    """

    form: BaseDtype
    unquantised: tuple[str, ...] = ("lm_head",)
    group: int = 64

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        require_choice("base_dtype", self.form, get_args(BaseDtype))
        require_choice("int4_group", self.group, GROUPS)
        object.__setattr__(self, "unquantised", tuple(self.unquantised))
        listed = all(isinstance(pattern, str) for pattern in self.unquantised)
        require(listed, f"unquantised must be a list of patterns, got {self.unquantised!r}")

    def __str__(self) -> str:
        group = f" in groups of {self.group}" if self.form == "int4" else ""
        left = [f", not {name}" for name in self.unquantised if name != "lm_head"]
        return "".join([self.form, group, *left])

    def kernel(self, kernel: jax.Array) -> Any:
        """A kernel `[..., d_in, d_out]` in this form."""
        if self.form == "int4":
            return Int4.of(kernel, kernel.dtype, self.group)
        return FORMS[self.form].of(kernel, kernel.dtype)

    @property
    def rounds(self) -> bool:
        """Whether kernels stand for other numbers than they were made of."""
        return self.form in FORMS and FORMS[self.form].rounds

    @property
    def dequantises(self) -> bool:
        """Whether kernels become floats to be multiplied."""
        return self.form in FORMS and FORMS[self.form].dequantises

    def check_device(self, platform: str, capability: str | None, kind: str) -> None:
        """Raises ValueError if a device cannot multiply by kernels in this form.

        Args:
            platform: What JAX calls it.
            capability: A GPU's compute capability.
            kind: The device in words.
        """
        if self.form in FP8:
            refuse_without_fp8(self.form, platform, capability, kind)

    def quantises(self, names: Any) -> set[str]:
        """Of dotted module names without layer index, those whose kernels are quantised."""
        kept = [matching(pattern, names) for pattern in self.unquantised]
        return set() if self.form == "bf16" else set(names).difference(*kept)

    def paths(self, flat: Mapping[tuple[str, ...], Any]) -> set[tuple[str, ...]]:
        """Of flattened parameters, the paths of the kernels that are quantised."""
        names = {path: split_layer(path[:-1])[0] for path in flat if path[-1] == "kernel"}
        chosen = self.quantises(set(names.values()))
        return {path for path, name in names.items() if name in chosen}


def quantise(params: Mapping[str, Any], quantisation: Quantisation) -> Any:
    """A base's parameters with quantised kernels; under `jax.eval_shape`, their shapes."""
    flat = flatten_dict(dict(params))
    chosen = quantisation.paths(flat)
    return unflatten_dict(
        {path: quantisation.kernel(leaf) if path in chosen else leaf for path, leaf in flat.items()}
    )


def quantisation_of(params: Mapping[str, Any]) -> Quantisation | None:
    """How a base's kernels are quantised; None if none is.

    Its `unquantised` names the modules whose kernels are not.
    """
    flat = {path: leaf for path, leaf in flatten_dict(dict(params)).items() if path[-1] == "kernel"}
    stored = [leaf for leaf in flat.values() if isinstance(leaf, StoredKernel)]
    if not stored:
        return None
    plain = {path[-2] for path, leaf in flat.items() if not isinstance(leaf, StoredKernel)}
    form: Any = stored[0].name
    return Quantisation(form, tuple(sorted(plain)), getattr(stored[0], "group", GROUPS[0]))


def compiler_options(params: Mapping[str, Any], platform: str) -> dict[str, Any]:
    """XLA's options for programs that multiply by a base on `"cpu"`, `"gpu"` or `"tpu"`."""
    found = quantisation_of(params)
    return dict(GPU_OPTIONS) if platform == "gpu" and found and found.form in FP8 else {}
