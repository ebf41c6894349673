"""Training a real model on a base in FP8 beside bfloat16: curves of the loss, over some seeds.

    python -m train.benchmarks.fp8_training --model SmolLM2-135M --text grimm.txt

LoRA r=16 on rows of the text. A seed draws the adapter and the order of rows, for all bases alike.
The held-out loss is that of the same rows always, from before the first step on. What FP8 costs is
the difference at equal seeds; the noise that it is set against is the standard deviation of
bfloat16's own runs over seeds. The curves are written after each run.

`--seeds 0` measures instead, before training, what kernels rounded to FP8 cost alone, what FP8's
products add, and what FP8 costs in the kernels of one projection: the held-out loss, and the cosine
of the gradient with that in float32, in an adapter whose sides are both drawn. CPUs emulate FP8.
"""

import argparse
import dataclasses
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import genlora_jax as gl
from genlora_jax.base.kernel import read_kernel
from genlora_jax.base.quantise import Quantisation, compiler_options, quantise
from genlora_jax.hf.tokenizer import load_tokenizer
from genlora_jax.training.losses import cross_entropy
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.provenance import provenance
from genlora_jax.training.step import evaluate, init_state, make_eval_step, make_train_step
from genlora_jax.training.step_options import StepOptions
from train.benchmarks.fp8 import IN_PART, PROJECTIONS, all_but
from train.benchmarks.measuring import RESULTS, write_result

RESULT, BEFORE = RESULTS / "fp8_training.json", RESULTS / "fp8_before.json"
CONFIG = gl.LoRAConfig(rank=16, alpha=32.0)
OPTIONS = StepOptions(packed=False)
HELD_OUT = 32  # rows
ROUNDED = "bf16, kernels rounded to fp8"
BASES = {
    "bf16": Quantisation("bf16"),
    "fp8": Quantisation("fp8"),
    "fp8_backward": Quantisation("fp8_backward"),
    **{name: Quantisation("fp8", unquantised) for name, unquantised in IN_PART.items()},
}
ALONE = {f"fp8 in {name} alone": Quantisation("fp8", all_but(name)) for name in PROJECTIONS}
SETTINGS = ("rows", "length", "steps", "rate", "gradient_rows")


def batch_of(rows: np.ndarray) -> dict[str, np.ndarray]:
    """A batch in which every token is trained."""
    ones = np.ones_like(rows)
    return {
        "input_ids": rows,
        "loss_mask": ones.astype(bool),
        "segment_ids": ones,
        "positions": np.tile(np.arange(rows.shape[1], dtype=np.int32), (len(rows), 1)),
    }


def read_rows(model_path: Path, text: Path, length: int) -> np.ndarray:
    """The text as rows of tokens, without its rest."""
    ids = load_tokenizer(model_path)(text.read_text(), add_special_tokens=False)["input_ids"]
    return np.array(ids[: len(ids) // length * length], np.int32).reshape(-1, length)


def xla_options(params: Any) -> dict[str, Any]:
    """What XLA is told for a base on this machine."""
    return compiler_options(params, jax.default_backend())


def gradient_of(model: Any, params: Any, rows: np.ndarray) -> np.ndarray:
    """The gradient of a batch's loss in the adapter, of which neither side is zero."""
    adapter = gl.init_adapter(CONFIG, jax.random.key(0), params)
    noise = jax.tree.map(
        lambda x: 0.02 * jax.random.normal(jax.random.key(1), x.shape, x.dtype), adapter.trainable
    )
    noisy = jax.tree.map(jnp.add, adapter.trainable, noise)

    def loss(trainable: Any, params: Any, batch: Any) -> jax.Array:
        factors = gl.generate_factors(CONFIG, dataclasses.replace(adapter, trainable=trainable))
        total, weight = cross_entropy(model, params, factors, batch, OPTIONS)
        return total / weight

    lowered = jax.jit(jax.grad(loss)).lower(noisy, params, batch_of(rows))
    compiled = lowered.compile(xla_options(params))
    leaves = jax.tree.leaves(compiled(noisy, params, batch_of(rows)))
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])


