"""Injection: factors meet a Linen model by interception; the model knows nothing of them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from genlora_jax.factors import (
    LEAVES,
    Module,
    adapted_column_norm,
    by_module,
    column_scale,
    describe,
    fits,
    refuse_other_than_products,
)

COLLECTION = "genlora"


def _interceptor(
    dropout: float, index: jax.Array | None, used: set[tuple[str, ...]]
) -> Callable[..., Any]:
    """Adapts the output of every Dense that has factors, and notes in `used` which had."""

    def intercept(
        next_call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        y = next_call(*args, **kwargs)
        if not isinstance(module, nn.Dense) or context.method_name != "__call__":
            return y
        own: Module = {
            leaf: module.get_variable(COLLECTION, leaf)
            for leaf in LEAVES
            if module.has_variable(COLLECTION, leaf)
        }
        if not own:
            return y
        used.add(module.path)
        x = args[0] if args else kwargs["inputs"]
        lead = () if index is None else own["a"].shape[:1]
        if not fits(own, (*lead, x.shape[-1], y.shape[-1])):
            raise ValueError(
                f"factors of {'.'.join(module.path)} have shapes {describe(own)}; "
                f"the module maps {x.shape[-1]} to {y.shape[-1]}"
                f"{'' if index is None else ', and adapter_index goes with factors of gl.stack'}"
            )
        x = x.astype(y.dtype)
        if dropout > 0.0:
            keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - dropout, x.shape)
            x = jnp.where(keep, x / (1.0 - dropout), jnp.zeros_like(x))
        change = _change(x, module, own, index)
        if "magnitude" in own:
            return _rescale(module, own, y, change, x if dropout > 0.0 else None)
        return y + change

    return intercept


def _rescale(
    module: nn.Dense, own: Module, y: jax.Array, change: jax.Array, dropped: jax.Array | None
) -> jax.Array:
    """The output whose columns the magnitudes rescale, DoRA's.

    Args:
        module: The Dense.
        own: Its factors.
        y: Its output.
        change: What the factors' product adds.
        dropped: The inputs after dropout, if there is any: as in PEFT, it is their part of the
            output that is rescaled.

    Returns:
        An array like `y`.
    """
    kernel: jax.Array = module.get_variable("params", "kernel")
    if dropped is not None:
        base = dropped @ kernel.astype(y.dtype)
    elif module.use_bias:
        base = y - module.get_variable("params", "bias").astype(y.dtype)
    else:
        base = y
    # A constant to the gradient, as in the paper's section 4.3.
    norm = jax.lax.stop_gradient(adapted_column_norm(kernel, own))
    scale = column_scale(own["magnitude"], norm)
    # Not `scale * (base + change)`: in bfloat16 a scale near 1 would be rounded to 1.
    return y + (scale - 1).astype(y.dtype) * base + scale.astype(y.dtype) * change


def _change(x: jax.Array, module: nn.Dense, own: Module, index: jax.Array | None) -> jax.Array:
    """`x` times the delta, by way of its factors."""
    own = {leaf: value.astype(x.dtype) for leaf, value in own.items()}
    if "gain_a" in own:
        kernel: jax.Array = module.get_variable("params", "kernel")
        return _times_gained(x, kernel.astype(x.dtype), own["gain_a"], own["gain_b"])
    if "delta" in own:
        return x @ own["delta"]
    a, b = own["a"], own["b"]
    if index is None:
        return (x @ a) @ b
    return jnp.einsum("n...i,nir,nro->n...o", x, a[index], b[index], optimize="optimal")


# Else every layer would keep a delta as large as its kernel for its backward pass. With barriers
# against CSE, a kernel that is cut over devices would be put together once more.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _times_gained(x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ (kernel * (a @ b))


def apply(
    model: nn.Module,
    params: Mapping[str, Any],
    factors: Mapping[str, Any],
    *args: Any,
    dropout: float = 0.0,
    adapter_index: jax.Array | None = None,
    **kwargs: Any,
) -> Any:
    """Applies a Linen model with factors injected into its Dense layers.

    Args:
        model: Any Linen module. Its `nn.scan`s must name the collection `genlora` in
            `variable_axes` for factors to reach the layers in them.
        params: The base's parameters.
        factors: Result of `generate_factors`, or of `import_peft`.
        *args: Inputs of the model.
        dropout: Rate at which the adapter's inputs are zeroed; needs `rngs={"dropout": key}`.
        adapter_index: Int `[batch]`: each row's adapter among those that `gl.stack` put together.
        **kwargs: Passed on to `model.apply`, and by it to the model (`method`, `rngs`,
            `mutable`, `segment_ids`, ...).

    Returns:
        What the model returns.

    Raises:
        ValueError: If some factors met no Dense, or one of another shape, or `adapter_index` is
            given for other factors than A and B.
    """
    modules = by_module(factors)
    if adapter_index is not None:
        refuse_other_than_products(factors, "adapter_index")
    used: set[tuple[str, ...]] = set()
    # Entered here, inside whatever is being traced: the jit cache does not see an interceptor.
    with nn.intercept_methods(_interceptor(dropout, adapter_index, used)):
        out = model.apply({"params": params, COLLECTION: factors}, *args, **kwargs)
    if missed := sorted(".".join(path) for path in set(modules) - used):
        raise ValueError(
            f"factors that met no Dense of the model: {', '.join(missed)}. Is the model that of "
            f'the parameters, and does every nn.scan in it have "{COLLECTION}" in variable_axes?'
        )
    return out
