"""The adapter: what is trained, and the factors that it stands for.

`generate_factors` is the only source of A and B: injection, merging and export all start there.
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
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from genlora_jax import generators
from genlora_jax.config import (
    AdapterConfig,
    DoRAConfig,
    FullConfig,
    GenLoRAConfig,
    LoRAConfig,
    LowRankConfig,
    PiSSAConfig,
    TwoSidedConfig,
    VeRAConfig,
)
from genlora_jax.methods import dora, full, genlora, lora, pissa, vera
from genlora_jax.methods.method import Kernels, Method, Tree
from genlora_jax.sharding import lay_out, state_specs
from genlora_jax.targets import AdapterSpec, find_targets, split_layer

METHODS: dict[type[AdapterConfig], Method] = {
    GenLoRAConfig: genlora,
    LoRAConfig: lora,
    DoRAConfig: dora,
    PiSSAConfig: pissa,
    VeRAConfig: vera,
    FullConfig: full,
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["trainable", "frozen"],
    meta_fields=["spec"],
)
@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A pytree: what is trained, what is kept but not trained, and a static part.

    Attributes:
        trainable: Float32 leaves. GenLoRA: `latents/TARGET/{a,b}` `[L, m n]` and
            `generators/TARGET/{a,b}/...` `[S, ...]`, where S is 1 if all layers share one, else
            L; what targets share lies under names of its own; perhaps `gates/TARGET` `[L, r]`.
            LoRA: `factors/TARGET/{a,b}`, `[L, d_in, r]` and `[L, r, d_out]`. A side A that is
            seeded has no leaf. DoRA also `magnitudes/TARGET` `[L, d_out]`. VeRA:
            `vectors/TARGET/{d,b}`, `[L, r]` and `[L, d_out]`. Full: `deltas/TARGET`
            `[L, d_in, d_out]`.
        frozen: Leaves that cannot be rebuilt from the seed; no gradient reaches them. PiSSA:
            `principal/TARGET/{a,b}`, what the factors started at.
        spec: The static part.
    """

    trainable: Tree
    frozen: Tree
    spec: AdapterSpec

    def replace(self, **fields: Any) -> "Adapter":
        """This adapter with other values in some fields."""
        return replace(self, **fields)


def base_fingerprint(params: Mapping[str, Any]) -> str:
    """Digest of the names and sizes of a base's parameters, the same for scanned and unrolled."""
    sizes: dict[str, int] = {}
    for path, leaf in flatten_dict(dict(params)).items():
        name, _ = split_layer(path)
        sizes[name] = sizes.get(name, 0) + int(np.prod(leaf.shape))
    return hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:16]


