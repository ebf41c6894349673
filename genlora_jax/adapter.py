"""The adapter: what is trained, and the factors that it stands for.

`generate_factors` is the only source of factors: injection, merging and export all start there.
"""

import functools
import hashlib
import math
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from genlora_jax.base.quantise import Quantisation, quantisation_of
from genlora_jax.methods.config import AdapterConfig, Groups, Kernels
from genlora_jax.sharding import constrain_tree, state_specs
from genlora_jax.targets import Target, find_targets, kernel_path, split_layer


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The static part of an adapter: hashable, no arrays.

    Attributes:
        config: What the adapter was made with.
        targets: What is adapted and where it lies in the base.
        fingerprint: Digest of the names and sizes of all the base's parameters.
        quantisation: How the base's kernels are quantised; None if they are not.
    """

    config: AdapterConfig
    targets: tuple[Target, ...]
    fingerprint: str
    quantisation: Quantisation | None = None

    @property
    def seed(self) -> int:
        """Seed of what is rebuilt rather than stored."""
        return self.config.seed


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["trainable", "frozen"],
    meta_fields=["spec"],
)
@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A pytree: what is trained, what is kept but not trained, and a static part.

    Attributes:
        trainable: Float32 leaves. GenLoRA: `latents/TARGET/{a,b}` `[L, n]` and
            `generators/TARGET/{a,b}/...` `[S, ...]`, where S is 1 if all layers share one, else
            L; perhaps `gates/TARGET` `[L, r]`.
            LoRA: `factors/TARGET/{a,b}`, `[L, d_in, r]` and `[L, r, d_out]`. A side A that is
            seeded has no leaf. DoRA also `magnitudes/TARGET` `[L, d_out]`. PiSSA and Sine-LoRA as
            LoRA; tied LoRA too, with L = 1 on the tied side. VeRA: `vectors/TARGET/{d,b}`,
            `[L, r]` and `[L, d_out]`. Uni-LoRA: `vectors/shared` `[size]`. NOLA:
            `mixtures/TARGET/{a,b}` `[L, count]`. Full: `deltas/TARGET` `[L, d_in, d_out]`.
        frozen: Leaves that cannot be rebuilt from the seed; no gradient reaches them. PiSSA:
            `principal/TARGET/{a,b}`, what the factors started at. Uni-LoRA: `initial/shared`, what
            the vector did.
        spec: The static part.
    """

    trainable: Groups
    frozen: Groups
    spec: AdapterSpec

    @property
    def config(self) -> AdapterConfig:
        """What the adapter was made with."""
        return self.spec.config

    def replace(self, **fields: Any) -> "Adapter":
        """This adapter with other values in some fields."""
        return replace(self, **fields)

    def with_config(self, config: AdapterConfig) -> "Adapter":
        """This adapter with another config of the same method, such as another alpha."""
        return replace(self, spec=replace(self.spec, config=config))


def base_fingerprint(params: Mapping[str, Any]) -> str:
    """Digest of the names and sizes of a base's parameters, the same for scanned and unrolled."""
    sizes: dict[str, int] = {}
    for path, leaf in flatten_dict(dict(params)).items():
        name, _ = split_layer(path)
        sizes[name] = sizes.get(name, 0) + math.prod(leaf.shape)
    return hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:16]


def adapter_spec(cfg: AdapterConfig, params: Mapping[str, Any]) -> AdapterSpec:
    """The static part of the adapter that a config makes on a base.

    Raises:
        ValueError: If the config's targets do not fit the base.
    """
    quantisation = quantisation_of(params)
    return AdapterSpec(
        config=cfg,
        targets=find_targets(cfg, params),
        fingerprint=base_fingerprint(params),
        quantisation=quantisation if quantisation and quantisation.rounds else None,
    )


def init_adapter(
    cfg: AdapterConfig, key: jax.Array, params: Mapping[str, Any], *, mesh: Mesh | None = None
) -> Adapter:
    """A new adapter whose delta is zero: exactly, or to rounding where the base is read.

    Args:
        cfg: Method and settings.
        key: PRNG key of the trained values.
        params: The base's parameters. For methods that do not read the base (all but DoRA and
            PiSSA) only names and shapes matter, so the result of `jax.eval_shape` will do.
        mesh: Devices over which the adapter is sharded, as in training on them. It is made there:
            one device need not hold it whole.

    Returns:
        The adapter, float32.

    Raises:
        ValueError: If a target pattern matches nothing or a module that is no Dense, a layer does
            not exist, or the method needs values of the base and there are none.
    """
    spec = adapter_spec(cfg, params)
    _warn_unattainable(spec)
    return _init(key, spec, _kernels(spec, params) if cfg.reads_base else {}, mesh)


