"""The base in FP8 beside bfloat16: time and memory of the recipe's step, rates, and errors.

    python -m train.benchmarks.fp8

Steps: LLaMA's shapes with random weights, `train/recipes/llama3_8b_gpu.yaml` as it is but for the
base, an arm a process, with the products of its program counted by kind. Rates: products alone,
with and without quantising what multiplies. Errors, on a random model or on that of `--model`:
cosine of the adapter's gradient with that in float32, and the loss of 30 steps on one batch. The
result is written after each arm; what no longer fits `--seconds` is left out, and said.
`--size tiny` tries the script on any machine.
"""

import argparse
import collections
import dataclasses
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genlora_jax.base.fp8 import GPU_OPTIONS as CUBLAS
from genlora_jax.training.provenance import provenance
from train.benchmarks.measuring import GIB, RESULTS, median_ms, write_result
from train.benchmarks.random_base import SIZES, random_base
from train.benchmarks.step_time import Arm, measure_ours

RESULT = RESULTS / "fp8.json"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARM_S = 100  # what an arm of 8B takes: start, weights, compilation, steps


def all_but(*projections: str) -> tuple[str, ...]:
    """The modules that are left unquantised where only these projections are quantised."""
    return ("lm_head", *(name for name in PROJECTIONS if name not in projections))


# Bases with FP8 in some kernels: what they leave unquantised.
IN_PART = {
    "fp8 in the MLP": all_but("gate_proj", "up_proj", "down_proj"),
    "fp8 in up and down": all_but("up_proj", "down_proj"),
    "fp8 in down": all_but("down_proj"),
}


@dataclass(frozen=True)
class Variant:
    """How a base multiplies.

    Attributes:
        form: `fp8`, `fp8_backward` or `bf16`.
        unquantised: Modules whose kernels stay in bfloat16.
        cublas: Whether XLA may not take its own kernels for products.
        gradient: Dtype of the outputs' gradients.
        exact: Whether both products accumulate in float32.
    """

    form: str = "fp8"
    unquantised: tuple[str, ...] = ("lm_head",)
    cublas: bool = True
    gradient: str = "float8_e5m2"
    exact: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """XLA's."""
        import jax

        return CUBLAS if self.cublas and jax.default_backend() == "gpu" else {}

    def enter(self) -> None:
        """Sets what `fp8` reads as it is traced."""
        import jax
        import jax.numpy as jnp

        from genlora_jax.base import fp8

        fp8.GRADIENT = jnp.dtype(self.gradient)
        fp8.PRECISION = jax.lax.Precision.HIGHEST if self.exact else jax.lax.Precision.DEFAULT


STEPS = {
    "fp8, cuBLASLt": Variant(),
    "bf16, the recipe as it is": Variant("bf16", cublas=False),
    "fp8_backward": Variant("fp8_backward"),
    **{name: Variant(unquantised=unquantised) for name, unquantised in IN_PART.items()},
    "fp8, XLA chooses kernels": Variant(cublas=False),
    "fp8, cuBLASLt, accumulated in float32": Variant(exact=True),
    "bf16, cuBLASLt": Variant("bf16"),
}
ERRORS = {
    "bf16": Variant("bf16"),
    "bf16, kernels rounded to fp8": Variant("bf16"),
    "fp8": Variant(),
    "fp8, gradients in e4m3": Variant(gradient="float8_e4m3fn"),
    "fp8, accumulated in float32": Variant(exact=True),
}


def products_by_kind(compiled: Any) -> dict[str, Any]:
    """How many calls of a program multiply, by what."""
    text = compiled.as_text()
    targets = collections.Counter(re.findall(r'custom_call_target="(__cublas[^"]*)"', text))
    kinds = collections.Counter(re.findall(r'"kind":"(__(?:triton|cublas|cudnn)[^"]*)"', text))
    dots = [part for part in text.split("\n\n") if re.search(r" dot\(|dot_general", part)]
    fused = sum("f8e" in part and "ENTRY" not in part for part in dots)
    transposed = len(
        re.findall(r"= f8e4m3fn\[[\d,]+\]\S* (?:fusion\(.*transpose|transpose\()", text)
    )
    counted = {**targets, **kinds, "fused, with FP8": fused, "transposed in FP8": transposed}
    return {"products": counted}


