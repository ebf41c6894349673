"""`model.remat: auto` on a device: what it chooses, how long that takes, and whether it fits.

    XLA_CLIENT_MEM_FRACTION=0.1 python -m train.benchmarks.remat_auto

The recipe `llama3_8b_gpu.yaml` but for the batch, on random weights. The fraction of the device's
memory that JAX may take stands for a smaller device.
"""

import argparse
import time
from pathlib import Path

import jax

from genlora_jax.hf.base_model import ModelConfig
from genlora_jax.training.remat import GIB, step_that_fits
from train.benchmarks.measuring import RESULTS, write_result
from train.benchmarks.random_base import SIZES, random_base
from train.benchmarks.step_time import Arm, batch, program_of

RESULT = RESULTS / "remat_auto.json"


def main() -> None:
    """Chooses, takes some steps, and writes what was said."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="llama3.2-1b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    base = random_base(SIZES[options.size], scan=False)
    arm = Arm("auto", options.size, recipe=batch(options.rows, options.length))
    program = program_of(arm, base)
    device = jax.devices()[0]
    policies = ModelConfig(path="", remat="auto").policies(device.platform)
    lines: list[str] = []
    tried: list[str] = []

    def make(policy: object) -> object:
        tried.append(str(policy))
        return program.make(policy)

    layers = base[0].config.num_hidden_layers
    step = step_that_fits(make, policies, device, lines.append, layers)
    state, *rest = program.operands
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        state, metrics = step(state, *rest)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    stats = device.memory_stats() or {}
    result = {
        "device": device.device_kind,
        "size": options.size,
        "rows": options.rows,
        "length": options.length,
        "memory_gib": stats.get("bytes_limit", 0) / GIB,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / GIB,
        "said": lines,
        "tried": tried,
        "first_step_s": seconds[0],
        "step_s": min(seconds[1:]),
    }
    print(result, flush=True)
    write_result(options.output, result)


if __name__ == "__main__":
    main()