def adapter_shapes(spec: AdapterSpec) -> Adapter:
    """What `init_adapter` returns for targets that are known already, as shapes."""
    kernels = {
        target.name: tuple(
            jax.ShapeDtypeStruct((len(kernel.layers), target.d_in, target.d_out), jnp.float32)
            for kernel in target.kernels
        )
        for target in spec.targets
    }
    return jax.eval_shape(
        lambda kernels: _init(jax.random.key(0), spec, kernels if spec.config.reads_base else {}),
        kernels,
    )


def _kernels(spec: AdapterSpec, params: Mapping[str, Any]) -> dict[str, Kernels]:
    """The base's kernels `[layers, d_in, d_out]` of every target."""
    flat = flatten_dict(dict(params))
    found: dict[str, list[jax.Array]] = {}
    for target in spec.targets:
        for kernel in target.kernels:
            value = flat[kernel_path(kernel.path)]
            if isinstance(jax.tree.leaves(value)[0], jax.ShapeDtypeStruct):
                raise ValueError(
                    "this method starts at values of the base: init_adapter needs the parameters "
                    "themselves, not their shapes (for shapes of the adapter, use jax.eval_shape)"
                )
            if kernel.stack is None:
                value = value[None]
            elif len(kernel.layers) < kernel.stack:
                value = value[jnp.array(kernel.layers)]
            found.setdefault(target.name, []).append(value)
    return {name: tuple(values) for name, values in found.items()}


@functools.partial(jax.jit, static_argnames=("spec", "mesh"))
def _init(
    key: jax.Array, spec: AdapterSpec, kernels: dict[str, Kernels], mesh: Mesh | None = None
) -> Adapter:
    trainable: Groups = {}
    frozen: Groups = {}
    for target in spec.targets:
        target_key = jax.random.fold_in(key, zlib.crc32(target.name.encode()))
        parts = spec.config.init(target_key, target, spec.targets, kernels.get(target.name, ()))
        for tree, groups in zip((trainable, frozen), parts, strict=True):
            for group, named in groups.items():
                tree[group] = named | tree.get(group, {})
    return constrain_tree(mesh, Adapter(trainable=trainable, frozen=frozen, spec=spec), state_specs)


@functools.partial(jax.jit, static_argnames="cfg")
def generate_factors(cfg: AdapterConfig, adapter: Adapter) -> dict[str, Any]:
    """The factors of every adapted kernel.

    Pure; works under `jit`, `grad` and `vmap` over the adapter's leaves.

    Args:
        cfg: The config that the adapter was made with, `adapter.config`; its dropout may differ.
        adapter: The adapter.

    Returns:
        A tree that mirrors the base's: at each adapted module `{"a": [..., d_in, r],
        "b": [..., r, d_out]}`, float32, with the scale folded into b; or the leaves of another
        kind of `genlora_jax.factors`: DoRA, HiRA (`hadamard=True`), a whole delta. Under `nn.scan`
        the leading axis is the layer; layers that are not adapted have zeros.

    Raises:
        ValueError: If the config is not the adapter's; names the first field that differs.
    """
    cfg.check_is(adapter.config)
    flat: dict[tuple[str, ...], jax.Array] = {}
    groups = adapter.trainable | jax.lax.stop_gradient(adapter.frozen)
    for target in adapter.spec.targets:
        leaves = cfg.factors(groups, target, adapter.spec.targets)
        start = 0
        for kernel in target.kernels:
            stop = start + len(kernel.layers)
            for leaf, value in leaves.items():
                flat[(*kernel.path, leaf)] = _place(value[start:stop], kernel.stack, kernel.layers)
            start = stop
    return unflatten_dict(flat)


def count_parameters(adapter: Adapter) -> int:
    """Number of trained values."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter.trainable))


def _place(value: jax.Array, stack: int | None, layers: tuple[int, ...]) -> jax.Array:
    """One kernel's factors in the shape in which the base holds that kernel."""
    if stack is None:
        return value[0]
    if len(layers) == stack:
        return value
    return jnp.zeros((stack, *value.shape[1:]), value.dtype).at[jnp.array(layers)].set(value)


def _warn_unattainable(spec: AdapterSpec) -> None:
    """Warns where a rank is asked for that the factors cannot have."""
    for target in spec.targets:
        for side, n in target.lengths.items():
            limit = spec.config.attainable_rank(n, side)
            rank = getattr(spec.config, "rank", 0)
            if limit is not None and rank > limit:
                warnings.warn(
                    f"rank {rank} exceeds {limit}, the rank that a side of length {n} of "
                    f"{target.name} can reach with these settings: parameters are wasted",
                    stacklevel=3,
                )
                return
