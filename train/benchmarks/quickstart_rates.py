"""Learning rates of the quickstart's two recipes, chosen on the validation problems.

    python -m train.benchmarks.quickstart_rates

Each method is trained by its recipe at six rates. The test problems are not used.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import genlora_jax as gl
from genlora_jax.hf.tokenizer import load_tokenizer
from genlora_jax.settings import parse
from genlora_jax.training.finetune import finetune
from genlora_jax.training.metrics import read_records
from genlora_jax.training.recipe import Recipe
from train.benchmarks.measuring import RESULTS, write_result
from train.quickstart.run import BASE, HERE, RECIPES, ROOT, answers, exact_match

RATES = (0.002, 0.003, 0.0045, 0.0065, 0.01, 0.015)
RESULT = RESULTS / "quickstart_rates.json"


def run(recipe: Recipe, rate: float, output: Path) -> dict[str, Any]:
    """Trains at one rate; returns held-out loss and exact match on the validation problems."""
    recipe = dataclasses.replace(
        recipe,
        optim=dataclasses.replace(recipe.optim, learning_rate=rate),
        train=dataclasses.replace(recipe.train, output=str(output), progress=False),
    )
    finetune(recipe)
    rows = [json.loads(line) for line in (HERE / "data" / "validation.jsonl").open()]
    model, params = gl.load_llama(BASE, dtype=jnp.float32, param_dtype=jnp.float32)
    cfg, adapter = gl.load_adapter(output / "adapter", params, model=model)
    factors = gl.generate_factors(cfg, adapter)
    losses = [r["eval_loss"] for r in read_records(output, recipe.train.steps) if "eval_loss" in r]
    return {
        "learning_rate": rate,
        "loss": losses[-1],
        "exact_match": exact_match(
            answers(model, params, load_tokenizer(BASE), rows, factors), rows
        ),
    }


def main() -> None:
    table = Table("method", "rate", "validation loss", "exact match")
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, file in RECIPES.items():
        recipe = parse(Recipe, ["--config", str(ROOT / "train" / "recipes" / file)])
        for rate in RATES:
            with tempfile.TemporaryDirectory() as output:
                result = run(recipe, rate, Path(output) / "run")
            runs.setdefault(name, []).append(result)
            table.add_row(
                name, f"{rate:g}", f"{result['loss']:.4f}", f"{result['exact_match']:.1%}"
            )
    write_result(RESULT, {"runs": runs})
    Console().print(table)


if __name__ == "__main__":
    main()