def measure_step(variant: Variant, size: str, steps: int) -> dict[str, Any]:
    """The recipe's step on a base of random weights."""
    import jax

    from genlora_jax.base.quantise import Quantisation

    variant.enter()
    form: Any = variant.form
    quantisation = None if form == "bf16" else Quantisation(form, variant.unquantised)
    base = random_base(SIZES[size], scan=False, quantisation=quantisation)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(base[1])) / GIB
    arm = Arm(form, size, recipe=("--data.length", "32") if size == "tiny" else ())
    found = measure_ours(arm, base, steps, variant.options, products_by_kind)
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", 0) / GIB or None
    return found | {"base_gib": held, "allocator_peak_gib": peak}


def rates(shapes: dict[str, tuple[int, int, int]]) -> Iterator[tuple[str, Any]]:
    """Teraflops a second of products `[m, k] x [k, n]`."""
    import jax
    import jax.numpy as jnp

    from genlora_jax.base import fp8

    e4m3, e5m2 = jnp.float8_e4m3fn, jnp.float8_e5m2
    exact = jax.lax.Precision.HIGHEST

    def dot(axis: int, precision: Any = None) -> Callable[..., Any]:
        return lambda x, w: jax.lax.dot_general(
            x,
            w,
            (((1,), (axis,)), ((), ())),
            precision=precision or jax.lax.Precision.DEFAULT,
            preferred_element_type=jnp.bfloat16,
        )

    def forward(x: Any, w: Any) -> Any:
        return w.times(x, prevent_cse=False)

    def backward(gradient: Any, w: Any) -> Any:
        x = jnp.zeros((gradient.shape[0], w.shape[0]), gradient.dtype)
        return jax.vjp(lambda x: w.times(x, prevent_cse=False), x)[1](gradient)[0]

    for name, (m, k, n) in shapes.items():
        x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
        w = jax.random.normal(jax.random.key(1), (k, n), jnp.bfloat16)
        codes, turned = w.astype(e4m3), w.mT.astype(e4m3)
        Variant().enter()
        kernel, reverse = fp8.Fp8.of(w, w.dtype), fp8.Fp8.of(w.mT, w.dtype)
        arms: dict[str, tuple[Any, Any, Any, Any]] = {
            "bf16": (dot(0), x, w, {}),
            "fp8": (dot(1), x.astype(e4m3), turned, CUBLAS),
            "fp8, XLA chooses": (dot(1), x.astype(e4m3), turned, {}),
            "fp8, accumulated in float32": (dot(1, exact), x.astype(e4m3), turned, CUBLAS),
            "fp8, transposed before": (dot(0), x.astype(e4m3), codes, CUBLAS),
            "fp8, e5m2 x e4m3": (dot(1), x.astype(e5m2), turned, CUBLAS),
            "input quantised, forward": (forward, x, kernel, CUBLAS),
            "input quantised, backward": (backward, x, reverse, CUBLAS),
        }
        on_gpu = jax.default_backend() == "gpu"
        for arm, (function, left, right, options) in arms.items():
            try:
                program = jax.jit(function).lower(left, right).compile(options if on_gpu else {})
                ms = median_ms(functools.partial(ten_times, program, left, right), 5) / 10
                yield f"{name}: {arm}", 2 * m * k * n / ms / 1e9
            except jax.errors.JaxRuntimeError as error:
                yield f"{name}: {arm}", {"error": str(error).splitlines()[:1]}


def ten_times(program: Callable[..., Any], *operands: Any) -> None:
    """Calls a program so often that its launch does not count."""
    import jax

    jax.block_until_ready([program(*operands) for _ in range(10)])


