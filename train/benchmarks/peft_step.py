"""A training step of PyTorch with PEFT's LoRA: what `step_time` compares with, a process an arm.

python -m train.benchmarks.peft_step --size llama-8b --rows 2 --length 2048 --liger
"""

import argparse
import json
import statistics
import time
from typing import Any

from train.benchmarks.random_base import SIZES

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(options: argparse.Namespace, device: str) -> Any:
    """LLaMA with random weights in bfloat16 and LoRA on all its linear layers."""
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


def main() -> None:
    """Times some steps and prints the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, required=True)
    for name in ("rows", "length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--segments", type=int, default=1, help="examples packed in a row")
    for name in ("liger", "checkpointing", "compile", "nf4"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = build(options, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
    shape = (options.rows, options.length)
    ids = torch.randint(0, SIZES[options.size].vocab_size, shape, device=device)
    inputs = {"input_ids": ids, "labels": ids}
    if options.segments > 1:  # positions that begin anew are how transformers knows the examples
        each = -(-options.length // options.segments)
        inputs["position_ids"] = (torch.arange(options.length, device=device) % each).expand(shape)
    seconds = []
    for _ in range(options.steps + 2):
        began = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    step = statistics.median(seconds[2:])
    print(json.dumps({"step_s": step, "peak_gib": peak, "first_step_s": seconds[0]}))


if __name__ == "__main__":
    main()
