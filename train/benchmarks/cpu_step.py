"""A training step on CPUs: recipes as they ship beside PyTorch with PEFT, processes in turn.

    python -m train.benchmarks.cpu_step --model SmolLM2-135M --text grimm.txt --rows 4 --length 128

Every arm is a process of its own, and all arms are run `--rounds` times, one after another. Ours
are `genlora finetune` on the text, packed, with a recipe of model, data, adapter and length, and a
dtype. PEFT's base has that dtype; adapters are float32 in both. The first round's compilations are
kept, so that later rounds are a second start.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from genlora_jax.training.provenance import provenance
from train.benchmarks.measuring import RESULTS, keeping_compilations, paragraphs, write_result

PEFT = "PEFT, LoRA r=8"
DTYPES = ("float32", "bfloat16")
ADAPTERS = {
    "LoRA r=8": {
        "class_path": "genlora_jax.LoRAConfig",
        "init_args": {"rank": 8, "alpha": 16.0},
    },
    "GenLoRA r=10 g=16": {
        "class_path": "genlora_jax.GenLoRAConfig",
        "init_args": {"rank": 10, "alpha": 20.0, "group_size": 16},
    },
}


def peft_steps(options: argparse.Namespace, dtype: str = "float32") -> Iterator[None]:
    """Makes a step of PEFT's LoRA on random tokens each time it is asked."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype))
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (options.rows, options.length))
    while True:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def peft(options: argparse.Namespace) -> None:
    """Times steps of PEFT's LoRA, and prints when each ended."""
    for _ in itertools.islice(peft_steps(options, options.peft), options.steps):
        print("step", time.time(), flush=True)


def run_peft(options: argparse.Namespace, dtype: str) -> dict[str, float]:
    """The arm of PEFT, in a process."""
    began = time.time()
    command = [sys.executable, "-m", "train.benchmarks.cpu_step", "--peft", dtype]
    for name in ("model", "text", "rows", "length", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    ends = [float(line.split()[1]) for line in out.splitlines() if line.startswith("step ")]
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return {"first_step_s": ends[0] - began, "step_s": statistics.median(seconds)}


def write_recipe(options: argparse.Namespace, folder: Path, name: str, output: Path) -> Path:
    """Writes the text as rows, and a recipe of them for an arm of ours; the recipe's file."""
    rows, recipe = folder / "rows.jsonl", folder / "recipe.yaml"
    rows.write_text("".join(paragraphs(options.text)))
    data = {"train": str(rows), "length": options.length, "batch_size": options.rows}
    settings = {
        "model": {"path": str(options.model)},
        "data": data | {"overlong": "split"},
        "adapter": ADAPTERS[name],
        "train": {"output": str(output), "steps": options.steps, "progress": False},
    }
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


def run_ours(options: argparse.Namespace, folder: Path, name: str, dtype: str) -> dict[str, float]:
    """An arm of ours: `genlora finetune`, in a process."""
    output = folder / f"run-{time.time()}"
    recipe = write_recipe(options, folder, name, output)
    began = time.time()
    command = [sys.executable, "-m", "genlora_jax", "finetune", "--config", str(recipe)]
    command += ["--model.dtype", dtype]
    first = 0.0
    environment = keeping_compilations(folder) | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout or ():
            if line.startswith("compiled, "):
                first = time.time() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    # The first record's time holds the compilation, the last one's the end of the run.
    rates = [r["tokens"] / r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    seconds = statistics.median(rates[1:-1])
    waits = [r["input_wait"] for r in records if "input_wait" in r]
    return {
        "first_step_s": first,
        "step_s": seconds,
        "input_wait": statistics.median(waits[1:-1]),
    }


def step_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that say what a step is of."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    return parser


def main() -> None:
    """Runs all arms, prints a table and writes the result."""
    parser = step_parser(main.__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peft", choices=DTYPES, help="be the process of PEFT in a dtype")
    options = parser.parse_args()
    if options.peft:
        peft(options)
        return
    arms = list(itertools.product(DTYPES, (PEFT, *ADAPTERS)))
    runs: dict[str, list[dict[str, float]]] = {f"{name}, {dtype}": [] for dtype, name in arms}
    shape = {name: getattr(options, name) for name in ("rows", "length", "steps", "rounds")}
    result = {"model": options.model.name, **shape, "arms": runs}
    file, where = RESULTS / f"cpu_step_{options.model.name}.json", provenance()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for _ in range(options.rounds):
            for dtype, name in arms:
                ours = name in ADAPTERS
                run = run_ours(options, folder, name, dtype) if ours else run_peft(options, dtype)
                runs[f"{name}, {dtype}"].append(run)
            write_result(file, result, where)
    table = Table("arm", "step, s", "over PEFT's rate", "first step, s", "second start, s")
    fastest = {name: min(run["step_s"] for run in found) for name, found in runs.items()}
    for (name, found), (dtype, _) in zip(runs.items(), arms, strict=True):
        ratio = fastest[f"{PEFT}, {dtype}"] / fastest[name]
        firsts = [f"{run['first_step_s']:.1f}" for run in (found[0], found[-1])]
        table.add_row(name, f"{fastest[name]:.3f}", f"{ratio:.2f}", *firsts)
    Console().print(table)


if __name__ == "__main__":
    main()