def errors(size: str, model_path: Path | None, steps: int) -> Iterator[tuple[str, Any]]:
    """Of each variant, the gradient's cosine with that in float32, and losses of some steps."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import genlora_jax as gl
    from genlora_jax.base.kernel import read_kernel
    from genlora_jax.base.quantise import Quantisation, quantise
    from train.benchmarks.random_base import random_batch

    if model_path is None:
        model, base = random_base(SIZES[size])
    else:
        model, base = gl.load_llama(model_path, dtype="bfloat16")
    model = model.clone(attention="xla")  # float32 has no other
    config = gl.LoRAConfig(rank=16, alpha=32.0)
    adapter = gl.init_adapter(config, jax.random.key(0), base)
    key = jax.random.key(1)
    noisy = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(key, x.shape, x.dtype), adapter.trainable
    )
    shape = SIZES["tiny" if size == "tiny" else "small"]
    ids = jnp.asarray(random_batch(shape, 1)["input_ids"]) % model.config.vocab_size

    def loss(trainable: Any, params: Any, model: Any) -> jax.Array:
        factors = gl.generate_factors(config, dataclasses.replace(adapter, trainable=trainable))
        logits = gl.apply(model, params, factors, ids[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    def gradient(model: Any, params: Any, options: Any) -> tuple[Any, np.ndarray]:
        program = jax.jit(jax.value_and_grad(lambda t, p: loss(t, p, model)))
        compiled = program.lower(noisy, params).compile(options)
        leaves = jax.tree.leaves(compiled(noisy, params)[1])
        return compiled, np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])

    with jax.default_matmul_precision("highest"):
        floats = jax.tree.map(lambda x: x.astype(jnp.float32), base)
        _, expected = gradient(model.clone(dtype=jnp.float32), floats, {})
    for name, variant in ERRORS.items():
        variant.enter()
        form: Any = variant.form
        params = quantise(base, Quantisation(form))
        if "rounded" in name:  # what the kernels alone cost
            codes = quantise(base, Quantisation("fp8"))
            params = jax.tree.map(lambda x, y: read_kernel(y, x.dtype), base, codes)
        compiled, found = gradient(model, params, variant.options)
        norms = np.linalg.norm(found), np.linalg.norm(expected)
        optimizer = optax.adam(1e-3)
        trained, state, losses = noisy, optimizer.init(noisy), []
        for _ in range(steps):
            value, slope = compiled(trained, params)
            updates, state = optimizer.update(slope, state)
            trained = optax.apply_updates(trained, updates)
            losses.append(float(value))
        cosine = float(found @ expected / np.prod(norms))
        yield name, {"cosine": cosine, "norm": norms[0] / norms[1], "losses": losses}


def shapes_of(size: str) -> dict[str, tuple[int, int, int]]:
    """Products of a micro-batch of two rows, and a large square."""
    found = SIZES[size]
    tokens, hidden, wide = 2 * found.length, found.hidden_size, found.intermediate_size
    square = 8192 if size.startswith("llama") else 256
    return {
        f"{square} cubed": (square, square, square),
        "gate": (tokens, hidden, wide),
        "down": (tokens, wide, hidden),
        "query": (tokens, hidden, hidden),
    }


def part(name: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The rows of a part of the result."""
    if name == "rates":
        return rates(shapes_of(options.size))
    if name == "errors":
        size = "tiny" if options.size == "tiny" else "small"
        return errors(size, options.model, 3 if size == "tiny" else 30)
    return iter([(name, measure_step(STEPS[name], options.size, options.steps))])


def run_part(name: str, rest: list[str], seconds: float) -> dict[str, Any]:
    """A part in a process of its own: what it printed, and its last words if it failed."""
    command = [sys.executable, "-u", "-m", "train.benchmarks.fp8", "--part", name, *rest]
    error = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        text = done.stdout
        if done.returncode:
            error = "\n".join(done.stderr.strip().splitlines()[-3:])
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        error = f"took more than the {seconds:.0f} s that were left"
    rows = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("ROW: ")]
    return dict(rows) | ({f"{name}: error": error} if error else {})


def main() -> None:
    """Measures, and writes the result after each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="llama-8b")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", type=Path, help="of the errors, in place of a random one")
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--only", default="", help="parts whose name this pattern is found in")
    parser.add_argument("--part", help="this part alone, in this process")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.part:
        for row in part(options.part, options):
            print("ROW: " + json.dumps(row), flush=True)
        print("ROW: " + json.dumps(["where", provenance()]), flush=True)
        return
    ends = time.monotonic() + options.seconds
    rest = ["--size", options.size, "--steps", str(options.steps)]
    rest += [] if options.model is None else ["--model", str(options.model)]
    steps = list(STEPS)
    order = [*steps[:6], "rates", *steps[6:8], "errors", *steps[8:]]
    result: dict[str, Any] = {"parts": {}}
    where: dict[str, Any] = {}
    for name in order:
        if not re.search(options.only, name):
            continue
        left = ends - time.monotonic()
        if name in STEPS and left < ARM_S and options.size.startswith("llama"):
            found: dict[str, Any] = {name: {"error": f"left out: {left:.0f} s were left"}}
        else:
            began = time.monotonic()
            found = run_part(name, rest, left)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        where = found.pop("where", where)  # asked here, the device would be this process's
        result["parts"][name] = found
        print(json.dumps(found, indent=1), flush=True)
        write_result(options.output, result, where)


if __name__ == "__main__":
    main()
