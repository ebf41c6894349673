"""Injection: factors meet a Linen model by interception; the model knows nothing of them."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from genlora_jax.base.kernel import read_kernel
from genlora_jax.base.products import wide_product
from genlora_jax.base.stored import StoredKernel
from genlora_jax.factors import LEAVES, by_module, kind_of, refuse_uncombinable
from genlora_jax.factors.kind import DenseCall, Leaves

COLLECTION = "genlora"
# What the innermost block notes the modules in. A block around it leaves the modules alone, or
# their outputs would be changed twice.
_INNERMOST: contextvars.ContextVar[set[tuple[str, ...]] | None] = contextvars.ContextVar(
    "innermost", default=None
)


@contextlib.contextmanager
def inject(
    factors: Mapping[str, Any], *, dropout: float = 0.0, adapter_index: jax.Array | None = None
) -> Iterator[dict[str, Any]]:
    """Injects factors into the Dense layers of whatever Linen model is applied inside the block.

    For code that calls `model.apply` itself; `gl.apply` is this around one call. Enter it inside a
    jitted function, not around one: the `jit` cache does not see it. Of nested blocks the innermost
    one injects.

        with gl.inject(factors) as collection:
            out = model.apply({"params": params, **collection}, inputs)

    Args:
        factors: Result of `generate_factors`, or of `import_peft`.
        dropout: Rate at which the adapter's inputs are zeroed; needs `rngs={"dropout": key}`.
        adapter_index: Int `[batch]`: each row's adapter, for factors of `gl.stack`.

    Yields:
        The collection that holds the factors, to be given to `model.apply`.

    Raises:
        ValueError: If some factors met no Dense by the block's end, or one of another shape, or
            `adapter_index` is given for factors other than A and B.
    """
    modules = by_module(factors)
    if adapter_index is not None:
        refuse_uncombinable(factors, "adapter_index")
    used: set[tuple[str, ...]] = set()
    token = _INNERMOST.set(used)
    try:
        with nn.intercept_methods(_interceptor(dropout, adapter_index, used)):
            yield {COLLECTION: factors}
    finally:
        _INNERMOST.reset(token)
    if missed := sorted(".".join(path) for path in set(modules) - used):
        raise ValueError(
            f"factors that met no Dense of the model: {', '.join(missed)}. Is the model that of "
            f'the parameters, and does every nn.scan in it have "{COLLECTION}" in variable_axes?'
        )


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
        params: The base's parameters; or all of its variables, `{"params": ..., "batch_stats":
            ...}`, for a model with further collections.
        factors: Result of `generate_factors`, or of `import_peft`.
        *args: Inputs of the model.
        dropout: Rate at which the adapter's inputs are zeroed; needs `rngs={"dropout": key}`.
        adapter_index: Int `[batch]`: each row's adapter, for factors of `gl.stack`.
        **kwargs: Passed on to `model.apply`, and by it to the model (`method`, `rngs`,
            `mutable`, `segment_ids`, ...).

    Returns:
        What the model returns.

    Raises:
        ValueError: If some factors met no Dense, or one of another shape, or `adapter_index` is
            given for factors other than A and B.
    """
    variables = params if "params" in params else {"params": params}
    with inject(factors, dropout=dropout, adapter_index=adapter_index) as collection:
        return model.apply({**variables, **collection}, *args, **kwargs)


def _interceptor(
    dropout: float, adapter_index: jax.Array | None, used: set[tuple[str, ...]]
) -> Callable[..., Any]:
    """Changes the output of every Dense that has factors, and notes in `used` which had."""

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
        if _INNERMOST.get() is not used:
            return y
        leaves: Leaves = {
            leaf: module.get_variable(COLLECTION, leaf)
            for leaf in LEAVES
            if module.has_variable(COLLECTION, leaf)
        }
        if not leaves:
            return y
        used.add(module.path)
        name = ".".join(module.path)
        kind = kind_of(leaves, name)
        x = args[0] if args else kwargs["inputs"]
        lead = () if adapter_index is None else leaves["a"].shape[:1]
        if not kind.fits(leaves, (*lead, x.shape[-1], y.shape[-1])):
            raise ValueError(
                f"factors of {name} have shapes {kind.describe(leaves)}; "
                f"the module maps {x.shape[-1]} to {y.shape[-1]}"
                + ("" if adapter_index is None else "; adapter_index goes with factors of gl.stack")
            )
        x = x.astype(y.dtype)
        if dropout > 0.0:
            keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - dropout, x.shape)
            x = jnp.where(keep, x / (1.0 - dropout), jnp.zeros_like(x))
        kernel: Any = module.get_variable("params", "kernel")
        call = DenseCall(
            x=x,
            y=y,
            kernel=functools.partial(read_kernel, kernel),
            prevent_cse=isinstance(kernel, StoredKernel) and getattr(module, "prevent_cse", True),
            product=wide_product if getattr(module, "wide", False) else None,
            bias=module.get_variable("params", "bias") if module.use_bias else None,
            dropped=dropout > 0.0,
            adapter_index=adapter_index,
        )
        return kind.output(call, leaves)

    return intercept
