"""The bridge: a real small LLaMA tuned on a book, here and with PEFT, in one run on this machine.

    python -m train.benchmarks.bridge --model stories260k --text grimm.txt

The text is split into rows of 256 tokens, the last 5 % held out; 300 steps of 16 rows, warm-up and
cosine, AdamW, gradients clipped to norm 1. A sweep of each arm (5 to 10 rates) chose its rate
on the held-out rows, so the losses of all arms are a little optimistic.
"""

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import genlora_jax as gl
from genlora_jax.base.quantise import BaseDtype
from genlora_jax.hf.tokenizer import load_tokenizer
from genlora_jax.training.optim import OptimConfig, learning_rate_schedule, make_optimizer
from genlora_jax.training.step import evaluate, init_state, make_eval_step, make_train_step
from train.benchmarks.measuring import RESULTS, write_result

LENGTH, ROWS, STEPS, HELD_OUT = 256, 16, 300, 0.05
RESULT = RESULTS / "bridge.json"


@dataclass(frozen=True)
class Arm:
    """A method and its rate."""

    config: gl.AdapterConfig
    learning_rate: float


LORA = Arm(gl.LoRAConfig(rank=8, alpha=16.0), 0.02)
GENLORA = Arm(gl.GenLoRAConfig(rank=10, alpha=20.0, group_size=16), 0.015)
GENLORA_RBF = Arm(gl.GenLoRAConfig(rank=28, alpha=56.0, group_size=8, kernels=4), 0.01)
ARMS = {"LoRA r=8": LORA, "GenLoRA r=10 g=16": GENLORA, "GenLoRA r=28 g=8 K=4": GENLORA_RBF}


def read_rows(model: Path, text: Path, order_seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Training batches `[STEPS, ROWS, LENGTH]` and held-out rows `[n, LENGTH]` of token ids."""
    ids = load_tokenizer(model)(text.read_text(), verbose=False)["input_ids"]
    rows = np.array(ids[: len(ids) // LENGTH * LENGTH], np.int32).reshape(-1, LENGTH)
    train, held = np.split(rows, [int(len(rows) * (1 - HELD_OUT))])
    rng = np.random.default_rng(order_seed)
    epochs = -(-STEPS * ROWS // len(train))
    order = np.concatenate([rng.permutation(len(train)) for _ in range(epochs)])
    return train[order[: STEPS * ROWS]].reshape(STEPS, ROWS, LENGTH), held


def batch(rows: np.ndarray, count: int = ROWS) -> dict[str, np.ndarray]:
    """Rows as a batch, filled up to so many with padding."""
    rows = np.pad(rows, ((0, count - len(rows)), (0, 0)), constant_values=-1)
    real = rows >= 0
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), rows.shape)
    segments = real.astype(np.int32)
    return {
        "input_ids": np.where(real, rows, 0),
        "loss_mask": real,
        "segment_ids": segments,
        "positions": positions,
    }


def ours(
    model_path: Path,
    text: Path,
    arm: Arm,
    *,
    seed: int = 0,
    order_seed: int = 0,
    steps: int = STEPS,
    rows: int = ROWS,
    base_dtype: BaseDtype | None = None,
) -> dict[str, Any]:
    """Trains an arm with this library, on so many rows of each batch."""
    train, held = read_rows(model_path, text, order_seed)
    model, params = gl.load_llama(
        model_path, dtype="float32", param_dtype="float32", scan=False, base_dtype=base_dtype
    )
    adapter = gl.init_adapter(arm.config, jax.random.key(seed), params)
    optimizer = make_optimizer(OptimConfig(learning_rate=arm.learning_rate), steps)
    state = init_state(adapter, optimizer)
    step = make_train_step(model, arm.config, optimizer)
    eval_step = make_eval_step(model)
    held_batches = [batch(held[i : i + ROWS]) for i in range(0, len(held), ROWS)]
    factors = gl.generate_factors(arm.config, adapter)
    before = evaluate(eval_step, params, factors, held_batches)
    seconds = []
    for some in train[:steps, :rows]:
        began = time.perf_counter()
        state, metrics = step(state, params, batch(some, rows))
        metrics["loss"].block_until_ready()
        seconds.append(time.perf_counter() - began)
    factors = gl.generate_factors(arm.config, state.adapter)
    return {
        "parameters": gl.count_parameters(adapter),
        "learning_rate": arm.learning_rate,
        "before": before,
        "after": evaluate(eval_step, params, factors, held_batches),
        "steps_per_second": 1 / float(np.median(seconds)),
    }


def peft(
    model_path: Path,
    text: Path,
    arm: Arm,
    seed: int = 0,
    *,
    order_seed: int = 0,
    steps: int = STEPS,
    rows: int = ROWS,
    **load: Any,
) -> dict[str, Any]:
    """Trains LoRA with PyTorch and PEFT on the same batches; `load` are options of the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    train, held = read_rows(model_path, text, order_seed)
    cfg = arm.config
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32, **load)
    lora = LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules="all-linear")
    model = get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    schedule = learning_rate_schedule(OptimConfig(learning_rate=arm.learning_rate), steps)
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)

    def loss(some: np.ndarray) -> Any:
        ids = torch.tensor(some).long().to(trained[0].device)
        return model(input_ids=ids, labels=ids).loss

    def held_out() -> float:
        with torch.no_grad():
            return float(np.mean([loss(row[None]).item() for row in held]))

    before, seconds = held_out(), []
    for i, some in enumerate(train[:steps, :rows]):
        began = time.perf_counter()
        loss(some).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = float(schedule(i))
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return {
        "parameters": sum(p.numel() for p in trained),
        "learning_rate": arm.learning_rate,
        "before": before,
        "after": held_out(),
        "steps_per_second": 1 / float(np.median(seconds)),
    }


def main() -> None:
    """Runs all arms, prints a table and writes the result."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    args = parser.parse_args()
    arms = {"PEFT LoRA r=8": peft(args.model, args.text, LORA)}
    for name, arm in ARMS.items():
        arms[name] = ours(args.model, args.text, arm)
        arms[name]["config"] = dataclasses.asdict(arm.config)
    write_result(RESULT, {"arms": arms})
    table = Table("arm", "parameters", "rate", "held-out loss", "steps/s")
    for name, arm_result in arms.items():
        table.add_row(
            name,
            f"{arm_result['parameters']:,}",
            f"{arm_result['learning_rate']:g}",
            f"{arm_result['after']:.3f}",
            f"{arm_result['steps_per_second']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
