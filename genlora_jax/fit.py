"""Compression: latents and generators fitted to the factors of an adapter that exists already."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.adapter import Adapter, Tree, count_parameters, generate_factors, init_adapter
from genlora_jax.analysis import decompose, target_factors
from genlora_jax.config import AdapterConfig, GenLoRAConfig, LoRAConfig, LowRankConfig
from genlora_jax.factors import by_module, refuse_other_than_products
from genlora_jax.merge import pair_kernels
from genlora_jax.targets import Target

Triple = tuple[jax.Array, jax.Array, jax.Array]  # U [L, d_in, k], s [L, k], V [L, d_out, k]
_NOISE = 0.3  # of the generators at first, over the identity in the first of them


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """How well an adapter stands for the factors that it was fitted to.

    Attributes:
        error: Relative error `|A'B' - AB|_F / |AB|_F`, root mean square over layers and targets.
        errors: The same of each target, by its name.
        parameters: Number of values that the fitted adapter stores.
        losses: The squared error before each step, `[steps]`.
    """

    error: float
    errors: dict[str, float]
    parameters: int
    losses: np.ndarray


def fit(
    cfg: LowRankConfig,
    factors: Mapping[str, Any],
    *,
    params: Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
    steps: int = 400,
    learning_rate: float = 0.1,
) -> tuple[Adapter, FitReport]:
    """Fits an adapter to factors: compresses a trained LoRA.

    What is fitted is the delta of each layer, never A and B themselves, so scale, sign and any
    other mixing (`A M`, `M^-1 B`) of the factors are free. LoRA of a lower rank is found in closed
    form, by truncating the singular values; GenLoRA by Adam from each delta's first pair of
    singular vectors, all layers at once. No delta is ever formed. LoRA of the factors' rank or
    more takes A and B as they are (B over its own scale), to go on training a PEFT adapter.

    Args:
        cfg: A `GenLoRAConfig` or `LoRAConfig`. Its targets and layers are those of `factors`. Of
            layers without a delta GenLoRA's leaves out all; LoRA begins those that it has anew.
        factors: Result of `import_peft`, or of `generate_factors`.
        params: The base's parameters, of which names and shapes matter. With them the adapter
            can be saved for that base; without, it fits a base of these kernels alone, and loads
            into no other.
        key: PRNG key of the initial generators.
        steps: Number of steps.
        learning_rate: Peak of the rate, relative to the size of what it changes.

    Returns:
        The adapter, and how well it does.

    Raises:
        ValueError: If the method is another or has a side that is not trained, or the targets and
            the factors do not match.
    """
    if not isinstance(cfg, (GenLoRAConfig, LoRAConfig)) or cfg.reads_base:
        raise ValueError(f"fit makes GenLoRA and LoRA adapters, not those of {type(cfg).__name__}")
    if isinstance(cfg, GenLoRAConfig) and (cfg.share_across_targets or cfg.share_inputs):
        raise ValueError("fit needs share_across_targets=False and share_inputs=False")
    if cfg.side_a != "trained" or (isinstance(cfg, GenLoRAConfig) and cfg.gates):
        raise ValueError('fit needs side_a="trained" and gates=False: it changes both sides')
    if cfg.hadamard:
        raise ValueError("fit needs hadamard=False: it knows deltas, not the kernels under them")
    if steps < 1 or not learning_rate > 0:
        raise ValueError(f"steps ({steps}) and learning_rate ({learning_rate}) must be positive")
    key = jax.random.key(0) if key is None else key
    kernels = _kernel_shapes(factors)
    if params is not None:
        pair_kernels(flatten_dict(dict(params)), factors)  # for its checks
    adapter = init_adapter(cfg, key, unflatten_dict(kernels) if params is None else params)
    _check_covered(adapter, factors)
    targets = adapter.spec.targets
    if isinstance(cfg, LoRAConfig):
        factors = _with_missing_layers(adapter, factors)
    sides = {target.name: target_factors(factors, target) for target in targets}
    deltas = {target.name: decompose(*sides[target.name]) for target in targets}
    for target in targets:
        # A latent cannot be made of no singular vector.
        _check_sizes(target, deltas[target.name][1], zero=isinstance(cfg, LoRAConfig))

    losses = np.zeros(0, np.float32)
    if isinstance(cfg, GenLoRAConfig):
        adapter = _start(cfg, adapter, deltas, key)
        trained, losses = minimise(
            functools.partial(_loss, cfg),
            adapter.trainable,
            (adapter.replace(trainable={}), deltas),
            steps=steps,
            learning_rate=learning_rate,
        )
    else:
        start = adapter.trainable["factors"]
        trained = {
            "factors": {name: _lora(cfg, sides[name], deltas[name], start[name]) for name in sides}
        }
    adapter = adapter.replace(trainable=trained)
    squares = jax.jit(functools.partial(_squared_errors, cfg))(adapter, deltas)
    # Of an exact fit rounding may leave less than nothing.
    errors = {name: math.sqrt(max(float(square), 0.0)) for name, square in squares.items()}
    report = FitReport(
        error=math.sqrt(np.mean(np.square(list(errors.values())))),
        errors=errors,
        parameters=count_parameters(adapter),
        losses=np.asarray(losses),
    )
    return adapter, report


@functools.partial(jax.jit, static_argnames=("loss", "steps", "learning_rate"))
def minimise(
    loss: Callable[..., jax.Array], start: Tree, data: Any, *, steps: int, learning_rate: float
) -> tuple[Tree, jax.Array]:
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

    def step(carry: tuple[Tree, Any], _: None) -> tuple[tuple[Tree, Any], jax.Array]:
        tree, state = carry
        value, gradient = jax.value_and_grad(loss)(tree, data)
        updates, state = optimizer.update(gradient, state, tree)
        return (optax.apply_updates(tree, updates), state), value

    (tree, _), values = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return tree, values


def _kernel_shapes(factors: Mapping[str, Any]) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """The shapes of the adapted kernels, by their paths: a base that has nothing else."""
    refuse_other_than_products(factors, "fit")
    shapes = {}
    for path, own in by_module(factors).items():
        shape = (*own["a"].shape[:-1], own["b"].shape[-1])
        shapes[(*path, "kernel")] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return shapes


def _check_covered(adapter: Adapter, factors: Mapping[str, Any]) -> None:
    """Raises ValueError if the adapter has no place for a delta; one that is zero needs none."""
    kernels = {k.path: k for target in adapter.spec.targets for k in target.kernels}
    missed = []
    for path, own in sorted(by_module(factors).items()):
        kernel, name = kernels.get(path), ".".join(path)
        there = np.logical_and(*(np.any(own[side] != 0, axis=(-1, -2)) for side in "ab"))
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
                like = flat[(*there[0], side)]
                flat.setdefault((*kernel.path, side), jnp.zeros_like(like))
    return unflatten_dict(flat)


def _check_sizes(target: Target, s: jax.Array, *, zero: bool) -> None:
    """Raises ValueError if a delta is not finite, or, but where it may be, zero."""
    sizes = np.asarray(s[:, 0])
    layers = [layer for kernel in target.kernels for layer in kernel.layers]
    for layer, size in zip(layers, sizes, strict=True):
        if not np.isfinite(size):
            raise ValueError(f"factors of {target.name}, layer {layer}, are not finite")
        if size == 0 and not zero:
            raise ValueError(
                f"the delta of {target.name}, layer {layer}, is zero: name the other layers in "
                "the config's layers, or leave the target out"
            )


def _lora(
    cfg: LowRankConfig, factors: tuple[jax.Array, jax.Array], delta: Triple, start: Tree
) -> dict[str, jax.Array]:
    """The best LoRA of the config's rank: the factors themselves where there is room for them.

    What they leave of A is random, as in any LoRA: zeros on both sides would never be trained.
    """
    a, b = factors
    if a.shape[-1] > cfg.rank:
        u, s, v = (x[..., : cfg.rank] for x in delta)
        half = jnp.sqrt(s)[:, None]
        a, b = u * half, (v * half).swapaxes(-1, -2)
    more = cfg.rank - a.shape[-1]
    a, b = jnp.pad(a, ((0, 0), (0, 0), (0, more))), jnp.pad(b, ((0, 0), (0, more), (0, 0)))
    idle = ~a.any(axis=1, keepdims=True) & ~b.any(axis=2)[:, None]
    return {"a": jnp.where(idle, start["a"], a), "b": b / cfg.scale}


def _start(
    cfg: GenLoRAConfig, adapter: Adapter, deltas: Mapping[str, Triple], key: jax.Array
) -> Adapter:
    """Latents from the first m singular vectors, and generators of which the first m pass them on.

    Without normalisation this is LoRA of rank m at its best, plus noise.
    """
    m, g = cfg.latents_per_side, cfg.group_size
    passed = min(m, cfg.rank, *(s.shape[-1] for _, s, _ in deltas.values()))
    trainable = jax.tree.map(lambda leaf: leaf, adapter.trainable)
    for i, (name, (u, s, v)) in enumerate(deltas.items()):
        largest = s[:, 0].mean()
        for side, vectors in (("a", u), ("b", v)):
            n = vectors.shape[1]
            if "latents" in trainable:
                top = vectors * jnp.sqrt(s / largest)[:, None]
                top = jnp.pad(top, ((0, 0), (0, 0), (0, m)))[..., :m].swapaxes(1, 2)
                top = top.reshape(len(top), m * n)
                if cfg.share_latents:
                    top = jnp.linalg.svd(top, full_matrices=False)[2][:1]
                trainable["latents"][name][side] = math.sqrt(n) * top
            generator = trainable["generators"][name][side]
            size = jnp.sqrt(largest / n / (1.0 if side == "a" else cfg.scale**2))
            for j, part in enumerate(p for p in ("residual", "weights") if p in generator):
                own = jax.random.fold_in(key, 4 * i + 2 * j + (side == "b"))
                shape = generator[part].shape
                value = _NOISE * jax.random.normal(own, shape) / math.sqrt(cfg.group_inputs)
                if part == "residual" and cfg.generator == "elementwise":
                    value = value.at[:, 0].add(1.0)
                elif part == "residual":
                    for one in range(passed):
                        value = value.at[:, one, one * g : (one + 1) * g].add(jnp.eye(g))
                generator[part] = size * value
    return adapter.replace(trainable=trainable)


def _loss(cfg: AdapterConfig, trainable: Tree, data: tuple[Adapter, dict[str, Triple]]) -> Any:
    adapter, deltas = data
    squares = _squared_errors(cfg, adapter.replace(trainable=trainable), deltas)
    return sum(squares.values()) / len(squares)


def _squared_errors(
    cfg: AdapterConfig, adapter: Adapter, deltas: Mapping[str, Triple]
) -> dict[str, jax.Array]:
    """Squared relative error of each target, the mean over its layers."""
    factors = generate_factors(cfg, adapter)
    return {
        target.name: _squared_error(*target_factors(factors, target), deltas[target.name]).mean()
        for target in adapter.spec.targets
    }


def _squared_error(a: jax.Array, b: jax.Array, delta: Triple) -> jax.Array:
    """`|A'B' - U S V^T|_F^2 / |S|_F^2` of each layer, `[L]`, from r x r products.

    With `A' = U C + E` and `B' = D V^T + F`, where E is orthogonal to U and F to V, the error has
    four orthogonal parts. None is a difference of large numbers, as it would be if the square
    were expanded.
    """
    u, s, v = delta
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    c, d = product("lnk,lnr->lkr", u, a), product("lrm,lmk->lrk", b, v)
    e = a - product("lnk,lkr->lnr", u, c)
    f = b - product("lrk,lmk->lrm", d, v)
    inside = product("lkr,lrj->lkj", c, d) - s[:, :, None] * jnp.eye(s.shape[-1])
    cc, ee = product("lkr,lkq->lrq", c, c), product("lnr,lnq->lrq", e, e)
    dd, ff = product("lrk,lqk->lrq", d, d), product("lrm,lqm->lrq", f, f)
    outside = ((cc + ee) * ff + ee * dd).sum((-1, -2))
    size = jnp.square(s).sum(-1)
    return (jnp.square(inside).sum((-1, -2)) + outside) / jnp.where(size > 0, size, 1.0)
