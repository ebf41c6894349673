"""What a step costs by method: LLaMA-8B, one row of 2,048 tokens, all linear layers.

    python -m train.benchmarks.methods

Random weights in bfloat16, everything recomputed, as in `train.benchmarks.sweep`. The floor that no
method goes below is the base's own products: twice its parameters (without embeddings) in FLOP for
each token forward, again for what is recomputed, and again for the gradients of its inputs.
"""

import argparse
import json
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
from train.benchmarks.sweep import MEMORY, SIZES, STEPS, measure, random_base, random_batch

RESULT = Path(__file__).parent / "results" / "methods.json"
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
    """FLOP of a step in the base's own products."""
    kernels = [x.size for path, x in flatten_dict(params).items() if path[-1] == "kernel"]
    return 3 * 2.0 * sum(kernels) * tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="llama-8b")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calls", type=int, default=10, help="timed calls of each program")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    model, params = random_base(args.size)
    _, rows, length = SIZES[args.size]
    batch = jax.device_put(random_batch(model, rows, length))
    flops = floor_flops(params, rows * length)
    results: dict[str, Any] = {
        "size": args.size,
        "rows": rows,
        "length": length,
        "floor_tflop": flops / 1e12,
        "methods": {},
    }
    columns = ("parameters", "compile_s", "step_ms", "tflop_s", *MEMORY)
    table = Table("method", *columns, title=f"{args.size}: {rows} x {length} tokens")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.methods:
        cfg = METHODS[name]
        optimizer = make_optimizer(OptimConfig(), STEPS)
        state = init_state(gl.init_adapter(cfg, jax.random.key(0), params), optimizer)
        trained = sum(x.size for x in jax.tree.leaves(state.adapter.trainable))
        step = make_train_step(model, cfg, optimizer)
        lower = lambda step=step, state=state: step.lower(state, params, batch)  # noqa: E731
        found = measure(lower, state, params, batch, calls=args.calls)
        found |= {"parameters": trained, "tflop_s": flops / found["step_ms"] / 1e9}
        results["methods"][name] = found
        table.add_row(name, *(f"{np.round(found[c], 4):,}" for c in columns))
        # After each: a later one may be too much for this machine.
        args.out.write_text(json.dumps(results | provenance(), indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
