"""What a step costs by method: LLaMA-8B, one row of 2,048 tokens, all linear layers.

    python -m train.benchmarks.methods

Random weights in bfloat16, everything recomputed in the backward pass. No method takes less than
the base's products: twice its parameters (without embeddings) in FLOP for each token forward, the
same for what is recomputed, and the same for the gradients of its inputs.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.table import Table

import genlora_jax as gl
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.provenance import provenance
from genlora_jax.training.step import init_state, make_train_step
from train.benchmarks.measuring import RESULTS, time_step, write_result
from train.benchmarks.random_base import SIZES, random_base, random_batch

RESULT = RESULTS / "methods.json"
STEPS = 200  # of the schedule
COLUMNS = ("parameters", "compile_s", "step_ms", "tflop_s", "arguments_gib", "temporaries_gib")
METHODS: dict[str, gl.AdapterConfig] = {
    "LoRA r=16": gl.LoRAConfig(rank=16),
    "LoRA r=64": gl.LoRAConfig(rank=64),
    "GenLoRA, the defaults": gl.GenLoRAConfig(),
    "GenLoRA, K=16": gl.GenLoRAConfig(kernels=16),
    "LoRA r=16, Hadamard": gl.LoRAConfig(rank=16, hadamard=True),
    "GenLoRA, Hadamard": gl.GenLoRAConfig(hadamard=True),
    "DoRA r=16": gl.DoRAConfig(rank=16),
    "VeRA r=1024": gl.VeRAConfig(rank=1024),
}


def floor_flops(params: Any, tokens: int) -> float:
    """FLOP of a step in the base's products alone."""
    kernels = [x.size for path, x in flatten_dict(params).items() if path[-1] == "kernel"]
    return 3 * 2.0 * sum(kernels) * tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="llama-8b")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calls", type=int, default=10, help="timed calls of each program")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    size = SIZES[args.size]
    model, params = random_base(size)
    batch = jax.device_put(random_batch(size))
    flops = floor_flops(params, size.rows * size.length)
    results: dict[str, Any] = {
        "size": args.size,
        "rows": size.rows,
        "length": size.length,
        "floor_tflop": flops / 1e12,
        "methods": {},
    }
    where = provenance()
    title = f"{args.size}: {size.rows} x {size.length} tokens"
    table = Table("method", *COLUMNS, title=title)
    for name in args.methods:
        cfg = METHODS[name]
        optimizer = make_optimizer(OptimConfig(), STEPS)
        state = init_state(gl.init_adapter(cfg, jax.random.key(0), params), optimizer)
        trained = sum(x.size for x in jax.tree.leaves(state.adapter.trainable))
        step = make_train_step(model, cfg, optimizer)
        timing = time_step(step.lower, state, params, batch, calls=1 + args.calls)
        measured = {
            "compile_s": timing.compile_s,
            "step_ms": 1e3 * timing.median(),
            "arguments_gib": timing.arguments_gib,
            "temporaries_gib": timing.temporaries_gib,
            "parameters": trained,
            "tflop_s": flops / timing.median() / 1e12,
        }
        results["methods"][name] = measured
        table.add_row(name, *(f"{np.round(measured[c], 4):,}" for c in COLUMNS))
        # After each: a later one may not fit this machine.
        write_result(args.out, results, where)
    Console().print(table)


if __name__ == "__main__":
    main()
