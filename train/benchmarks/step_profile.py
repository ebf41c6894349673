"""Where the time of a step on a GPU goes: by kind of kernel.

    XLA_FLAGS=--xla_gpu_enable_command_buffer= python -m train.benchmarks.step_profile

The recipe `llama3_8b_gpu.yaml` but for its batch, two micro-batches of two rows. A kernel is of the
kind that its program's text says: what it multiplies, or of which part of the model it is. Beside
it stand the products of the base and the head at the rate of a product of 8,192 in this run, and
variants of the compiler's options. The result is written after each. Without command buffers a
profile says which instruction each kernel belongs to.
"""

import argparse
import collections
import gzip
import json
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genlora_jax.training.provenance import provenance
from train.benchmarks.measuring import RESULTS, gpu_events, product_rate, write_result
from train.benchmarks.random_base import SIZES, random_base
from train.benchmarks.step_time import Arm, batch, program_of

RESULT = RESULTS / "step_profile.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    # XLA puts the products of q, k and v with A side by side, and those of gate and up.
    "products of one input apart": {"xla_gpu_dot_merger_threshold_mb": 0},
}
BASE = "products of the base and the head"
CALL = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")


def kinds_of(text: str, rank: int) -> dict[str, str]:
    """The kind of each instruction of a compiled program.

    Args:
        text: The program's.
        rank: Of the adapter: a product with an axis of this size is one of its own.
    """
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line and not line.startswith((" ", "}")) and "{" in line:
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            bodies[name] = []
        elif " = " in line:
            bodies.setdefault(name, []).append(line)
    shapes = {
        line.split(" = ")[0].split()[-1].lstrip("%"): line.split(" = ")[1].split(" ")[0]
        for lines in bodies.values()
        for line in lines
    }

    def whole(line: str) -> list[str]:
        """An instruction, and all that it calls."""
        called = [part for found in CALL.findall(line) for part in bodies.get(found, [])]
        return [line, *(more for part in called for more in whole(part))]

    def kind(line: str) -> str:
        lines = whole(line)
        joined = "\n".join(lines)
        if "attention_fwd" in joined or "attention_bwd" in joined or "__cudnn$fmha" in joined:
            return "attention"
        products = [part for part in lines if re.search(r" dot\(|__cublas", part)]
        if products:
            sizes = set()
            for part in products:
                operands = re.findall(r"%([\w.-]+)", part.split("(", 1)[1].split(")")[0])
                for shape in [part, *(shapes.get(operand, "") for operand in operands)]:
                    sizes |= {
                        int(n)
                        for dims in re.findall(r"\[([\d,]+)\]", shape)
                        for n in dims.split(",")
                    }
            return "products of the adapter" if rank in sizes else BASE
        scope = (re.findall(r'op_name="([^"]*)"', line) or [""])[0]
        for part in ("layernorm", "rope", "mlp", "self_attn", "lm_head", "embed_tokens"):
            if part in scope:
                return f"elsewhere: {part}"
        return "elsewhere: rest"

    return {
        line.split(" = ")[0].split()[-1].lstrip("%"): kind(line)
        for lines in bodies.values()
        for line in lines
    }


def library(kernel: str) -> str:
    """The kind of a kernel that no instruction of the program is known for."""
    if re.search(r"nvjet|gemm|cutlass|xmma", kernel):
        return "products, of unknown instructions"
    if re.search(r"cudnn|fmha|flash", kernel):
        return "attention"
    return "not in the program's text"


def spans_of(folder: Path) -> list[tuple[str, str, float]]:
    """Instruction, kernel and milliseconds of each kernel in a profile."""
    return [
        (str(dict(event.stats).get("hlo_op", "")), event.name, event.duration_ns / 1e6)
        for events in gpu_events(folder)
        for event in events
    ]


@dataclass(frozen=True)
class Profile:
    """A step's time, and its kernels as `spans_of` returns them."""

    step_ms: float
    kernels: list[tuple[str, str, float]]


def profile(compiled: Any, operands: Any, steps: int) -> Profile:
    """Times some steps, and profiles one."""
    import jax

    state, *rest = operands
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, metrics = compiled(state, *rest)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, metrics = compiled(state, *rest)
            jax.block_until_ready(metrics)
        return Profile(1e3 * statistics.median(seconds[1:]), spans_of(Path(folder)))


def by_kind(spans: list[tuple[str, str, float]], kinds: dict[str, str]) -> dict[str, Any]:
    """Milliseconds of kernels by the kind of their instruction, and the largest kernels."""
    names = {name.replace(".", "_").replace("-", "_"): kind for name, kind in kinds.items()}
    total: dict[str, float] = collections.defaultdict(float)
    kernels: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for instruction, kernel, ms in spans:
        # Without the instruction, kernels of XLA's own are named after it.
        kind = kinds.get(instruction) or names.get(kernel) or library(kernel)
        if kernel.startswith("Memset"):
            kind += ": memory set to zero"
        total[kind] += ms
        entry = kernels[f"{kind} | {kernel[:60]}"]
        entry[0] += 1
        entry[1] += ms
    largest = sorted(kernels.items(), key=lambda item: -item[1][1])[:60]
    return {
        "kernels_ms": sum(total.values()),
        "by_kind_ms": dict(sorted(total.items(), key=lambda item: -item[1])),
        "largest": [[name, int(calls), ms] for name, (calls, ms) in largest],
    }


def main() -> None:
    """Profiles each variant, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="llama-8b")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--raw", type=Path, help="folder for the programs' texts and all kernels")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    import jax

    size, rows, count = SIZES[options.size], 4, 2
    flags = (*batch(rows, options.length), "--train.accumulate", str(count))
    base = random_base(size, scan=False)
    tokens = rows * options.length
    kernels = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(base[1]["model"]["layers"])
        if "kernel" in jax.tree_util.keystr(path)
    )
    rate, where = product_rate(), provenance()
    head = size.vocab_size * size.hidden_size
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "rows": rows,
        "accumulate": count,
        "length": options.length,
        "product_tflops": rate / 1e12,
        # Forward, and the gradient of the input; of the base no gradient is formed.
        "at_rate_of_product_ms": {BASE: 1e3 * 4 * (kernels + head) * tokens / rate},
        "variants": {},
    }
    for name, variant in VARIANTS.items():
        program = program_of(Arm(name, options.size, recipe=flags), base)
        on_gpu = jax.default_backend() == "gpu"
        began = time.perf_counter()
        lowered = program.make(program.remat).lower(*program.operands)
        compiled = lowered.compile(variant if on_gpu else None)
        compile_s = time.perf_counter() - began
        spans = profile(compiled, program.operands, options.steps)
        text = compiled.as_text()
        if options.raw:
            raw = json.dumps({"text": text, "spans": spans.kernels})
            options.raw.mkdir(parents=True, exist_ok=True)
            (options.raw / f"variant{len(result['variants'])}.json.gz").write_bytes(
                gzip.compress(raw.encode())
            )
        kinds = kinds_of(text, program.recipe.adapter.rank)
        found = {"step_ms": spans.step_ms} | by_kind(spans.kernels, kinds)
        result["variants"][name] = found | {"compile_s": compile_s}
        print(name, f"{found['step_ms']:.1f} ms, compiled in {compile_s:.0f} s", flush=True)
        print(f"  {found['step_ms'] - found['kernels_ms']:8.2f} between kernels", flush=True)
        for kind, ms in found["by_kind_ms"].items():
            print(f"  {ms:8.2f} {kind}", flush=True)
        write_result(options.output, result, where)


if __name__ == "__main__":
    main()
