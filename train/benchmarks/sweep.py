"""What a sweep costs: one run, one run at N x the batch, a sweep of N, N runs one by one.

    python -m train.benchmarks.sweep --size llama-8b

Random weights in bfloat16, random tokens in two segments a row; LoRA or GenLoRA at rank 16 on all
linear layers. Every program is compiled ahead of time and timed by the median call; memory is what
the compiler says the program holds: arguments and temporaries. A sweep is measured whole and in
two passes (`members_per_pass`). `run_s` is one compilation and 200
steps; of N runs one by one it is N times one run's. The second table is of a small model
and batch, which leave a large chip idle.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.table import Table

import genlora_jax as gl
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.provenance import provenance
from genlora_jax.training.step import init_state, make_train_step
from genlora_jax.training.sweep.members import Member
from genlora_jax.training.sweep.run import SweepProgram, for_members, initial_states, train_members

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
MEMORY = ("arguments_gib", "temporaries_gib")
STEPS = 200  # of the runs whose time, with compilation, the table adds up
# Shape: hidden, intermediate, layers, heads, key-value heads, vocabulary. Then rows, tokens a row.
SIZES = {
    "llama-8b": ((4096, 14336, 32, 32, 8, 128256), 1, 2048),
    "llama-1b": ((2048, 8192, 16, 32, 8, 128256), 2, 2048),
    "small": ((1024, 2816, 4, 16, 16, 8192), 2, 256),
    "tiny": ((64, 128, 2, 4, 2, 256), 2, 32),
}
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIELDS += ("num_key_value_heads", "vocab_size")


def random_base(size: str) -> tuple[LlamaForCausalLM, Any]:
    """A model and its parameters, made on the device a leaf at a time."""
    shape = dict(zip(FIELDS, SIZES[size][0], strict=True))
    config = LlamaConfig(**shape, head_dim=shape["hidden_size"] // shape["num_attention_heads"])
    gpu = jax.default_backend() == "gpu"
    model = LlamaForCausalLM(
        config,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        remat="full",
        attention="cudnn" if gpu else "xla",
    )
    flat = {}
    for i, (path, leaf) in enumerate(flatten_dict(parameter_shapes(model)).items()):
        deviation = leaf.shape[-2] ** -0.5 if path[-1] == "kernel" else 1.0

        def draw(key: jax.Array, shape: Any = leaf.shape, scale: float = deviation) -> jax.Array:
            return scale * jax.random.normal(key, shape, jnp.bfloat16)

        flat[path] = jax.jit(draw)(jax.random.fold_in(jax.random.key(0), i))
    return model, unflatten_dict(flat)


def random_batch(model: LlamaForCausalLM, rows: int, length: int) -> dict[str, np.ndarray]:
    """Tokens in two segments a row, all of them trained."""
    half = length // 2
    positions = np.concatenate([np.arange(half), np.arange(length - half)])
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))
    return {
        "input_ids": ids.astype(np.int32),
        "loss_mask": np.ones((rows, length), bool),
        "segment_ids": np.tile((np.arange(length) >= half) + 1, (rows, 1)).astype(np.int32),
        "positions": np.tile(positions, (rows, 1)).astype(np.int32),
    }


def measure(lower: Callable[[], Any], state: Any, *operands: Any, calls: int) -> dict[str, float]:
    """Compiles and times `(state, *operands) -> (state, metrics)`."""
    began = time.perf_counter()
    compiled = lower().compile()
    compile_s = time.perf_counter() - began
    memory = compiled.memory_analysis()
    spans = []
    for _ in range(calls + 1):
        began = time.perf_counter()
        state, metrics = compiled(state, *operands)
        loss = np.asarray(metrics["loss"])
        spans.append(time.perf_counter() - began)
    assert np.isfinite(loss).all(), loss
    return {
        "compile_s": compile_s,
        "step_ms": 1e3 * statistics.median(spans[1:]),
        "arguments_gib": memory.argument_size_in_bytes / GIB,
        "temporaries_gib": memory.temp_size_in_bytes / GIB,
    }


def measure_size(size: str, count: int, calls: int, cfg: Any) -> dict[str, Any]:
    """All programs on one base."""
    model, params = random_base(size)
    _, rows, length = SIZES[size]
    optim = OptimConfig()
    optimizer = make_optimizer(optim, STEPS)
    results: dict[str, Any] = {"rows": rows, "length": length, "members": count}

    def one_run(rows: int) -> dict[str, float]:
        batch = jax.device_put(random_batch(model, rows, length))
        state = init_state(gl.init_adapter(cfg, jax.random.key(0), params), optimizer)
        step = make_train_step(model, cfg, optimizer)
        return measure(lambda: step.lower(state, params, batch), state, params, batch, calls=calls)

    results["one run"] = one_run(rows)
    results["one run, N x batch"] = one_run(count * rows)
    members = [
        Member(learning_rate=1e-4 * (i + 1), generator_ratio=0.3, seed=i) for i in range(count)
    ]
    # Two steps a call: the loop is in the program, as in a real sweep.
    batch = random_batch(model, rows, length)
    batches = jax.device_put({name: np.stack([x, x]) for name, x in batch.items()})

    def sweep(members_per_pass: int | None) -> dict[str, float]:
        program = SweepProgram(
            model=for_members(model),
            cfg=cfg,
            optim=optim,
            steps=STEPS,
            members_per_pass=members_per_pass,
        )
        states, numbers = initial_states(program, members, params)
        operands = (numbers, params, batches)
        swept = measure(
            lambda: train_members.lower(states, *operands, program=program),
            states,
            *operands,
            calls=calls,
        )
        swept["step_ms"] /= 2
        return swept

    sweeps = {"sweep of N": None, "sweep of N, two passes": count // 2}
    for name, members_per_pass in sweeps.items():
        results[name] = sweep(members_per_pass)
    one, large = results["one run"], results["one run, N x batch"]
    for own in (one, large, *(results[name] for name in sweeps)):
        own["run_s"] = own["compile_s"] + STEPS * own["step_ms"] / 1e3
    results["N runs one by one"] = {
        "run_s": count * one["run_s"],
        "step_ms": count * one["step_ms"],
    }
    results["over N x batch"] = {
        name: {
            "time": results[name]["step_ms"] / large["step_ms"],
            "memory": sum(results[name][k] for k in MEMORY) / sum(large[k] for k in MEMORY),
        }
        for name in sweeps
    }
    return results


def show(size: str, results: dict[str, Any]) -> None:
    columns = ("compile_s", "step_ms", "arguments_gib", "temporaries_gib", "run_s")
    title = f"{size}: N = {results['members']}, {results['rows']} x {results['length']} tokens"
    table = Table("program", *columns, title=title)
    for name, values in results.items():
        if isinstance(values, dict) and "step_ms" in values:
            cells = (f"{values[c]:.4g}" if c in values else "" for c in columns)
            table.add_row(name, *cells)
    Console().print(table)
    for name, ratio in results["over N x batch"].items():
        time_, memory = ratio["time"], ratio["memory"]
        print(f"{name} over one run of N x batch: time {time_:.3f}, memory {memory:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="llama-8b")
    parser.add_argument("--small", choices=SIZES, default="small", help="size of the second table")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--calls", type=int, default=5, help="timed calls of each program")
    parser.add_argument("--method", choices=("genlora", "lora"), default="genlora")
    parser.add_argument("--out", type=Path, default=RESULTS / "sweep.json")
    args = parser.parse_args()
    cfg: gl.LoRAConfig | gl.GenLoRAConfig = gl.LoRAConfig(rank=16)
    if args.method == "genlora":
        cfg = gl.GenLoRAConfig(rank=16, alpha=16.0, group_size=16, kernels=8)
    results: dict[str, Any] = {"method": args.method, "rank": cfg.rank, "steps": STEPS}
    for size in dict.fromkeys((args.size, args.small)):
        results[size] = measure_size(size, args.members, args.calls, cfg)
        show(size, results[size])
    if stats := jax.devices()[0].memory_stats():  # of the whole process
        results["peak_gib"] = stats["peak_bytes_in_use"] / GIB
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results | provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main()