def adapter_spec(cfg: AdapterConfig, params: Mapping[str, Any]) -> AdapterSpec:
    """The static part of the adapter that a config makes on a base.

    Raises:
        ValueError: If the config's targets do not fit the base.
    """
    return AdapterSpec(
        targets=find_targets(cfg, params), seed=cfg.seed, fingerprint=base_fingerprint(params)
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
        mesh: Devices over which to lay the adapter as training on them does. It is made there: one
            device need not hold it whole.

    Returns:
        The adapter, float32.

    Raises:
        ValueError: If a target pattern matches nothing, a layer does not exist, or the method
            needs values of the base and there are none.
    """
    spec = adapter_spec(cfg, params)
    _warn_unattainable(cfg, spec)
    return _init(cfg, key, spec, _kernels(spec, params) if cfg.reads_base else {}, mesh)


def adapter_shapes(cfg: AdapterConfig, spec: AdapterSpec) -> Adapter:
    """What `init_adapter` returns for targets that are known already, as shapes."""
    kernels = {
        target.name: tuple(
            jax.ShapeDtypeStruct((len(kernel.layers), target.d_in, target.d_out), jnp.float32)
            for kernel in target.kernels
        )
        for target in spec.targets
    }
    return jax.eval_shape(
        lambda kernels: _init(cfg, jax.random.key(0), spec, kernels if cfg.reads_base else {}),
        kernels,
    )


def _kernels(spec: AdapterSpec, params: Mapping[str, Any]) -> dict[str, Kernels]:
    """The base's kernels `[layers, d_in, d_out]` of every target."""
    flat = flatten_dict(dict(params))
    found: dict[str, list[jax.Array]] = {}
    for target in spec.targets:
        for kernel in target.kernels:
            value = flat[(*kernel.path, "kernel")]
            if isinstance(value, jax.ShapeDtypeStruct):
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


@functools.partial(jax.jit, static_argnames=("cfg", "spec", "mesh"))
def _init(
    cfg: AdapterConfig,
    key: jax.Array,
    spec: AdapterSpec,
    kernels: dict[str, Kernels],
    mesh: Mesh | None = None,
) -> Adapter:
    trainable: Tree = {}
    frozen: Tree = {}
    for target in spec.targets:
        target_key = jax.random.fold_in(key, zlib.crc32(target.name.encode()))
        parts = _method(cfg).init(cfg, target_key, target, spec, kernels.get(target.name, ()))
        for tree, groups in zip((trainable, frozen), parts, strict=True):
            for group, named in groups.items():
                tree[group] = named | tree.get(group, {})
    return lay_out(mesh, Adapter(trainable=trainable, frozen=frozen, spec=spec), state_specs)


@functools.partial(jax.jit, static_argnames="cfg")
def generate_factors(cfg: AdapterConfig, adapter: Adapter) -> Tree:
    """The factors of every adapted kernel.

    Pure; works under `jit`, `grad` and `vmap` over the adapter's leaves.

    Args:
        cfg: The config that the adapter was made with.
        adapter: The adapter.

    Returns:
        A tree that mirrors the base's: at each adapted module `{"a": [..., d_in, r],
        "b": [..., r, d_out]}`, float32, with the scale folded into b; DoRA adds `"magnitude"`
        `[..., d_out]`. With `hadamard=True` they are `gain_a` and `gain_b`: the elements of the
        kernel are multiplied with 1 plus those of their product. Full fine-tuning has
        `{"delta": [..., d_in, d_out]}` instead. Under `nn.scan` the leading axis is the layer;
        layers that are not adapted have zeros.
    """
    flat: dict[tuple[str, ...], jax.Array] = {}
    groups = adapter.trainable | jax.lax.stop_gradient(adapter.frozen)
    for target in adapter.spec.targets:
        leaves = _method(cfg).factors(cfg, groups, target, adapter.spec)
        if isinstance(cfg, LowRankConfig):
            leaves["b"] = leaves["b"] * cfg.scale
        if isinstance(cfg, TwoSidedConfig) and cfg.hadamard:
            leaves = {"gain_a": leaves["a"] * math.sqrt(target.d_in), "gain_b": leaves["b"]}
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


def _method(cfg: AdapterConfig) -> Method:
    if type(cfg) not in METHODS:
        names = ", ".join(kind.__name__ for kind in METHODS)
        raise ValueError(f"{type(cfg).__name__} is the config of no method; there are {names}")
    return METHODS[type(cfg)]


def _place(value: jax.Array, stack: int | None, layers: tuple[int, ...]) -> jax.Array:
    """One kernel's factors in the shape in which the base holds that kernel."""
    if stack is None:
        return value[0]
    if len(layers) == stack:
        return value
    return jnp.zeros((stack, *value.shape[1:]), value.dtype).at[jnp.array(layers)].set(value)


def _warn_unattainable(cfg: AdapterConfig, spec: AdapterSpec) -> None:
    """Warns where a rank is asked for that the factors cannot have."""
    if not isinstance(cfg, TwoSidedConfig):  # VeRA's rank is a number of vectors
        return
    for target in spec.targets:
        for side, n in (("a", target.d_in), ("b", target.d_out)):
            limit = n if side == "a" and cfg.side_a == "seeded" else attainable_rank(cfg, n)
            if cfg.rank > limit:
                warnings.warn(
                    f"rank {cfg.rank} exceeds {limit}, the rank that a side of length {n} of "
                    f"{target.name} can reach with these settings: parameters are wasted",
                    stacklevel=3,
                )
                return


def attainable_rank(cfg: LowRankConfig, n: int) -> int:
    """Largest rank that a side of length n can have under a config."""
    if not isinstance(cfg, GenLoRAConfig):
        return n
    if cfg.attainable_rank is not None:
        return min(n, cfg.attainable_rank)
    return min(n, generators.group_count(cfg, n) * (cfg.basis_size + cfg.residual))
