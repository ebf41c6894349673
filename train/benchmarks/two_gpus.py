"""Two GPUs of one host: losses, step time and memory on every mesh, PEFT with DDP beside them.

    python -m train.benchmarks.two_gpus

LLaMA-8B's shape, random weights, bfloat16, the same global batch everywhere, everything recomputed
in the backward pass. Each arm is a process of its own, so that its peak memory is its own; arms of
one GPU run two at a time. Losses are those of one batch over and over, which the adapter learns by
heart.
"""

import argparse
import dataclasses
import functools
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

from rich.console import Console
from rich.table import Table

RESULT = Path(__file__).parent / "results" / "two_gpus.json"
GIB = 2**30
RANK, RATE = 16, 1e-3
# XLA's flags that let a layer's kernels arrive while the layer before computes.
OVERLAP = (
    "--xla_gpu_enable_pipelined_all_gather=true --xla_gpu_enable_pipelined_reduce_scatter=true "
    "--xla_gpu_enable_while_loop_double_buffering=true"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A model's shape and a run's."""

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    rows: int = 8
    length: int = 2048


SIZES = {
    "8b": Size(),
    "tiny": Size(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rows=4,
        length=64,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One run."""

    method: str = "genlora"
    mesh: dict[str, int] | None = None
    gpus: int = 1
    rows: int | None = None
    length: int | None = None
    flags: str = ""
    factors: str = "cut"


ARMS = {
    "one": Arm(),
    "peft one": Arm(method="peft"),
    "data=2": Arm(mesh={"data": 2, "fsdp": 1}, gpus=2),
    "fsdp=2": Arm(mesh={"fsdp": 2}, gpus=2),
    "fsdp=2, overlapped": Arm(mesh={"fsdp": 2}, gpus=2, flags=OVERLAP),
    "fsdp=2, factors whole": Arm(mesh={"fsdp": 2}, gpus=2, factors="whole"),
    "tensor=2": Arm(mesh={"fsdp": 1, "tensor": 2}, gpus=2),
    "peft ddp": Arm(method="peft", gpus=2),
    "lora one": Arm(method="lora"),
    "one, 32k": Arm(rows=1, length=32768),
    "tensor=2, 32k": Arm(mesh={"fsdp": 1, "tensor": 2}, gpus=2, rows=1, length=32768),
}


def measure_jax(arm: Arm, size: Size, steps: int) -> dict[str, Any]:
    """Losses, seconds and memory of our step."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import genlora_jax as gl
    from genlora_jax import sharding
    from genlora_jax.models.config import LlamaConfig
    from genlora_jax.models.llama import LlamaForCausalLM, init_params, parameter_shapes
    from genlora_jax.training.optim import OptimConfig, make_optimizer
    from genlora_jax.training.step import init_state, make_train_step

    on_gpu = jax.default_backend() == "gpu"
    mesh = None
    if arm.mesh is not None:
        mesh = sharding.make_mesh(sharding.MeshConfig(**arm.mesh), jax.devices()[: arm.gpus])
    shape = {k: v for k, v in dataclasses.asdict(size).items() if k not in ("rows", "length")}
    config = LlamaConfig(**shape, head_dim=size.hidden_size // size.num_attention_heads)
    model = LlamaForCausalLM(
        config,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        remat="full",
        attention="cudnn" if on_gpu else "xla",
        mesh=mesh,
    )
    plain = model.clone(mesh=None)
    where = None
    if mesh is not None:
        where = sharding.named(mesh, sharding.param_specs(parameter_shapes(plain)))
    draw = functools.partial(init_params, plain, jax.random.key(0))
    params = jax.jit(draw, out_shardings=where)()
    if arm.method == "lora":
        cfg: gl.AdapterConfig = gl.LoRAConfig(rank=RANK, alpha=2.0 * RANK)
    else:
        cfg = gl.GenLoRAConfig(rank=RANK, alpha=2.0 * RANK, group_size=16, kernels=8)
    optimizer = make_optimizer(OptimConfig(learning_rate=RATE), steps)
    state = init_state(gl.init_adapter(cfg, jax.random.key(1), params), optimizer)
    rng = np.random.default_rng(0)
    batch: Any = {
        "input_ids": rng.integers(0, size.vocab_size, (size.rows, size.length)).astype(np.int32),
        "loss_mask": np.ones((size.rows, size.length), bool),
        "segment_ids": np.ones((size.rows, size.length), np.int32),
        "positions": np.tile(np.arange(size.length, dtype=np.int32), (size.rows, 1)),
    }
    chunk = 1024
    if mesh is not None:
        state = jax.device_put(state, sharding.replicated(mesh))
        batch = sharding.place_batch(mesh, batch)
        chunk *= sharding.batch_shards(mesh)
    if arm.factors == "whole":
        keep = sharding.factor_specs
        sharding.factor_specs = lambda tree: jax.tree.map(lambda _: jax.P(), keep(tree))
    step = make_train_step(model, cfg, optimizer, chunk=chunk, packed=False, mesh=mesh)
    began = time.perf_counter()
    compiled = step.lower(state, params, batch).compile()
    seconds_to_compile = time.perf_counter() - began
    memory = compiled.memory_analysis()
    losses, spans = [], []
    for _ in range(steps):
        began = time.perf_counter()
        state, metrics = compiled(state, params, batch)
        losses.append(float(metrics["loss"]))
        spans.append(time.perf_counter() - began)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "losses": losses,
        "step_seconds": statistics.median(spans[2:]),
        "seconds_to_compile": round(seconds_to_compile, 1),
        "peak_gib": stats.get("peak_bytes_in_use", 0) / GIB,
        "program_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GIB,
        "trained_parameters": gl.count_parameters(state.adapter),
    }


def measure_peft(arm: Arm, size: Size, steps: int) -> dict[str, Any]:
    """The same of PyTorch with PEFT's LoRA; the first of its processes tells."""
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
    shape = {k: v for k, v in dataclasses.asdict(size).items() if k not in ("rows", "length")}
    config = LlamaConfig(**shape, max_position_embeddings=size.length, use_cache=False)
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
    own = size.rows // arm.gpus
    ids = ids[index * own : (index + 1) * own].to(device)
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
    """Starts an arm: one process, or one a GPU for DDP."""
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
    """What an arm measured, or the end of what it said instead."""
    outputs = [process.communicate() for process in started]
    if any(process.returncode for process in started):
        return {"failed": "\n".join(err[-1500:] for _, err in outputs)}
    return json.loads(outputs[0][0].splitlines()[-1])


def shape_of(arm: Arm, size: Size) -> Size:
    if arm.length is None or size == SIZES["tiny"]:
        return size
    return dataclasses.replace(size, rows=arm.rows, length=arm.length)


def run_all(arguments: argparse.Namespace) -> None:
    # Asked in a process of its own: this one leaves the GPUs alone.
    code = (
        "import json; from genlora_jax.training.provenance import provenance; "
        "print(json.dumps(provenance()))"
    )
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    names = [name for name in ARMS if not arguments.only or name in arguments.only]
    rounds: list[list[str]] = []
    for name in names:
        free = 2 - sum(ARMS[other].gpus for other in rounds[-1]) if rounds else 0
        if ARMS[name].gpus <= free:
            rounds[-1].append(name)
        else:
            rounds.append([name])
    results: dict[str, Any] = {}
    found = {"size": dataclasses.asdict(SIZES[arguments.size]), "arms": results}
    found |= json.loads(told.stdout)
    for together in rounds:
        began = time.perf_counter()
        started = {name: start(name, arguments, i) for i, name in enumerate(together)}
        for name, processes in started.items():
            results[name] = dataclasses.asdict(ARMS[name]) | finish(processes)
            results[name]["seconds_in_all"] = round(time.perf_counter() - began, 1)
            print(name, json.dumps(results[name]), flush=True)
        # After each: a later one may be cut off.
        Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")
    show(found)


def show(found: dict[str, Any]) -> None:
    """Prints the table: speed over that of one GPU with the same method and batch, per GPU."""
    table = Table("arm", "step, ms", "tokens/s", "share of linear", "peak GiB a GPU", "last loss")
    size = Size(**found["size"])
    for name, result in found["arms"].items():
        if "failed" in result:
            table.add_row(name, "failed")
            continue
        own = shape_of(ARMS[name], size)
        tokens = own.rows * own.length
        alone = found["arms"].get(
            {"peft": "peft one", "lora": "lora one"}.get(result["method"], "one")
        )
        share = "-"
        if own == size and alone and "failed" not in alone:
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
    parser.add_argument("--size", choices=SIZES, default="8b")
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
    print(json.dumps(measure(arm, shape_of(arm, SIZES[arguments.size]), arguments.steps)))


if __name__ == "__main__":
    main()
