"""Deltas on the host in float64: their singular values and how well an adapter stands for them.

LAPACK's float32 results differ in the last digits from processor to processor, and a residual is a
small difference of such results. In float64 that noise is far below anything reported here. The
matrices are small (r x r and n x r), so the host is fast enough.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from genlora_jax.adapter import Adapter, count_parameters, generate_factors
from genlora_jax.analysis import svd_of_product, target_factors
from genlora_jax.targets import Target

Array = TypeVar("Array", jax.Array, np.ndarray)
Triple = tuple[Array, Array, Array]  # U [L, d_in, k], s [L, k], V [L, d_out, k]


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """How well an adapter stands for the factors that it was fitted to.

    Attributes:
        error: Relative error `|A'B' - AB|_F / |AB|_F`, root mean square over layers and targets.
        errors: The same of each target, by its name.
        parameters: Number of values that the fitted adapter stores.
        losses: The squared error before each step, `[steps]`; empty for LoRA.
    """

    error: float
    errors: dict[str, float]
    parameters: int
    losses: np.ndarray


def decompose_target(
    factors: Mapping[str, Any], target: Target, *, zero: bool
) -> Triple[np.ndarray]:
    """Singular value decomposition of a target's deltas, as `analysis.decompose` defines it.

    Args:
        factors: Tree of factors.
        target: A target of the adapter that they belong to.
        zero: Whether a delta may be zero.

    Returns:
        Float64 U `[L, d_in, k]`, s `[L, k]` and V `[L, d_out, k]`, where k is
        min(r, d_in, d_out).

    Raises:
        ValueError: If a layer's factors are not finite, or its delta is zero and must not be.
    """
    a, b = (np.asarray(side, np.float64) for side in target_factors(factors, target))
    layers = [layer for kernel in target.kernels for layer in kernel.layers]
    for i, layer in enumerate(layers):
        if not (np.isfinite(a[i]).all() and np.isfinite(b[i]).all()):
            raise ValueError(f"factors of {target.name}, layer {layer}, are not finite")
    u, s, v = svd_of_product(np, a, b)
    for layer, largest in zip(layers, s[:, 0], strict=True):
        if largest == 0 and not zero:
            raise ValueError(
                f"the delta of {target.name}, layer {layer}, is zero: name the other layers in "
                "the config's layers, or leave the target out"
            )
    return u, s, v


def report(
    adapter: Adapter, deltas: Mapping[str, Triple[np.ndarray]], losses: np.ndarray
) -> FitReport:
    """How well an adapter stands for deltas.

    Args:
        adapter: The adapter.
        deltas: Each target's decomposition, by name.
        losses: The squared error before each step of the fit, `[steps]`.

    Returns:
        The report.
    """
    factors = generate_factors(adapter.config, adapter)
    errors = {}
    for target in adapter.spec.targets:
        a, b = (np.asarray(side, np.float64) for side in target_factors(factors, target))
        errors[target.name] = math.sqrt(squared_error(a, b, deltas[target.name]).mean())
    return FitReport(
        error=math.sqrt(np.mean(np.square(list(errors.values())))),
        errors=errors,
        parameters=count_parameters(adapter),
        losses=losses,
    )


def squared_error(a: Array, b: Array, delta: Triple[Array]) -> Array:
    """`|A'B' - U S V^T|_F^2 / |S|_F^2` of each layer, from r x r products.

    With `A' = U C + E` and `B' = D V^T + F`, where E is orthogonal to U and F to V, the error has
    four orthogonal parts. None is a difference of large numbers, as it would be if the square
    were expanded.

    Args:
        a: `[L, d_in, r]`, NumPy or JAX as the delta is.
        b: `[L, r, d_out]`.
        delta: U `[L, d_in, k]`, s `[L, k]` and V `[L, d_out, k]`.

    Returns:
        `[L]`.
    """
    u, s, v = delta
    c, d = u.mT @ a, b @ v
    e, f = a - u @ c, b - d @ v.mT
    inside = c @ d - s[:, :, None] * np.eye(s.shape[-1], dtype=s.dtype)[None]
    outside = (c.mT @ c + e.mT @ e) * (f @ f.mT) + (e.mT @ e) * (d @ d.mT)
    size = (s * s).sum(-1)
    total = (inside * inside).sum((-1, -2)) + outside.sum((-1, -2))
    return total / (size + (size == 0).astype(size.dtype))
