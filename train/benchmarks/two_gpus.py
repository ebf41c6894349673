"""Two GPUs of one host: losses, step time and memory on every mesh, PEFT with DDP beside them.

    python -m train.benchmarks.two_gpus

LLaMA-8B's shape, random weights, bfloat16, the same global batch everywhere, everything recomputed
in the backward pass. Each arm is a separate process, which gives each its peak memory; arms of one
GPU run two at a time. Every step has the same batch, which the adapter memorises.
"""

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import genlora_jax as gl
from genlora_jax import sharding
from genlora_jax.mesh import MeshConfig, make_mesh
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.step import init_state, make_train_step
from genlora_jax.training.step_options import StepOptions
from train.benchmarks.measuring import GIB, RESULTS, time_step, write_result
from train.benchmarks.random_base import SIZES, Size, random_base, random_batch

RESULT = RESULTS / "two_gpus.json"
BATCHES = {"llama-8b": (8, 2048), "tiny": (4, 64)}  # rows and length by size
RANK, RATE = 16, 1e-3
# XLA's flags that let a layer's kernels arrive while the layer before computes.
OVERLAP = (
    "--xla_gpu_enable_pipelined_all_gather=true --xla_gpu_enable_pipelined_reduce_scatter=true "
    "--xla_gpu_enable_while_loop_double_buffering=true"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One run."""

    method: str = "genlora"
    mesh: dict[str, int] | None = None
    gpus: int = 1
    rows: int | None = None
    length: int | None = None
    flags: str = ""
    factors: str = "sharded"


ARMS = {
    "one": Arm(),
    "peft one": Arm(method="peft"),
    "data=2": Arm(mesh={"data": 2, "fsdp": 1}, gpus=2),
    "fsdp=2": Arm(mesh={"fsdp": 2}, gpus=2),
    "fsdp=2, overlapped": Arm(mesh={"fsdp": 2}, gpus=2, flags=OVERLAP),
    "fsdp=2, factors whole": Arm(mesh={"fsdp": 2}, gpus=2, factors="replicated"),
    "tensor=2": Arm(mesh={"fsdp": 1, "tensor": 2}, gpus=2),
    "peft ddp": Arm(method="peft", gpus=2),
    "lora one": Arm(method="lora"),
    "one, 32k": Arm(rows=1, length=32768),
    "tensor=2, 32k": Arm(mesh={"fsdp": 1, "tensor": 2}, gpus=2, rows=1, length=32768),
}


def measure_jax(arm: Arm, size: Size, steps: int) -> dict[str, Any]:
    """Losses, seconds and memory of our step."""
    mesh = None
    if arm.mesh is not None:
        mesh = make_mesh(MeshConfig(**arm.mesh), jax.devices()[: arm.gpus])
    model, params = random_base(size, mesh)
    if arm.method == "lora":
        cfg: gl.AdapterConfig = gl.LoRAConfig(rank=RANK, alpha=2.0 * RANK)
    else:
        cfg = gl.GenLoRAConfig(rank=RANK, alpha=2.0 * RANK, group_size=16, kernels=8)
    optimizer = make_optimizer(OptimConfig(learning_rate=RATE), steps)
    state = init_state(gl.init_adapter(cfg, jax.random.key(1), params), optimizer)
    batch: Any = random_batch(size, segments=1)
    if mesh is not None:
        state = jax.device_put(state, sharding.state_shardings(mesh, state))
        batch = sharding.place_batch(mesh, batch)
    if arm.factors == "replicated":
        specs = sharding.factor_specs
        sharding.factor_specs = lambda tree: jax.tree.map(lambda _: jax.P(), specs(tree))
    step = make_train_step(model, cfg, optimizer, StepOptions(packed=False), mesh=mesh)
    timing = time_step(step.lower, state, params, batch, calls=steps)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "losses": timing.losses,
        "step_seconds": timing.median(warmup=2),
        "seconds_to_compile": round(timing.compile_s, 1),
        "peak_gib": stats.get("peak_bytes_in_use", 0) / GIB,
        "program_gib": timing.arguments_gib + timing.temporaries_gib,
        "trained_parameters": gl.count_parameters(state.adapter),
    }


def measure_peft(arm: Arm, size: Size, steps: int) -> dict[str, Any]:
    """The same of PyTorch with PEFT's LoRA; the result is that of its first process."""
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    index = int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", index) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    config = LlamaConfig(**size.shape, max_position_embeddings=size.length, use_cache=False)
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    ).train()
    if arm.gpus > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        model = DistributedDataParallel(model, device_ids=[index] if cuda else None)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=cuda)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size.vocab_size, (size.rows, size.length), generator=generator)
    rows = size.rows // arm.gpus
    ids = ids[index * rows : (index + 1) * rows].to(device)
    losses, spans = [], []
    for _ in range(steps):
        began = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        spans.append(time.perf_counter() - began)
    if arm.gpus > 1:
        dist.destroy_process_group()
    return {
        "losses": losses,
        "step_seconds": statistics.median(spans[2:]),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if cuda else 0.0,
        "trained_parameters": sum(p.numel() for p in trained),
    }


