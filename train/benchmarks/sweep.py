"""What a sweep costs: one run, one run at N x the batch, a sweep of N, N runs one by one.

    python -m train.benchmarks.sweep --size llama-8b

Random weights in bfloat16, random tokens in two segments a row; LoRA or GenLoRA at rank 16 on all
linear layers. Every program is compiled ahead of time and timed by the median call; memory is what
the compiler reports of the program: arguments and temporaries. A sweep is measured whole and in two
passes (`members_per_pass`). `run_s` is one compilation and 200 steps; of N runs one by one it is N
times that of one run. The second table is of a small model and batch, which leave a large chip
idle.
"""

import argparse
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import genlora_jax as gl
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.step import init_state, make_train_step
from genlora_jax.training.sweep.loop import initial_states
from genlora_jax.training.sweep.members import Member
from genlora_jax.training.sweep.program import SweepProgram, train_members
from train.benchmarks.measuring import GIB, RESULTS, Timing, time_step, write_result
from train.benchmarks.random_base import SIZES, random_base, random_batch

MEMORY = ("arguments_gib", "temporaries_gib")
STEPS = 200  # of the runs whose time, with compilation, the table adds up


def summary(timing: Timing, steps_per_call: int = 1) -> dict[str, float]:
    """A program's figures; `run_s` is one compilation and STEPS steps."""
    step_s = timing.median() / steps_per_call
    return {
        "compile_s": timing.compile_s,
        "step_ms": 1e3 * step_s,
        "arguments_gib": timing.arguments_gib,
        "temporaries_gib": timing.temporaries_gib,
        "run_s": timing.compile_s + STEPS * step_s,
    }


def measure_size(name: str, count: int, calls: int, cfg: gl.AdapterConfig) -> dict[str, Any]:
    """All programs on one base."""
    size = SIZES[name]
    model, params = random_base(size)
    optim = OptimConfig()
    optimizer = make_optimizer(optim, STEPS)

    def one_run(rows: int) -> dict[str, float]:
        batch = jax.device_put(random_batch(replace(size, rows=rows)))
        state = init_state(gl.init_adapter(cfg, jax.random.key(0), params), optimizer)
        step = make_train_step(model, cfg, optimizer)
        return summary(time_step(step.lower, state, params, batch, calls=1 + calls))

    one, large = one_run(size.rows), one_run(count * size.rows)
    members = [
        Member(learning_rate=1e-4 * (i + 1), generator_ratio=0.3, seed=i) for i in range(count)
    ]
    # Two steps a call: the loop is in the program, as in a real sweep.
    batches = jax.device_put({key: np.stack([x, x]) for key, x in random_batch(size).items()})

    def sweep(members_per_pass: int | None) -> dict[str, float]:
        program = SweepProgram(
            model=model, cfg=cfg, optim=optim, steps=STEPS, members_per_pass=members_per_pass
        )
        states, numbers = initial_states(program, members, params)
        lower = functools.partial(train_members.lower, program=program)
        timing = time_step(lower, states, numbers, params, batches, calls=1 + calls)
        return summary(timing, steps_per_call=2)

    sweeps = {"sweep of N": sweep(None), "sweep of N, two passes": sweep(count // 2)}
    return {
        "rows": size.rows,
        "length": size.length,
        "members": count,
        "one run": one,
        "one run, N x batch": large,
        **sweeps,
        "N runs one by one": {"run_s": count * one["run_s"], "step_ms": count * one["step_ms"]},
        "over N x batch": {
            program: {
                "time": values["step_ms"] / large["step_ms"],
                "memory": sum(values[k] for k in MEMORY) / sum(large[k] for k in MEMORY),
            }
            for program, values in sweeps.items()
        },
    }


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
        figures = f"time {ratio['time']:.3f}, memory {ratio['memory']:.3f}"
        print(f"{name} over one run of N x batch: {figures}")


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
    write_result(args.out, results)


if __name__ == "__main__":
    main()
