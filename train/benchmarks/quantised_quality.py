"""What quantising a base costs: perplexity, and the loss after tuning, beside bitsandbytes.

    python -m train.benchmarks.quantised_quality perplexity --model SmolLM2 --text grimm.txt
    python -m train.benchmarks.quantised_quality tuning --model stories260k --text grimm.txt

Perplexity: the model computes in float32, each row of 256 tokens is predicted from its own
beginning, rows spread over the text. Tuning: LoRA r=8 as in `bridge`; a seed draws the adapter and
the order of the rows, and the loss is that of the held-out rows. Results add up in one file, arm by
arm: with `--only` a few of them are measured, in minutes. On a GPU JAX must leave PyTorch memory:
`XLA_PYTHON_CLIENT_PREALLOCATE=false`.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from genlora_jax.base.quantise import BaseDtype
from genlora_jax.training.provenance import provenance
from train.benchmarks.bridge import LORA, ours, peft
from train.benchmarks.measuring import RESULTS, write_result

RESULT = RESULTS / "quantised_quality.json"
LENGTH = 256
OURS: dict[str, BaseDtype] = {
    "not quantised": "bf16",
    "FP8": "fp8",
    "int8": "int8",
    "NF4": "nf4",
    "int4": "int4",
}
THEIRS: dict[str, dict[str, Any]] = {
    "PyTorch, not quantised": {},
    "PyTorch, bitsandbytes int8": {"load_in_8bit": True},
    "PyTorch, bitsandbytes NF4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}


def loading(name: str) -> dict[str, Any]:
    """Options of `from_pretrained` for an arm of PyTorch's."""
    import torch
    from bitsandbytes.nn import modules
    from transformers import BitsAndBytesConfig

    # A packed form on CPUs, in bfloat16 and for some shapes alone.
    modules.has_avx512bf16 = lambda: False
    device = {"device_map": "cuda" if torch.cuda.is_available() else "cpu"}
    if not (options := THEIRS[name]):
        return device
    compute = {"bnb_4bit_compute_dtype": torch.float32} if "NF4" in name else {}
    return device | {"quantization_config": BitsAndBytesConfig(**options, **compute)}


def rows_of(model: Path, text: Path, count: int) -> np.ndarray:
    """So many rows of token ids `[count, LENGTH]`, spread over a text."""
    from genlora_jax.hf.tokenizer import load_tokenizer

    ids = load_tokenizer(model)(text.read_text(), verbose=False)["input_ids"]
    rows = np.array(ids[: len(ids) // LENGTH * LENGTH], np.int32).reshape(-1, LENGTH)
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]


def our_perplexity(model_path: Path, rows: np.ndarray, form: Any) -> float:
    import jax
    import jax.numpy as jnp

    import genlora_jax as gl

    model, params = gl.load_llama(
        model_path, dtype="float32", param_dtype="float32", base_dtype=form
    )

    @jax.jit
    def loss(params: Any, row: jax.Array) -> jax.Array:
        logits = jax.nn.log_softmax(model.apply({"params": params}, row[None, :-1])[0])
        return -jnp.take_along_axis(logits, row[1:, None], axis=-1).mean()

    return float(np.exp(np.mean([loss(params, row) for row in rows])))


def their_perplexity(model_path: Path, rows: np.ndarray, name: str) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, **loading(name))
    with torch.no_grad():
        ids = [torch.tensor(row).long()[None].to(model.device) for row in rows]
        return float(np.exp(np.mean([model(input_ids=x, labels=x).loss.item() for x in ids])))


def perplexities(given: argparse.Namespace, arms: list[str]) -> Iterator[tuple[str, Any]]:
    rows = rows_of(given.model, given.text, given.rows)
    for name in arms:
        if name in OURS:
            found = our_perplexity(given.model, rows, OURS[name])
        else:
            found = their_perplexity(given.model, rows, name)
        yield name, {"perplexity": found}


def tunings(given: argparse.Namespace, arms: list[str]) -> Iterator[tuple[str, Any]]:
    arm = dataclasses.replace(LORA, learning_rate=given.rate)
    size = {"steps": given.steps, "rows": given.rows}
    for name in arms:
        runs: list[dict[str, Any]] = []
        for seed in range(given.seeds):
            options = size | {"seed": seed, "order_seed": seed}
            if name in OURS:
                base: dict[str, Any] = {"base_dtype": OURS[name]}
                runs.append(ours(given.model, given.text, arm, **options, **base))
            else:
                runs.append(peft(given.model, given.text, arm, **options, **loading(name)))
            after = [run["after"] for run in runs]
            yield (
                name,
                {
                    "before": runs[0]["before"],
                    "after": after,
                    "mean": float(np.mean(after)),
                    "steps_per_second": runs[0]["steps_per_second"],
                },
            )


def main() -> None:
    """Measures, adds to the result and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["perplexity", "tuning"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="of the perplexity (64), or of a step (16)")
    parser.add_argument("--seeds", type=int, default=3, help="of the tuning")
    parser.add_argument("--steps", type=int, default=100, help="of the tuning")
    parser.add_argument("--rate", type=float, default=LORA.learning_rate, help="of the tuning")
    parser.add_argument("--only", default="", help="arms whose name this pattern matches")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    tuning, origin = given.part == "tuning", provenance()
    given.rows = given.rows or (16 if tuning else 64)
    result = json.loads(given.output.read_text()) if given.output.exists() else {}
    settings = {"text": given.text.name, "rows": given.rows, "tokens_of_a_row": LENGTH}
    if tuning:
        settings |= {"steps": given.steps, "rate": given.rate, "seed_orders_rows": True}
    kept = result.get(f"{given.part}, {given.model.name}", {})
    if any(kept.get(name) != value for name, value in settings.items()):
        kept = {}  # of other settings
    arms: dict[str, Any] = kept.get("arms", {})
    result[f"{given.part}, {given.model.name}"] = settings | {"arms": arms}
    wanted = [name for name in (*OURS, *THEIRS) if re.match(given.only, name)]
    for name, row in (tunings if tuning else perplexities)(given, wanted):
        arms[name] = row | {"commit": origin["commit"], "machine": origin["machine"]}
        write_result(given.output, result, origin)
        print(name, row, flush=True)
    table = Table("base", given.part)
    for name, row in arms.items():
        values = row.get("after", [row.get("perplexity")])
        table.add_row(name, " ".join(f"{value:.4f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()
