"""GenLoRA (arXiv 2602.05709): factors generated from a latent a side."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from genlora_jax import generators
from genlora_jax.basis_functions import FAMILIES
from genlora_jax.factors.kind import Leaves
from genlora_jax.methods.config import Groups, Kernels, TwoSidedConfig
from genlora_jax.seeded_random import seeded_normal
from genlora_jax.targets import Target
from genlora_jax.validation import require, require_choice, require_float, require_int


@dataclass(frozen=True, kw_only=True)
class GenLoRAConfig(TwoSidedConfig):
    """GenLoRA (arXiv 2602.05709): basis vectors generated from one latent a side.

    The settings that matter come first: `rank` and `group_size` set how much can be learnt,
    `share_generators` and `share_across_targets` what it costs. docs/results.md says how to choose.

    Attributes:
        group_size: Length g of the contiguous groups that a latent is split into.
        share_generators: One set of generators for all layers in which a target occurs.
        share_across_targets: One set of generators for all targets as well: a groupwise generator
            reads groups, so it fits a side of any length.
        gates: A trained factor, 1 at first, for each basis vector of each kernel, so that kernels
            which share generators can weight them differently (as VeRA's vector d).
        latents: `"trained"`, or `"seeded"`: rebuilt from `seed`, never trained or stored.
        share_latents: One set of latents for all layers.
        kernels: Number K of basis functions; 0 leaves the linear residual alone.
        basis: Family of the basis functions: `"rbf"` (Gaussian RBFs, on R^g when groupwise),
            `"fourier"`, `"chebyshev"` or `"bspline"` (K scalar functions of each coordinate); see
            `genlora_jax.basis_functions`.
        generator: Research option. `"groupwise"`: each generator is one network R^g -> R^g that
            serves every group; `"elementwise"`: every group has scalar functions of its own.
        residual: Research option. Whether the generator has the linear residual.
        normalize: Research option. Scope of the instance-wise normalisation: the whole `"latent"`,
            each `"group"`, or `"none"`.
        latent_std: Research option. Standard deviation of the latents at first.
        rbf_init: Research option. Share, in [0, 1], of side A's initial variance that the basis
            functions carry; the residual carries the rest.
        trainable_centers: Research option. Whether the centres, bandwidths and projections of
            groupwise RBFs are trained; else they are rebuilt from `seed`, never trained or stored.
            The centres of the elementwise generator lie on a fixed grid.
        bandwidth: Research option. Width h of the functions. `None` means sqrt(2) for groupwise
            RBFs and the spacing of the grid (1 when K = 1) otherwise. For groupwise RBFs also
            `"spread"`: h_k^2 is the standard deviation of `|t - c_k|^2 / g` over the groups, so
            that they are no flatter in many dimensions than in few.
        standardize: Research option. Whether each groupwise feature has mean 0 and variance 1 over
            the groups of a latent, which must have two or more.
        projection: Research option. Dimensions d of groupwise RBFs: each sees a group through a
            projection of its own, trained as centres are, `P_k t` in R^d (d = 1: ridge functions).
            None: all of the group.
        centers: Research option. Where the centres of groupwise RBFs start: drawn from N(0, 1)
            (`"random"`), or at groups of the initial `"latents"`.
        center_basis: Research option. Subtract from each generated basis vector its mean.
        eps: Research option. Added to the variance in the normalisation.
    """

    has_generators: ClassVar[bool] = True

    rank: int = 64
    group_size: int = 32
    share_generators: bool = True
    share_across_targets: bool = False
    gates: bool = False
    latents: Literal["trained", "seeded"] = "trained"
    share_latents: bool = False
    kernels: int = 0
    basis: str = "rbf"
    generator: Literal["groupwise", "elementwise"] = "groupwise"
    residual: bool = True
    normalize: Literal["latent", "group", "none"] = "latent"
    latent_std: float = 0.02
    rbf_init: float = 0.0
    trainable_centers: bool = True
    bandwidth: float | Literal["spread"] | None = None
    standardize: bool = False
    projection: int | None = None
    centers: Literal["random", "latents"] = "random"
    center_basis: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        super().__post_init__()
        require_int("group_size", self.group_size, 1)
        require_int("kernels", self.kernels, 0)
        require_choice("basis", self.basis, FAMILIES)
        require_choice("generator", self.generator, ("groupwise", "elementwise"))
        require_choice("normalize", self.normalize, ("latent", "group", "none"))
        require_choice("latents", self.latents, ("trained", "seeded"))
        require_choice("centers", self.centers, ("random", "latents"))
        require_float("latent_std", self.latent_std, 0.0, above=True)
        require_float("rbf_init", self.rbf_init, 0.0)
        require(self.rbf_init <= 1.0, f"rbf_init must lie in [0, 1], got {self.rbf_init!r}")
        require_float("eps", self.eps, 0.0)
        generators.check_basis(self)
        require(
            not (self.share_generators and self.share_latents),
            "share_latents with share_generators would make all layers alike: "
            "set share_generators=False",
        )
        require(
            not self.share_across_targets
            or (self.share_generators and self.generator == "groupwise"),
            'share_across_targets needs share_generators=True and generator="groupwise": other '
            "generators belong to a layer or to a side's length",
        )
        require(
            not (self.normalize == "group" and self.group_size == 1),
            'normalize="group" with group_size=1 leaves nothing of a latent: '
            "use a larger group_size or another normalize",
        )

    @classmethod
    def paper(cls, **fields: Any) -> "GenLoRAConfig":
        """The paper's generator: RBFs beside the residual, as wide as the distances spread."""
        return cls(**(dict[str, Any](kernels=16, bandwidth="spread") | fields))

    @property
    def joint(self) -> bool:
        """Whether the basis functions are RBFs on R^g, rather than of one coordinate each."""
        return self.kernels > 0 and self.basis == "rbf" and self.generator == "groupwise"

    def attainable_rank(self, n: int, side: Literal["a", "b"] = "a") -> int:
        """Largest rank that a side of length n can have.

        Groupwise, a basis vector lies in the span of (feature) x (unit vector of R^g).
        """
        if side == "a" and self.side_a == "seeded":
            return n
        if self.generator == "elementwise":
            return min(n, generators.group_count(self, n) * (self.kernels + self.residual))
        features = self.kernels * (1 if self.joint else self.group_size)
        return min(n, self.group_size * (features + self.group_size * self.residual))

    @classmethod
    def from_older(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this version for those that version 0.1 stored."""
        fields = dict(fields)
        for field, kept in (("latents_per_side", 1), ("share_inputs", False)):
            if fields.pop(field, kept) != kept:
                raise ValueError(f"{field} is no longer supported: merge with version 0.1")
        if "basis" in fields and fields["basis"] in (None, "auto"):
            fields |= {"basis": "rbf", "kernels": 0, "rbf_init": 0.0}
        if fields.get("kernels", 0) is None:
            fields["kernels"] = 8  # what a family's name alone stood for
        if fields.get("basis") == "rbf_grid":
            require(
                fields.get("generator") == "elementwise",
                "basis 'rbf_grid' with a groupwise generator is no longer supported: merge with "
                "version 0.1",
            )
            fields["basis"] = "rbf"
        return fields

    def init(
        self, key: jax.Array, target: Target, targets: tuple[Target, ...], kernels: Kernels
    ) -> tuple[Groups, Groups]:
        """Random latents and side A; the generators of side B are zero, so that the delta is."""
        lengths = self._lengths(target)
        normals = self._normals(key, target)
        latents, weights = {}, {}
        for side, n in lengths.items():
            generators.check_side(self, f"{target.name}/{side}", n)
            weights[side] = {
                part: jnp.zeros((self._sets(target), *shape), jnp.float32)
                for part, shape in generators.weight_shapes(self, n).items()
            }
            if self.latents == "seeded":
                z = self._seeded_latents(target, side)
            else:
                z = latents[side] = self.latent_std * normals[f"latents/{side}"]
            served = self._served(target, z)
            # Of shared generators the first target's are kept.
            first = not self.share_across_targets or target == targets[0]
            centers = self.initial_centers(target, side, z, at_groups=first)
            if self.joint and self.trainable_centers:
                weights[side] |= centers
            if side == "a":
                noise = {part: x for part, x in normals.items() if not part.startswith("latents/")}
                scale = functools.partial(generators.init_weights, self)
                weights[side] |= jax.vmap(scale)(noise, served, centers)
        groups: Groups = {"generators": {self._generator_name(target): weights}}
        if latents:
            groups["latents"] = {target.name: latents}
        if self.gates:
            groups["gates"] = {target.name: jnp.ones((target.depth, self.rank), jnp.float32)}
        return groups, {}

    def factors(self, groups: Groups, target: Target, targets: tuple[Target, ...]) -> Leaves:
        """The bases that the generators make of the latents, B's transposed; A may be random."""
        bases = {side: self._bases(groups, target, side) for side in self._lengths(target)}
        b = bases["b"].swapaxes(-1, -2)
        if self.gates:
            b = b * groups["gates"][target.name][:, :, None]
        if self.side_a == "seeded":
            shape = (target.depth, target.d_in, self.rank)
            a = seeded_normal(self.seed, f"{target.name}/a", shape) / math.sqrt(target.d_in)
        elif self.share_across_targets:
            # They were scaled to variance 1 / d_in for the first target's side A.
            a = bases["a"] * math.sqrt(targets[0].d_in / target.d_in)
        else:
            a = bases["a"]
        return self.scaled(a, b)

    def _bases(self, groups: Groups, target: Target, side: Literal["a", "b"]) -> jax.Array:
        """The bases of one side of all layers, `[L, n, r]`."""
        name = self._generator_name(target)
        weights = groups["generators"][name][side]
        seeded = self.latents == "seeded"
        z = self._seeded_latents(target, side) if seeded else groups["latents"][target.name][side]
        fixed = {} if self.trainable_centers else generators.fixed_centers(self, f"{name}/{side}")

        def basis(latent: jax.Array, layer_weights: Leaves) -> jax.Array:
            return generators.generate(self, latent, fixed | layer_weights)

        # A shared operand is not mapped, so features are computed once per latent and a shared
        # set of generators is applied to all layers in one product.
        if self.share_generators:
            return jax.vmap(basis, in_axes=(0, None))(z, jax.tree.map(lambda x: x[0], weights))
        if self.share_latents:
            return jax.vmap(basis, in_axes=(None, 0))(z[0], weights)
        return jax.vmap(basis)(z, weights)

    def _served(self, target: Target, z: jax.Array) -> jax.Array:
        """The latents that each set of generators serves, `[S, layers, n]`."""
        # A set serves all layers, or one; the only row of shared latents serves every set.
        if self.share_generators:
            return z[None]
        return jnp.broadcast_to(z, (self._sets(target), z.shape[1]))[:, None]

    def initial_centers(
        self, target: Target, side: str, z: jax.Array, *, at_groups: bool = True
    ) -> Leaves:
        """Each set's centres, widths and projections, `[S, ...]`, for a side's latents.

        With `at_groups=False` centres are drawn from N(0, 1) whatever `centers` says.

        Raises:
            ValueError: If the latents have fewer groups than there are centres.
        """
        name = f"{self._generator_name(target)}/{side}"
        drawn, served = generators.fixed_centers(self, name), self._served(target, z)
        if self.centers == "latents" and at_groups:
            generators.check_centers(self, f"{target.name}/{side}", *served.shape[1:])
            place = functools.partial(generators.centers_at_groups, self, name, drawn=drawn)
            return jax.vmap(place)(served)
        sets = len(served)
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (sets, *x.shape)), drawn)

    def _normals(self, key: jax.Array, target: Target) -> Leaves:
        """N(0, 1) numbers for all that is random at first, by name.

        They are drawn at once: one sampler is one to compile.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        lengths = self._lengths(target)
        if self.latents == "trained":
            rows = 1 if self.share_latents else target.depth
            shapes |= {f"latents/{side}": (rows, n) for side, n in lengths.items()}
        if "a" in lengths:
            shares = generators.init_shares(self)
            for part, shape in generators.weight_shapes(self, target.d_in).items():
                if shares[part] > 0:
                    shapes[part] = (self._sets(target), *shape)
        if not shapes:  # all that is random is seeded
            return {}
        sizes = [math.prod(shape) for shape in shapes.values()]
        flat = jax.random.normal(key, (sum(sizes),), jnp.float32)
        parts = jnp.split(flat, np.cumsum(sizes)[:-1])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def _seeded_latents(self, target: Target, side: Literal["a", "b"]) -> jax.Array:
        shape = (1 if self.share_latents else target.depth, target.lengths[side])
        return self.latent_std * seeded_normal(self.seed, f"{target.name}/{side}/latents", shape)

    def _lengths(self, target: Target) -> dict[Literal["a", "b"], int]:
        """Lengths of the sides that are generated."""
        return {s: n for s, n in target.lengths.items() if s == "b" or self.side_a == "trained"}

    def _sets(self, target: Target) -> int:
        """Number S of sets of generators of a target."""
        return 1 if self.share_generators else target.depth

    def _generator_name(self, target: Target) -> str:
        """The name under which a target's generators are stored."""
        return "shared" if self.share_across_targets else target.name
