"""What an adapter is: frozen, validated settings that go to JSON and back."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

BASES = ("rbf", "rbf_grid", "fourier", "chebyshev", "bspline")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_choice(field: str, value: object, choices: tuple[Any, ...]) -> None:
    _require(value in choices, f"{field} must be one of {choices}, got {value!r}")


def _require_int(field: str, value: object, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(whole and value >= least, f"{field} must be a whole number >= {least}, got {value!r}")  # type: ignore[operator]


def _require_float(field: str, value: float, least: float, *, above: bool = False) -> None:
    fits = isinstance(value, (int, float)) and math.isfinite(value)
    fits = fits and (value > least if above else value >= least)
    sign = ">" if above else ">="
    _require(fits, f"{field} must be a finite number {sign} {least}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every method shares: the kernels it adapts.

    Attributes:
        targets: `"all-linear"` (every Dense but `lm_head`), or patterns. A pattern is the last
            part(s) of a module's dotted path without layer index (`"q_proj"`), or a regular
            expression that matches the whole of it.
        exclude: Patterns of modules to leave out of `targets`.
        layers: Indices of the layers to adapt; `None` means all.
        dropout: Probability with which an input of the adapter is zeroed in training.
        seed: Seed of whatever is rebuilt rather than stored.
    """

    # Whether the initial values are computed from the base's kernels, not just from their shapes.
    reads_base: ClassVar[bool] = False

    targets: str | list[str] | tuple[str, ...] = "all-linear"
    exclude: list[str] | tuple[str, ...] = ()
    layers: list[int] | tuple[int, ...] | None = None
    dropout: float = 0.0
    seed: int = 0

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
            _require(
                listed or value == "all-linear",
                f"{field} must be a list of names or regular expressions, got {value!r}",
            )
        _require(len(self.targets) > 0, "targets is empty: name at least one module")
        if self.layers is not None:
            _require(isinstance(self.layers, tuple), f"layers must be a list, got {self.layers!r}")
            _require(len(self.layers) > 0, "layers is empty: leave it out to adapt every layer")
            for layer in self.layers:
                _require_int("layers", layer, 0)
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        _require_float("dropout", self.dropout, 0.0)
        _require(self.dropout < 1.0, f"dropout must be below 1, got {self.dropout!r}")
        _require_int("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """What the methods share whose delta is made of a product `A @ B`.

    Attributes:
        rank: Number of basis vectors on either side of a target's delta.
        alpha: The delta is scaled by `alpha / rank`, or by `alpha / sqrt(rank)` with
            `scaling="rslora"`; not at all if it is None.
        scaling: `"lora"` or `"rslora"` (arXiv 2312.03732).
    """

    rank: int = 32
    alpha: float | None = 16.0
    scaling: Literal["lora", "rslora"] = "lora"

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        _require_int("rank", self.rank, 1)
        if self.alpha is not None:
            _require_float("alpha", self.alpha, 0.0, above=True)
        _require_choice("scaling", self.scaling, ("lora", "rslora"))

    @property
    def scale(self) -> float:
        """The factor s on the product `A @ B`."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)


@dataclass(frozen=True, kw_only=True)
class TwoSidedConfig(LowRankConfig):
    """What the methods share that make each kernel a basis on either side: LoRA and GenLoRA.

    Attributes:
        side_a: `"trained"`, or `"seeded"` (as in LoRA-FA, arXiv 2308.03303): A is random, rebuilt
            from `seed` and never trained or stored.
        hadamard: The delta is `W * (A @ B)`, elementwise with the base's kernel W (HiRA, ICLR
            2025), which has a high rank at any rank of A and B. A is multiplied with sqrt(d_in)
            there: elements of `A @ B` are then as large for kernels of any width.
    """

    side_a: Literal["trained", "seeded"] = "trained"
    hadamard: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        _require_choice("side_a", self.side_a, ("trained", "seeded"))


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(TwoSidedConfig):
    """LoRA (arXiv 2106.09685): factors are stored and trained as they are."""

    rank: int = 8


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """DoRA (arXiv 2402.09353): LoRA, and a trained magnitude for each column of the kernel."""

    reads_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        _require(not self.hadamard, "DoRA adds its delta to the kernel: leave hadamard out")


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(LoRAConfig):
    """PiSSA (arXiv 2404.02948): LoRA that starts at the kernel's principal part.

    The base stays as it is: what A and B start at is kept and subtracted, so that the factors have
    twice the rank.
    """

    reads_base: ClassVar[bool] = True

    alpha: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        _require(
            self.side_a == "trained" and not self.hadamard,
            "PiSSA starts A at the kernel: leave side_a and hadamard out",
        )


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(LowRankConfig):
    """VeRA (arXiv 2310.11454): random factors common to all kernels, and trained vectors.

    Attributes:
        d_initial: What the vectors on the side of A start at; those on the side of B start at 0.
    """

    rank: int = 256
    alpha: float | None = None
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        _require_float("d_initial", self.d_initial, 0.0, above=True)


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """Full fine-tuning: a whole delta for every target."""


@dataclass(frozen=True, kw_only=True)
class GenLoRAConfig(TwoSidedConfig):
    """GenLoRA (arXiv 2602.05709): basis vectors generated from one latent a side.

    Attributes:
        group_size: Length g of the contiguous groups that a latent is cut into.
        kernels: Number K of basis functions; if `basis` names a family, 8 by default.
        generator: `"groupwise"`: each generator is one network R^g -> R^g that serves every
            group; `"elementwise"`: every group has scalar functions of its own.
        basis: Family of basis functions: `"rbf"` (Gaussian RBFs, on R^g when groupwise),
            `"rbf_grid"`, `"fourier"`, `"chebyshev"` or `"bspline"` (K scalar functions of each
            coordinate), or `None` for the linear residual alone. `"auto"` is `"rbf"` if
            something asks for it (`kernels`, `bandwidth`, `rbf_init`, `residual=False`), else
            `None`: docs/when.md found the residual alone best.
        residual: Whether the generator has the linear residual.
        normalize: Scope of the instance-wise normalisation: the whole `"latent"`, each
            `"group"`, or `"none"`.
        share_generators: One set of generators for all layers in which a target occurs.
        share_across_targets: One set of generators for all targets as well: a groupwise generator
            reads groups, so it fits a side of any length.
        share_latents: One set of latents for all layers.
        share_inputs: Kernels that read the same input share the latent of side A. Which do is
            told by name: `q_proj`, `k_proj` and `v_proj` of one module, `gate_proj` and `up_proj`.
        latents_per_side: Number m of latents that a side has; a generator reads a group of each,
            R^(m g) -> R^g. With m = rank and g = 1 this is a mixture of LoRA's own vectors.
        latents: `"trained"`, or `"seeded"`: rebuilt from `seed`, never trained or stored.
        gates: A trained factor, 1 at first, for each basis vector of each kernel, so that kernels
            which share generators can weight them differently (as VeRA's vector d).
        latent_std: Standard deviation of the latents at first.
        rbf_init: Share, in [0, 1], of side A's initial variance that the basis functions carry;
            the residual carries the rest.
        trainable_centers: Whether the centres and bandwidths of `basis="rbf"` are trained.
            The centres of the elementwise generator lie on a fixed grid.
        bandwidth: Width h of the RBFs. `None` means sqrt(2) for `"rbf"` groupwise and the
            spacing of the grid (1 when K = 1) otherwise.
        center_basis: Subtract from each generated basis vector its mean.
        eps: Added to the variance in the normalisation.
    """

    rank: int = 64
    group_size: int = 32
    kernels: int | None = None
    generator: Literal["groupwise", "elementwise"] = "groupwise"
    basis: Literal["auto", "rbf", "rbf_grid", "fourier", "chebyshev", "bspline"] | None = "auto"
    residual: bool = True
    normalize: Literal["latent", "group", "none"] = "latent"
    share_generators: bool = True
    share_across_targets: bool = False
    share_latents: bool = False
    share_inputs: bool = False
    latents_per_side: int = 1
    latents: Literal["trained", "seeded"] = "trained"
    gates: bool = False
    latent_std: float = 0.02
    rbf_init: float = 0.0
    trainable_centers: bool = True
    bandwidth: float | None = None
    center_basis: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        _require_int("group_size", self.group_size, 1)
        asked_for = self.kernels is not None or self.bandwidth is not None or self.rbf_init != 0
        if self.basis == "auto" and (asked_for or not self.residual):
            object.__setattr__(self, "basis", "rbf")
        if self.kernels is None and self.basis in BASES:
            object.__setattr__(self, "kernels", 8)
        if self.kernels is not None:
            _require_int("kernels", self.kernels, 1)
        _require_int("latents_per_side", self.latents_per_side, 1)
        _require_choice("generator", self.generator, ("groupwise", "elementwise"))
        _require_choice("basis", self.basis, ("auto", *BASES, None))
        _require_choice("normalize", self.normalize, ("latent", "group", "none"))
        _require_choice("latents", self.latents, ("trained", "seeded"))
        _require(
            self.family is not None or self.residual,
            "basis=None needs residual=True: with neither, nothing generates a basis vector",
        )
        _require(
            not (self.share_generators and self.share_latents),
            "share_latents with share_generators would make all layers alike: "
            "set share_generators=False",
        )
        _require(
            not self.share_across_targets
            or (self.share_generators and self.generator == "groupwise"),
            'share_across_targets needs share_generators=True and generator="groupwise": other '
            "generators belong to a layer or to a side's length",
        )
        _require(
            not self.share_inputs or self.latents == self.side_a == "trained",
            'share_inputs needs latents="trained" and side_a="trained": what is seeded costs '
            "nothing",
        )
        _require(
            self.latents_per_side <= self.rank,
            f"latents_per_side ({self.latents_per_side}) exceeds rank ({self.rank}): LoRA of that "
            "rank has fewer parameters",
        )
        _require(
            self.latents_per_side == 1 or self.generator == "groupwise",
            'latents_per_side > 1 needs generator="groupwise"',
        )
        _require(
            not (self.normalize == "group" and self.group_size == 1 == self.latents_per_side),
            'normalize="group" with group_size=1 leaves nothing of a latent: '
            "use a larger group_size or another normalize",
        )
        _require_float("latent_std", self.latent_std, 0.0, above=True)
        _require_float("rbf_init", self.rbf_init, 0.0)
        _require(self.rbf_init <= 1.0, f"rbf_init must lie in [0, 1], got {self.rbf_init!r}")
        _require_float("eps", self.eps, 0.0)
        if self.bandwidth is not None:
            _require_float("bandwidth", self.bandwidth, 0.0, above=True)
            _require(
                self.basis in ("rbf", "rbf_grid", "bspline"),
                f"bandwidth means nothing to basis={self.basis!r}: leave it out",
            )

    @property
    def family(self) -> str | None:
        """The family of the basis functions, None where there are none."""
        return None if self.basis == "auto" else self.basis

    @property
    def basis_size(self) -> int:
        """Number K of basis functions, 0 where there are none."""
        return 0 if self.family is None else self.kernels or 0

    @property
    def joint(self) -> bool:
        """Whether the basis functions are RBFs on R^g, rather than of one coordinate each."""
        return self.family == "rbf" and self.generator == "groupwise"

    @property
    def group_inputs(self) -> int:
        """Number m g of values that a groupwise generator reads of a group."""
        return self.latents_per_side * self.group_size

    @property
    def attainable_rank(self) -> int | None:
        """Rank that one side can reach however long it is; None where its length decides.

        Groupwise, a basis vector lies in the span of (feature) x (unit vector of R^g).
        """
        if self.generator == "elementwise":
            return None
        features = self.basis_size * (1 if self.joint else self.group_inputs)
        return self.group_size * (features + (self.group_inputs if self.residual else 0))


METHODS: dict[str, type[AdapterConfig]] = {
    "genlora": GenLoRAConfig,
    "lora": LoRAConfig,
    "dora": DoRAConfig,
    "pissa": PiSSAConfig,
    "vera": VeRAConfig,
    "full": FullConfig,
}


def config_to_json(cfg: AdapterConfig) -> dict[str, Any]:
    """A JSON-able dict with every field and the `method`'s name."""
    method = next(name for name, kind in METHODS.items() if kind is type(cfg))
    fields = json.loads(json.dumps(dataclasses.asdict(cfg)))  # tuples to lists
    return {"method": method, **fields}


def config_from_json(data: Mapping[str, Any]) -> AdapterConfig:
    """Inverse of `config_to_json`.

    Raises:
        ValueError: On an unknown method or field, or a value that the field does not take.
    """
    fields = dict(data)
    method = fields.pop("method", None)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: this version knows {sorted(METHODS)}")
    kind = METHODS[method]
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}")
    return kind(**fields)
