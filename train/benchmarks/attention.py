"""Attention within the segments of packed rows on a GPU: right at awkward shapes, and its time.

    python -m train.benchmarks.attention

Errors are relative, in the Frobenius norm, of the output and of the gradients of q, k and v, all in
bfloat16, against XLA's attention in float32. Those of XLA's own bfloat16 stand beside them.
"""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genlora_jax.models.attention import attend
from genlora_jax.models.cudnn import find_runs
from train.benchmarks.measuring import RESULTS, median_ms, write_result

RESULT = RESULTS / "attention.json"
Array = jax.Array
# How far cuDNN's error may be from that of XLA in the same dtype: both round scores once.
FACTOR = 1.5


@dataclass(frozen=True)
class Shape:
    """Rows of so many segments, of which attention expects at most `most`."""

    rows: int
    length: int
    segments: int
    most: int
    heads: int = 8
    key_value_heads: int = 2
    head_dim: int = 128
    window: int | None = None


AWKWARD = (
    Shape(3, 1000, 5, 16, head_dim=64),
    Shape(2, 192, 3, 8, key_value_heads=8),
    Shape(2, 2047, 3, 8),
    Shape(2, 333, 7, 8, head_dim=64),
    Shape(2, 1024, 4, 8, window=100),
    Shape(2, 512, 1, 8, key_value_heads=8, head_dim=80),
    Shape(2, 1024, 40, 64),
    Shape(2, 1024, 8, 8),
    Shape(2, 64, 4, 4),
)
TIMED = (
    Shape(4, 2048, 1, 8, heads=32, key_value_heads=8),
    Shape(4, 2048, 4, 8, heads=32, key_value_heads=8),
    Shape(4, 2048, 4, 16, heads=32, key_value_heads=8),
    Shape(4, 2048, 4, 64, heads=32, key_value_heads=8),
    Shape(2, 8192, 8, 16, heads=32, key_value_heads=8),
)


def arrays(shape: Shape, dtype: Any = jnp.bfloat16) -> tuple[Array, ...]:
    """Random q, k, v, segment ids, and the gradient of the output."""
    rng = np.random.default_rng(0)
    sizes = (shape.heads, shape.key_value_heads, shape.key_value_heads, shape.heads)
    q, k, v, d_out = (
        jnp.asarray(rng.standard_normal((shape.rows, shape.length, n, shape.head_dim)), dtype)
        for n in sizes
    )
    segments = np.zeros((shape.rows, shape.length), np.int32)
    for row in segments:
        cuts = np.sort(rng.choice(np.arange(1, shape.length), shape.segments - 1, replace=False))
        row[:] = 1 + np.searchsorted(cuts, np.arange(shape.length), side="right")
    return q, k, v, jnp.asarray(segments), d_out


def mask_of(segments: Array, window: int | None) -> Array:
    at = jnp.arange(segments.shape[1])
    seen = (at[:, None] >= at)[None] & (segments[:, :, None] == segments[:, None, :])
    if window is not None:
        seen &= (at[:, None] - at < window)[None]
    return seen[:, None]


def programs(shape: Shape) -> dict[str, Callable[..., Array]]:
    """Attention `(q, k, v, segments)` in each way."""

    def runs(q: Array, k: Array, v: Array, segments: Array, implementation: Any = "auto") -> Array:
        known = find_runs(segments, shape.most)
        return attend(q, k, v, None, implementation, runs=known, window=shape.window)

    def under_vmap(q: Array, k: Array, v: Array, segments: Array) -> Array:
        members = jax.vmap(lambda q: runs(q, k, v, segments, "vmap"))(jnp.stack([q / 2, q]))
        return members[1]

    def masked(implementation: Any) -> Callable[..., Array]:
        return lambda q, k, v, segments: attend(
            q, k, v, mask_of(segments, shape.window), implementation
        )

    return {
        "runs": runs,
        "runs under vmap": under_vmap,
        "mask": masked("cudnn"),
        "xla": masked("xla"),
    }


def with_gradients(attention: Callable[..., Array]) -> Callable[..., Any]:
    def run(q: Array, k: Array, v: Array, segments: Array, d_out: Array) -> Any:
        out, pull_back = jax.vjp(lambda *qkv: attention(*qkv, segments), q, k, v)
        return out, *pull_back(d_out)

    return jax.jit(run)


def errors(shape: Shape) -> dict[str, list[float]]:
    """Relative errors of output and gradients by program."""
    wide = arrays(shape, jnp.float32)
    rounded = [x.astype(jnp.bfloat16).astype(x.dtype) if x.ndim == 4 else x for x in wide]
    with jax.default_matmul_precision("highest"):
        exact = with_gradients(programs(shape)["xla"])(*rounded)

    def error(found: Array, right: Array) -> float:
        return float(jnp.linalg.norm(found.astype(jnp.float32) - right) / jnp.linalg.norm(right))

    return {
        name: [
            error(*pair)
            for pair in zip(with_gradients(program)(*arrays(shape)), exact, strict=True)
        ]
        for name, program in programs(shape).items()
    }


def times(shape: Shape) -> dict[str, float]:
    """Milliseconds of forward and backward pass by program, and of causal attention."""
    operands = arrays(shape)
    of = programs(shape)
    causal = lambda q, k, v, segments: attend(q, k, v, None, "cudnn")  # noqa: E731
    found = {}
    for name, program in {"runs": of["runs"], "mask": of["mask"], "causal": causal}.items():
        run = with_gradients(program)
        found[name] = median_ms(lambda run=run: jax.block_until_ready(run(*operands)), 10)
    return found


def main() -> None:
    """Checks, times, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    checked = []
    for shape in AWKWARD:
        found = errors(shape)
        checked.append(dataclasses.asdict(shape) | {"errors": found})
        print(shape, {name: f"{max(row):.5f}" for name, row in found.items()}, flush=True)
        for name, row in found.items():
            if not max(row) <= FACTOR * max(found["xla"]):
                raise ArithmeticError(f"{name} is wrong at {shape}: {row}")
    timed = [dataclasses.asdict(shape) | {"ms": times(shape)} for shape in TIMED]
    for row in timed:
        print(row, flush=True)
    device = jax.devices()[0].device_kind
    write_result(options.output, {"device": device, "checked": checked, "timed": timed})


if __name__ == "__main__":
    main()