def start(name: str, arguments: argparse.Namespace, first_gpu: int) -> list[subprocess.Popen[str]]:
    """Starts an arm: one process, or for DDP one a GPU."""
    arm = ARMS[name]
    visible = ",".join(str(first_gpu + i) for i in range(arm.gpus))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "train.benchmarks.two_gpus", "--arm", name]
    command += ["--size", arguments.size, "--steps", str(arguments.steps)]
    started = []
    for index in range(arm.gpus if arm.method == "peft" else 1):
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "JAX_NUM_CPU_DEVICES": "2"}
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"
        if arm.flags and arguments.size != "tiny":
            environment["XLA_FLAGS"] = arm.flags
        if arm.method == "peft":
            environment |= {"RANK": str(index), "WORLD_SIZE": str(arm.gpus)}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started: Sequence[subprocess.Popen[str]]) -> dict[str, Any]:
    """What an arm measured, or the end of its error messages."""
    outputs = [process.communicate() for process in started]
    if any(process.returncode for process in started):
        return {"failed": "\n".join(err[-1500:] for _, err in outputs)}
    return json.loads(outputs[0][0].splitlines()[-1])


def size_of(arm: Arm, name: str) -> Size:
    """The model's shape with the arm's batch; `tiny` has one batch for all arms."""
    rows, length = BATCHES[name]
    if name != "tiny":
        rows, length = arm.rows or rows, arm.length or length
    return dataclasses.replace(SIZES[name], rows=rows, length=length)


def run_all(arguments: argparse.Namespace) -> None:
    # In a separate process: this one must not take memory of the GPUs.
    code = (
        "import json; from genlora_jax.training.provenance import provenance; "
        "print(json.dumps(provenance()))"
    )
    printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    names = [name for name in ARMS if not arguments.only or name in arguments.only]
    rounds: list[list[str]] = []
    for name in names:
        free = 2 - sum(ARMS[other].gpus for other in rounds[-1]) if rounds else 0
        if ARMS[name].gpus <= free:
            rounds[-1].append(name)
        else:
            rounds.append([name])
    results: dict[str, Any] = {}
    where = json.loads(printed.stdout)
    size = dataclasses.asdict(size_of(Arm(), arguments.size))
    found = {"name": arguments.size, "size": size, "arms": results}
    for together in rounds:
        began = time.perf_counter()
        started = {name: start(name, arguments, i) for i, name in enumerate(together)}
        for name, processes in started.items():
            results[name] = dataclasses.asdict(ARMS[name]) | finish(processes)
            results[name]["seconds_in_all"] = round(time.perf_counter() - began, 1)
            print(name, json.dumps(results[name]), flush=True)
        # After each: the machine may be gone before a later one ends.
        write_result(Path(arguments.out), found, where)
    show(found)


def show(found: dict[str, Any]) -> None:
    """Prints the table: speed over that of one GPU with the same method and batch, per GPU."""
    table = Table("arm", "step, ms", "tokens/s", "share of linear", "peak GiB a GPU", "last loss")
    common = Size(**found["size"])
    for name, result in found["arms"].items():
        if "failed" in result:
            table.add_row(name, "failed")
            continue
        size = size_of(ARMS[name], found["name"])
        tokens = size.rows * size.length
        alone = found["arms"].get(
            {"peft": "peft one", "lora": "lora one"}.get(result["method"], "one")
        )
        share = "-"
        if size == common and alone and "failed" not in alone:
            share = f"{alone['step_seconds'] / result['step_seconds'] / result['gpus']:.1%}"
        table.add_row(
            name,
            f"{1e3 * result['step_seconds']:.0f}",
            f"{tokens / result['step_seconds']:,.0f}",
            share,
            f"{result['peak_gib']:.1f}",
            f"{result['losses'][-1]:.4f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=BATCHES, default="llama-8b")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--arm", choices=ARMS, help="run this one here, and print its result")
    parser.add_argument("--only", nargs="*", choices=ARMS, help="these arms instead of all")
    parser.add_argument("--out", default=str(RESULT))
    arguments = parser.parse_args()
    if arguments.arm is None:
        run_all(arguments)
        return
    arm = ARMS[arguments.arm]
    measure = measure_peft if arm.method == "peft" else measure_jax
    print(json.dumps(measure(arm, size_of(arm, arguments.size), arguments.steps)))


if __name__ == "__main__":
    main()