def before_training(
    model: Any, floats: Any, rows: np.ndarray, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Each base's held-out loss, and its gradient's cosine with that in float32 and relative norm.

    One base more has FP8's kernels in bfloat16.
    """
    some = rows[: options.gradient_rows]
    with jax.default_matmul_precision("highest"):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), floats)
        exact = gradient_of(model.clone(dtype=jnp.float32, attention="xla"), wide, some)
    found = {}
    for form, quantisation in (BASES | {ROUNDED: BASES["fp8"]} | ALONE).items():
        params = quantise(floats, quantisation)
        if form == ROUNDED:
            params = jax.tree.map(lambda x, y: read_kernel(y, x.dtype), floats, params)
        gradient = gradient_of(model, params, some)
        norms = np.linalg.norm(gradient), np.linalg.norm(exact)
        step = make_eval_step(model, OPTIONS, compiler_options=xla_options(params))
        found[form] = {
            "held_out": evaluate(step, params, {}, held_out(rows, options)),
            "cosine": float(gradient @ exact / np.prod(norms)),
            "norm": float(norms[0] / norms[1]),
        }
        print(form, found[form], flush=True)
    return found


def held_out(rows: np.ndarray, options: argparse.Namespace) -> list[dict[str, np.ndarray]]:
    """Batches of the rows that are never trained."""
    return [batch_of(rows[i : i + options.rows]) for i in range(0, HELD_OUT, options.rows)]


def make_steps(model: Any, params: Any, optimizer: Any) -> tuple[Any, Any]:
    """The steps of training and of evaluation, for all seeds."""
    options = xla_options(params)
    train = make_train_step(model, CONFIG, optimizer, OPTIONS, compiler_options=options)
    return train, make_eval_step(model, OPTIONS, compiler_options=options)


def curve(
    steps_of: tuple[Any, Any],
    optimizer: Any,
    params: Any,
    rows: np.ndarray,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The losses of a run."""
    step, eval_step = steps_of
    parts, rest = held_out(rows, options), rows[HELD_OUT:]
    rng = np.random.default_rng(seed)
    state = init_state(gl.init_adapter(CONFIG, jax.random.key(seed), params), optimizer)
    began, losses, held = time.perf_counter(), [], {}
    for i in range(options.steps + 1):
        if i % options.every == 0 or i == options.steps:
            factors = gl.generate_factors(CONFIG, state.adapter)
            held[i] = evaluate(eval_step, params, factors, parts)
        if i == options.steps:
            break
        chosen = rest[rng.choice(len(rest), options.rows, replace=False)]
        state, metrics = step(state, params, batch_of(chosen))
        losses.append(metrics["loss"])
    seconds = time.perf_counter() - began
    return {"losses": [float(x) for x in losses], "held_out": held, "seconds": seconds}


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """At each evaluation: means, deviations over seeds, and differences to bfloat16 by seed."""
    found: dict[str, Any] = {}
    for at in runs["bf16"][0]["held_out"]:
        losses = {form: [run["held_out"][at] for run in each] for form, each in runs.items()}
        found[at] = {
            form: {
                "mean": statistics.mean(each),
                "deviation": statistics.stdev(each) if len(each) > 1 else None,
                "minus_bf16": [b - a for a, b in zip(losses["bf16"], each, strict=False)],
            }
            for form, each in losses.items()
            if each
        }
    return found


def main() -> None:
    """Trains, and writes the result after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--gradient-rows", type=int, default=2)
    parser.add_argument("--only", default="", help="bases to train on, beside bf16: a pattern")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    began, where = time.perf_counter(), provenance()
    shape = {name: getattr(options, name) for name in SETTINGS}
    result: dict[str, Any] = {"model": options.model.name, "text": options.text.name, **shape}
    rows = read_rows(options.model, options.text, options.length)
    optimizer = make_optimizer(OptimConfig(learning_rate=options.rate), options.steps)
    model, floats = gl.load_llama(options.model, dtype="bfloat16")
    if not options.seeds:
        found = before_training(model, floats, rows, options)
        write_result(options.output or BEFORE, result | {"bases": found}, where)
        return
    output = options.output or RESULT
    bases = {
        form: quantise(floats, quantisation)
        for form, quantisation in BASES.items()
        if form == "bf16" or re.search(options.only, form)
    }
    runs: dict[str, list[dict[str, Any]]] = {form: [] for form in bases}
    steps = {form: make_steps(model, params, optimizer) for form, params in bases.items()}
    for seed in range(options.seeds):
        for form, params in bases.items():
            runs[form].append(curve(steps[form], optimizer, params, rows, seed, options))
            last = runs[form][-1]
            print(seed, form, last["held_out"], f"{last['seconds']:.0f} s", flush=True)
            result |= {"runs": runs, "held_out": compare(runs)}
            write_result(output, result, where)
    result["seconds"] = time.perf_counter() - began
    write_result(output, result, where)
    for at, row in result["held_out"].items():
        print(at, row)
    print(f"{result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
