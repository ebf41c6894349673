"""Compression: latents and generators fitted to the factors of an adapter that exists already."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.adapter import Adapter, generate_factors, init_adapter
from genlora_jax.analysis import target_factors
from genlora_jax.deltas import FitReport, Triple, decompose_target, report, squared_error
from genlora_jax.factors import by_module, refuse_uncombinable
from genlora_jax.merge import pair_kernels
from genlora_jax.methods.config import Groups
from genlora_jax.methods.genlora import GenLoRAConfig
from genlora_jax.methods.lora import LoRAConfig
from genlora_jax.targets import is_scanned, kernel_path

_NOISE = 0.3  # of the generators at first, over the identity in the first of them


def compress(
    cfg: GenLoRAConfig | LoRAConfig,
    factors: Mapping[str, Any],
    *,
    params: Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
    steps: int = 400,
    learning_rate: float = 0.1,
) -> tuple[Adapter, FitReport]:
    """Compresses factors, of a trained LoRA say, to an adapter of fewer parameters.

    What is fitted is the delta of each layer, never A and B themselves. GenLoRA is fitted by Adam
    from each delta's first pair of singular vectors; no delta is ever formed. For LoRA see
    `lora_from_factors`.

    Args:
        cfg: A `GenLoRAConfig`, whose targets and layers are those of `factors`, less the layers
            without a delta; or a `LoRAConfig`.
        factors: Result of `import_peft`, or of `generate_factors`.
        params: The base's parameters, of which names and shapes matter. Without them the adapter
            fits a base of these kernels alone, and loads into no other.
        key: PRNG key of the initial generators.
        steps: Number of steps.
        learning_rate: Peak of the rate, relative to the size of what it changes.

    Returns:
        The adapter, and how well it does.

    Raises:
        ValueError: If the method is another, a side is not trained, or targets do not match.
    """
    if isinstance(cfg, LoRAConfig):
        return lora_from_factors(cfg, factors, params=params, key=key)
    if not isinstance(cfg, GenLoRAConfig):
        raise ValueError(f"compress makes GenLoRA and LoRA adapters, not {type(cfg).__name__}'s")
    if cfg.share_across_targets or cfg.gates:
        raise ValueError("compress needs share_across_targets=False and gates=False")
    if steps < 1 or not learning_rate > 0:
        raise ValueError(f"steps ({steps}) and learning_rate ({learning_rate}) must be positive")
    key = jax.random.key(0) if key is None else key
    adapter = _empty_adapter(cfg, factors, params, key)
    deltas = {  # a latent needs a direction, so that no delta may be zero
        target.name: decompose_target(factors, target, zero=False)
        for target in adapter.spec.targets
    }
    in_float32 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), deltas)
    adapter = _start(cfg, adapter, in_float32, key)
    trained, losses = minimise(
        _loss,
        adapter.trainable,
        (adapter.replace(trainable={}), in_float32),
        steps=steps,
        learning_rate=learning_rate,
    )
    adapter = adapter.replace(trainable=trained)
    return adapter, report(adapter, deltas, np.asarray(losses))


fit = compress  # the name of version 0.1


def lora_from_factors(
    cfg: LoRAConfig,
    factors: Mapping[str, Any],
    *,
    params: Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
) -> tuple[Adapter, FitReport]:
    """A LoRA adapter that stands for factors, to go on training a PEFT adapter, say.

    With the factors' rank or more it takes A and B as they are (B over its own scale). With a lower
    rank it truncates the singular values of each delta, which is the best there is.

    Args:
        cfg: Its targets and layers are those of `factors`. Layers beyond those begin anew.
        factors: Result of `import_peft`, or of `generate_factors`.
        params: As for `compress`.
        key: PRNG key of what begins anew.

    Returns:
        The adapter, and how well it does.

    Raises:
        ValueError: If a side is not trained, or the targets and the factors do not match.
    """
    if not cfg.starts_from_peft:
        raise ValueError(f"compress makes GenLoRA and LoRA adapters, not {type(cfg).__name__}'s")
    key = jax.random.key(0) if key is None else key
    adapter = _empty_adapter(cfg, factors, params, key)
    factors = _with_missing_layers(adapter, factors)
    trained, deltas = {}, {}
    for target in adapter.spec.targets:
        sides = target_factors(factors, target)
        deltas[target.name] = decompose_target(factors, target, zero=True)
        start = adapter.trainable["factors"][target.name]
        trained[target.name] = _lora(cfg, sides, deltas[target.name], start)
    adapter = adapter.replace(trainable={"factors": trained})
    return adapter, report(adapter, deltas, np.zeros(0, np.float32))


def _empty_adapter(
    cfg: GenLoRAConfig | LoRAConfig,
    factors: Mapping[str, Any],
    params: Mapping[str, Any] | None,
    key: jax.Array,
) -> Adapter:
    """A new adapter with a place for every delta."""
    if cfg.side_a != "trained":
        raise ValueError('compress needs side_a="trained": it changes both sides')
    if cfg.hadamard:
        raise ValueError("compress needs hadamard=False: it knows deltas, not the kernels")
    kernels = _kernel_shapes(factors)
    if params is not None:
        pair_kernels(flatten_dict(dict(params)), factors)  # for its checks
    adapter = init_adapter(cfg, key, unflatten_dict(kernels) if params is None else params)
    _check_covered(adapter, factors)
    return adapter


@functools.partial(jax.jit, static_argnames=("loss", "steps", "learning_rate"))
def minimise(
    loss: Callable[..., jax.Array], start: Groups, data: Any, *, steps: int, learning_rate: float
) -> tuple[Groups, jax.Array]:
    """Adam with warm-up and cosine decay, its steps relative to each leaf's root mean square.

    Latents are of size 1 and generators as small as the deltas that they make: one relative
    rate serves both.

    Args:
        loss: `loss(tree, data)`, a scalar.
        start: Where to start.
        data: What the loss depends on besides.
        steps: Number of steps.
        learning_rate: Peak of the relative rate.

    Returns:
        The tree after the last step, and the loss before each, `[steps]`.
    """
    warmup = max(steps // 20, 1)
    schedule = optax.warmup_cosine_decay_schedule(
        learning_rate / warmup, learning_rate, warmup - 1, max(steps, warmup)
    )
    optimizer = optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(schedule),
    )

    def step(carry: tuple[Groups, Any], _: None) -> tuple[tuple[Groups, Any], jax.Array]:
        tree, state = carry
        value, gradient = jax.value_and_grad(loss)(tree, data)
        with jax.numpy_dtype_promotion("standard"):  # optax takes floats to an integer power
            updates, state = optimizer.update(gradient, state, tree)
        return (optax.apply_updates(tree, updates), state), value

    (tree, _), values = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return tree, values


def _kernel_shapes(factors: Mapping[str, Any]) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """The shapes of the adapted kernels, by their paths: a base that has nothing else."""
    refuse_uncombinable(factors, "compress")
    shapes = {}
    for path, (_, leaves) in by_module(factors).items():
        shape = (*leaves["a"].shape[:-1], leaves["b"].shape[-1])
        shapes[kernel_path(path)] = jax.ShapeDtypeStruct(shape, jnp.float32)
    # Factors are a Dense's. A bias says so where kernels alone do not tell that they are a stack.
    return shapes | {
        (*path[:-1], "bias"): jax.ShapeDtypeStruct((kernel.shape[0], kernel.shape[2]), jnp.float32)
        for path, kernel in shapes.items()
        if len(kernel.shape) == 3 and not is_scanned(path[:-1], shapes)
    }


def _check_covered(adapter: Adapter, factors: Mapping[str, Any]) -> None:
    """Raises ValueError if the adapter has no place for a delta; one that is zero needs none."""
    kernels = {k.path: k for target in adapter.spec.targets for k in target.kernels}
    missed = []
    for path, (_, leaves) in sorted(by_module(factors).items(), key=lambda item: item[0]):
        kernel, name = kernels.get(path), ".".join(path)
        there = np.logical_and(*(np.any(leaves[side] != 0, axis=(-1, -2)) for side in "ab"))
        if kernel is None:
            missed += [name] * bool(there.any())
        elif kernel.stack is not None:
            left = sorted(set(np.flatnonzero(there).tolist()) - set(kernel.layers))
            missed += [f"{name}, layer {layer}" for layer in left]
    if missed:
        raise ValueError(f"the config's targets or layers leave out factors of {'; '.join(missed)}")


def _with_missing_layers(adapter: Adapter, factors: Mapping[str, Any]) -> dict[str, Any]:
    """Zeros for what an unrolled base has of a target and the factors have not, as in a stack."""
    flat = flatten_dict(dict(factors))
    for target in adapter.spec.targets:
        there = [kernel.path for kernel in target.kernels if (*kernel.path, "a") in flat]
        for kernel in target.kernels if there else ():
            for side in "ab":
                flat.setdefault((*kernel.path, side), jnp.zeros_like(flat[(*there[0], side)]))
    return unflatten_dict(flat)


def _lora(
    cfg: LoRAConfig,
    factors: tuple[jax.Array, jax.Array],
    delta: Triple[np.ndarray],
    start: Groups,
) -> dict[str, jax.Array]:
    """The best LoRA of the config's rank: the factors themselves where there is room for them.

    What they leave of A is random, as in any LoRA: zeros on both sides would never be trained.
    """
    a, b = factors
    if a.shape[-1] > cfg.rank:
        u, s, v = (x[..., : cfg.rank] for x in delta)
        half = np.sqrt(s)[:, None]
        a, b = (jnp.asarray(side, jnp.float32) for side in (u * half, (v * half).mT))
    more = cfg.rank - a.shape[-1]
    a, b = jnp.pad(a, ((0, 0), (0, 0), (0, more))), jnp.pad(b, ((0, 0), (0, more), (0, 0)))
    idle = ~a.any(axis=1, keepdims=True) & ~b.any(axis=2)[:, None]
    return {"a": jnp.where(idle, start["a"], a), "b": b / cfg.scale}


def _start(
    cfg: GenLoRAConfig, adapter: Adapter, deltas: Mapping[str, Triple[jax.Array]], key: jax.Array
) -> Adapter:
    """Latents from the first singular vectors, and generators of which the first passes them on."""
    trainable = jax.tree.map(lambda leaf: leaf, adapter.trainable)
    targets = {target.name: target for target in adapter.spec.targets}
    for i, (name, (u, s, v)) in enumerate(deltas.items()):
        largest = s[:, 0].mean()
        for side, vectors in (("a", u), ("b", v)):
            n = vectors.shape[1]
            generator = trainable["generators"][name][side]
            if "latents" in trainable:
                top = vectors[..., 0] * jnp.sqrt(s[:, :1] / largest)
                if cfg.share_latents:
                    top = _common_direction(top)
                z = trainable["latents"][name][side] = math.sqrt(n) * top
                if cfg.centers == "latents":
                    generator |= cfg.initial_centers(targets[name], side, z)
            size = jnp.sqrt(largest / n / (1.0 if side == "a" else cfg.scale**2))
            for j, part in enumerate(p for p in ("residual", "weights") if p in generator):
                part_key = jax.random.fold_in(key, 4 * i + 2 * j + (side == "b"))
                noise = jax.random.normal(part_key, generator[part].shape)
                value = _NOISE * noise / math.sqrt(cfg.group_size)
                if part == "residual" and cfg.generator == "elementwise":
                    value = value.at[:, 0].add(1.0)
                elif part == "residual":
                    value = value.at[:, 0].add(jnp.eye(cfg.group_size))
                generator[part] = size * value
    return adapter.replace(trainable=trainable)


def _common_direction(vectors: jax.Array) -> jax.Array:
    """The direction `[1, n]` that is nearest to vectors `[L, n]`, and points as most of them do.

    LAPACK leaves the sign open, and processors differ in it.
    """
    direction = np.linalg.svd(np.asarray(vectors, np.float64), full_matrices=False)[2][:1]
    sign = -1.0 if (vectors @ direction.T).sum() < 0 else 1.0
    return jnp.asarray(sign * direction, jnp.float32)


def _loss(trainable: Groups, data: tuple[Adapter, dict[str, Triple[jax.Array]]]) -> Any:
    adapter, deltas = data
    adapter = adapter.replace(trainable=trainable)
    factors = generate_factors(adapter.config, adapter)
    targets = adapter.spec.targets
    with jax.default_matmul_precision("highest"):
        squares = [
            squared_error(*target_factors(factors, target), deltas[target.name]).mean()
            for target in targets
        ]
    return sum(squares) / len(targets)
