"""What the benchmarks measure with, and where their results lie."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genlora_jax.training.provenance import provenance

RESULTS = Path(__file__).parent / "results"
GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """What a step program took.

    Attributes:
        compile_s: Seconds to trace, lower and compile it.
        seconds: Of each call.
        losses: The metric `loss` of each call.
        arguments_gib: Memory of the program's arguments, as the compiler reports it.
        temporaries_gib: The same of its temporaries.
        compiled: The program.
    """

    compile_s: float
    seconds: list[float]
    losses: list[Any]
    arguments_gib: float
    temporaries_gib: float
    compiled: Any

    def median(self, warmup: int = 1) -> float:
        """Median seconds of the calls after the first ones."""
        return statistics.median(self.seconds[warmup:])


def time_step(
    lower: Callable[..., Any],
    state: Any,
    *operands: Any,
    calls: int,
    compiler_options: Mapping[str, Any] | None = None,
) -> Timing:
    """Compiles and times `(state, *operands) -> (state, metrics)`.

    Args:
        lower: Lowers the program for these arguments, as `jax.jit(step).lower` does.
        state: The first call's state, which may be donated.
        operands: What every call is given besides.
        calls: Number of calls.
        compiler_options: Of XLA, for this program.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    began = time.perf_counter()
    compiled = lower(state, *operands).compile(compiler_options)
    compile_s = time.perf_counter() - began
    memory = compiled.memory_analysis()
    seconds, losses = [], []
    for _ in range(calls):
        began = time.perf_counter()
        state, metrics = compiled(state, *operands)
        losses.append(np.asarray(metrics["loss"]).tolist())
        seconds.append(time.perf_counter() - began)
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"losses {losses}")
    return Timing(
        compile_s=compile_s,
        seconds=seconds,
        losses=losses,
        arguments_gib=memory.argument_size_in_bytes / GIB,
        temporaries_gib=memory.temp_size_in_bytes / GIB,
        compiled=compiled,
    )


def median_ms(run: Callable[[], Any], calls: int) -> float:
    """Median milliseconds of some calls after a first one."""
    run()
    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def product_rate() -> float:
    """FLOP a second of a large product in bfloat16: of 8,192 on a GPU."""
    import jax
    import jax.numpy as jnp

    n = 8192 if jax.default_backend() == "gpu" else 256
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    ms = median_ms(lambda: jax.block_until_ready([product(x, x) for _ in range(10)]), 5) / 10
    return 2e3 * n**3 / ms


def paragraphs(text: Path) -> list[str]:
    """JSON lines: the paragraphs of a text as rows."""
    parts = [part.strip() for part in text.read_text().split("\n\n")]
    return [json.dumps({"text": part}) + "\n" for part in parts if part]


def keeping_compilations(folder: Path) -> dict[str, str]:
    """The environment of a process that keeps compiled programs below a folder, as it ships.

    A directory that JAX's own variable names would not keep small programs.
    """
    others = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return others | {"XDG_CACHE_HOME": str(folder)}


def gpu_events(folder: Path) -> list[list[Any]]:
    """What ran on the streams of each GPU in a profile: events with their nanoseconds."""
    import jax

    file = next(folder.rglob("*.xplane.pb"))
    planes = [p for p in jax.profiler.ProfileData.from_file(str(file)).planes if "GPU" in p.name]
    return [
        [event for line in plane.lines if "Stream" in line.name for event in line.events]
        for plane in planes
    ]


def union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Intervals as disjoint ones, in order."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def write_result(
    file: Path, result: Mapping[str, Any], where: Mapping[str, Any] | None = None
) -> None:
    """Writes a result as JSON.

    Args:
        file: The file; its folder is made.
        result: The result.
        where: Result of `provenance`, for a result that is written several times: the first
            write makes the tree dirty. None to ask now.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(result) | dict(provenance() if where is None else where), indent=1)
    file.write_text(text + "\n")
