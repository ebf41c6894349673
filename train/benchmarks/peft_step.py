"""A training step of PyTorch with PEFT's LoRA: what ours is compared with, a process a GPU.

    python -m train.benchmarks.peft_step --size llama-8b --rows 2 --length 2048 --liger

`--shard ddp | fsdp` runs it in each of the processes that RANK and WORLD_SIZE count, as torchrun
sets them: rows are those of a process. `--unsloth` and `--torchtune` take that library's model and
adapter; `--checkpointing` is then the library's own.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from train.benchmarks.random_base import SIZES

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(options: argparse.Namespace, device: str) -> Any:
    """LLaMA with random weights in bfloat16 and LoRA on all its linear layers."""
    if options.unsloth:
        from train.benchmarks import unsloth_model

        return unsloth_model.build(options, TARGETS)
    if options.torchtune:
        from train.benchmarks import torchtune_model

        return torchtune_model.build(options, device)
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    if options.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = LlamaConfig(
        **SIZES[options.size].shape, max_position_embeddings=options.length, use_cache=False
    )
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if options.nf4:
        _to_nf4(model, device)
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS)
    model = get_peft_model(model, lora).train()
    return torch.compile(model) if options.compile else model


def _to_nf4(model: Any, device: str) -> None:
    """The linear layers but the head in bitsandbytes' NF4 with double quantisation."""
    import bitsandbytes as bnb
    import torch

    for module in list(model.model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is not torch.nn.Linear:
                continue
            new = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            new.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            setattr(module, name, new.to(device))
    model.is_loaded_in_4bit = True


def shard(model: Any, kind: str | None, device: str) -> tuple[Any, Any]:
    """The model over all processes, and what to call after each backward pass.

    With FSDP the base is sharded, a layer at a time; adapters are replicated.
    """
    if kind is None:
        return model, lambda: None
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if kind == "ddp":
        ids = [int(os.environ["RANK"])] if device == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids), lambda: None
    from torch.distributed.fsdp import fully_shard

    trained = [p for p in model.parameters() if p.requires_grad]
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, ignored_params=set(trained))
    fully_shard(model, ignored_params=set(trained))

    def average() -> None:
        import torch

        flat = torch.cat([p.grad.flatten() for p in trained])
        dist.all_reduce(flat)
        parts = torch.split(flat / dist.get_world_size(), [p.numel() for p in trained])
        for parameter, part in zip(trained, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    return model, average


def measure(flags: Sequence[str], gpus: int = 1, first: int = 0) -> dict[str, Any]:
    """Runs this script in a process for each of `gpus` GPUs from the `first` visible one on.

    Returns:
        What its first process measured; `error` if one failed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(gpus), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(first + gpus)))
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices.split(",")[first : first + gpus])}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "train.benchmarks.peft_step", *flags],
            env=os.environ | world | visible | {"RANK": str(index), "NCCL_NVLS_ENABLE": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(gpus)
    ]
    outputs = [process.communicate() for process in started]
    for process, (_, err) in zip(started, outputs, strict=True):
        if process.returncode:
            return {"error": err.strip().splitlines()[-1:]}
    return json.loads(outputs[0][0].strip().splitlines()[-1])


def main() -> None:
    """Times some steps and prints the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, required=True)
    for name in ("rows", "length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--segments", type=int, default=1, help="examples packed in a row")
    parser.add_argument("--shard", choices=("ddp", "fsdp"))
    for name in ("liger", "checkpointing", "compile", "nf4", "unsloth", "torchtune"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    if options.shard:
        if cuda:
            torch.cuda.set_device(int(os.environ["RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)
    model, after_backward = shard(build(options, device), options.shard, device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # of the steps, not of making the model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=cuda)
    shape = (options.rows, options.length)
    ids = torch.randint(0, SIZES[options.size].vocab_size, shape, device=device)
    inputs = {"input_ids": ids, "labels": ids}
    if options.segments > 1:  # positions that begin anew are how transformers knows the examples
        each = -(-options.length // options.segments)
        inputs["position_ids"] = (torch.arange(options.length, device=device) % each).expand(shape)
    seconds, losses = [], []
    for _ in range(options.steps + 2):
        began = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=not options.torchtune):
            loss = model(**inputs).loss
        loss.backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    step = statistics.median(seconds[2:])
    result = {"step_s": step, "peak_gib": peak, "first_step_s": seconds[0]}
    result["losses"] = [losses[0], losses[-1]]  # those of PEFT and Unsloth are about the same
    print(json.dumps(result), flush=True)
    if options.shard:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
