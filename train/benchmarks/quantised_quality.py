"""What quantising a base costs: perplexity, and the loss after tuning, beside bitsandbytes.

    python -m train.benchmarks.quantised_quality perplexity --model SmolLM2 --text grimm.txt
    python -m train.benchmarks.quantised_quality tuning --model stories260k --text grimm.txt

Perplexity: the model computes in float32, each row of 256 tokens is predicted from its own
beginning, rows spread over the text. Tuning: LoRA r=8 as in `bridge`, 100 steps, some seeds of the
adapter; the loss is that of the held-out rows. Results add up in one file.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from train.benchmarks.bridge import LORA, ours, peft
from train.benchmarks.measuring import RESULTS, write_result

RESULT = RESULTS / "quantised_quality.json"
FORMS = ("bf16", "fp8", "int8", "nf4", "int4")
LENGTH, STEPS = 256, 100
THEIRS = {
    "bitsandbytes NF4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "bitsandbytes int8": {"load_in_8bit": True},
}


def bitsandbytes(name: str) -> dict[str, Any]:
    """Options of `from_pretrained` for a base that bitsandbytes quantises."""
    import torch
    from transformers import BitsAndBytesConfig

    compute = {"bnb_4bit_compute_dtype": torch.float32} if "NF4" in name else {}
    return {
        "quantization_config": BitsAndBytesConfig(**THEIRS[name], **compute),
        "device_map": "cpu",
    }


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


def their_perplexity(model_path: Path, rows: np.ndarray, name: str | None) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    load = {} if name is None else bitsandbytes(name)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, **load)
    with torch.no_grad():
        ids = [torch.tensor(row).long()[None] for row in rows]
        return float(np.exp(np.mean([model(input_ids=x, labels=x).loss.item() for x in ids])))


def perplexities(model: Path, text: Path, count: int) -> Iterator[tuple[str, Any]]:
    rows = rows_of(model, text, count)
    for form in FORMS:
        yield form, {"perplexity": our_perplexity(model, rows, form)}
    for name in (None, *THEIRS):
        label = name or "PyTorch, not quantised"
        try:
            yield label, {"perplexity": their_perplexity(model, rows, name)}
        except Exception as error:  # a form that it does not run on this machine
            yield label, {"error": f"{type(error).__name__}: {error}"[:200]}


def tunings(model: Path, text: Path, seeds: int) -> Iterator[tuple[str, Any]]:
    for form in FORMS:
        runs = [ours(model, text, LORA, seed=s, steps=STEPS, base_dtype=form) for s in range(seeds)]
        yield form, {"before": runs[0]["before"], "after": [run["after"] for run in runs]}
    for name in (None, "bitsandbytes NF4"):
        load = {} if name is None else bitsandbytes(name)
        runs = [peft(model, text, LORA, s, steps=STEPS, **load) for s in range(seeds)]
        label = f"PEFT + {name}" if name else "PEFT, not quantised"
        yield label, {"before": runs[0]["before"], "after": [run["after"] for run in runs]}


def main() -> None:
    """Measures, adds to the result and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["perplexity", "tuning"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64, help="of the perplexity")
    parser.add_argument("--seeds", type=int, default=3, help="of the tuning")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    measured = {"perplexity": perplexities, "tuning": tunings}[options.part]
    count = options.rows if options.part == "perplexity" else options.seeds
    result = json.loads(options.output.read_text()) if options.output.exists() else {}
    rows: dict[str, Any] = {}
    result[f"{options.part}, {options.model.name}"] = {"text": options.text.name, "arms": rows}
    if options.part == "perplexity":
        result[f"{options.part}, {options.model.name}"]["tokens"] = count * (LENGTH - 1)
    table = Table("base", options.part)
    for name, row in measured(options.model, options.text, count):
        rows[name] = row
        write_result(options.output, result)
        print(name, row, flush=True)
        values = row.get("after", [row.get("perplexity")])
        table.add_row(name, " ".join("-" if v is None else f"{v:.3f}" for v in values))
    Console().print(table)


if __name__ == "__main__":
    main()
