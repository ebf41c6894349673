"""Injection: factors meet a Linen model by interception; the model knows nothing of them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

COLLECTION = "genlora"


def _interceptor(
    dropout: float, index: jax.Array | None, used: set[tuple[str, ...]]
) -> Callable[..., Any]:
    """Adds `(x A) B` to every Dense that has factors, and notes in `used` which had."""

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
        if not module.has_variable(COLLECTION, "a"):
            return y
        used.add(module.path)
        x = args[0] if args else kwargs["inputs"]
        a: jax.Array = module.get_variable(COLLECTION, "a").astype(y.dtype)
        b: jax.Array = module.get_variable(COLLECTION, "b").astype(y.dtype)
        own = a.shape[-2:-1] + b.shape[-1:] == (x.shape[-1], y.shape[-1])
        if not own or a.ndim != (2 if index is None else 3):
            raise ValueError(
                f"factors of {'.'.join(module.path)} have shapes {a.shape} and {b.shape}; "
                f"the module maps {x.shape[-1]} to {y.shape[-1]}"
                f"{'' if index is None else ', and adapter_index goes with factors of gl.stack'}"
            )
        x = x.astype(y.dtype)
        if dropout > 0.0:
            keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - dropout, x.shape)
            x = jnp.where(keep, x / (1.0 - dropout), jnp.zeros_like(x))
        if index is None:
            return y + (x @ a) @ b
        return y + jnp.einsum("n...i,nir,nro->n...o", x, a[index], b[index], optimize="optimal")

    return intercept


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
        ValueError: If some factors met no Dense, or one of another shape.
    """
    used: set[tuple[str, ...]] = set()
    # Entered here, inside whatever is being traced: the jit cache does not see an interceptor.
    with nn.intercept_methods(_interceptor(dropout, adapter_index, used)):
        out = model.apply({"params": params, COLLECTION: factors}, *args, **kwargs)
    expected = {path[:-1] for path in flatten_dict(dict(factors))}
    if missed := sorted(".".join(path) for path in expected - used):
        raise ValueError(
            f"factors that met no Dense of the model: {', '.join(missed)}. Is the model that of "
            f'the parameters, and does every nn.scan in it have "{COLLECTION}" in variable_axes?'
        )
    return out
