"""The quickstart: fine-tunes the embedded model, tests it, merges, exports and draws pictures.

    python -m train.quickstart.run

It writes to `out/quickstart`, which it replaces each time.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.table import Table

import genlora_jax as gl
from genlora_jax.analysis import singular_values
from genlora_jax.generation.decoding import decode
from genlora_jax.hf.tokenizer import load_tokenizer
from genlora_jax.settings import parse
from genlora_jax.training.finetune import finetune
from genlora_jax.training.recipe import Recipe

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / "out" / "quickstart"
BASE = HERE / "base"
RECIPES = {
    "GenLoRA": "quickstart.yaml",
    "GenLoRA_RBF": "quickstart_rbf.yaml",
    "LoRA": "quickstart_lora.yaml",
}
SHOWN = ("base", *RECIPES)
Rows = list[dict[str, str]]


def answers(model: Any, params: Any, tokenizer: Any, rows: Rows, factors: Any = None) -> list[str]:
    """The model's answer to each row's prompt, greedily decoded."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    stop = [tokenizer.eos_token_id]
    new = decode(model, params, prompts, factors=factors, max_new_tokens=16, stop=stop)
    return tokenizer.batch_decode(new)


def exact_match(texts: list[str], rows: Rows) -> float:
    """Share of answers that equal the row's completion."""
    pairs = zip(texts, rows, strict=True)
    return float(np.mean([text == row["completion"] for text, row in pairs]))


def draw_losses(file: Path) -> None:
    """Training and evaluation loss of every run against the step."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, name in enumerate(RECIPES):
        lines = (OUT / name.lower() / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        for field, style in (("loss", "-"), ("eval_loss", "o")):
            points = [(r["step"], r[field]) for r in records if field in r]
            label = f"{name}, {'training' if field == 'loss' else 'held-out'}"
            axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label, lw=1)
    axes.set(xlabel="step", ylabel="loss (nats a token)", yscale="log")
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_singular_values(deltas: dict[str, Any], file: Path) -> None:
    """Singular values of every adapted kernel's delta, and their geometric mean."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (name, factors) in enumerate(deltas.items()):
        flat = flatten_dict(factors)
        values = [
            np.atleast_2d(singular_values(flat[(*path[:-1], "a")], flat[(*path[:-1], "b")]))
            for path in flat
            if path[-1] == "a"
        ]
        rows = np.maximum(np.concatenate(values), 1e-6)
        index = np.arange(1, rows.shape[1] + 1)
        axes.plot(index, rows.T, color=f"C{i}", alpha=0.15, lw=0.8)
        axes.plot(index, np.exp(np.log(rows).mean(axis=0)), "o-", color=f"C{i}", label=name)
    axes.set(xlabel="index", ylabel="singular value of the delta", yscale="log")
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Runs all of it."""
    began = time.monotonic()
    console = Console()
    shutil.rmtree(OUT, ignore_errors=True)
    for name, recipe in RECIPES.items():
        console.rule(f"{name}: genlora finetune --config train/recipes/{recipe}")
        if finetune(parse(Recipe, ["--config", str(ROOT / "train" / "recipes" / recipe)])):
            return

    console.rule("before and after")
    tokenizer = load_tokenizer(BASE)
    rows = [json.loads(line) for line in (HERE / "data" / "test.jsonl").read_text().splitlines()]
    model, params = gl.load_llama(BASE, dtype=jnp.float32, param_dtype=jnp.float32)
    answered = {"base": answers(model, params, tokenizer, rows)}
    deltas, counts = {}, {"base": 0}
    for name in RECIPES:
        cfg, adapter = gl.load_adapter(OUT / name.lower() / "adapter", params, model=model)
        deltas[name] = gl.generate_factors(cfg, adapter)
        counts[name] = gl.count_parameters(adapter)
        answered[name] = answers(model, params, tokenizer, rows, deltas[name])
        if name == "GenLoRA":
            gl.export_peft(OUT / "peft", cfg, deltas[name], base=BASE)
    merged = gl.merge(params, deltas["GenLoRA"])
    gl.export_hf(OUT / "merged", merged, base=BASE)
    answered["merged"] = answers(model, merged, tokenizer, rows)

    samples = Table("problem", *SHOWN, show_lines=True)
    for i in range(4):
        samples.add_row(rows[i]["prompt"], *(answered[name][i] for name in SHOWN))
    console.print(samples)
    scores = {name: exact_match(texts, rows) for name, texts in answered.items()}
    results = Table("model", "parameters trained", "exact match")
    for name, score in scores.items():
        results.add_row(name, f"{counts.get(name, 0):,}", f"{score:.1%}")
    console.print(results)
    draw_losses(OUT / "losses.png")
    draw_singular_values(deltas, OUT / "singular_values.png")
    seconds = time.monotonic() - began
    report = {"exact_match": scores, "parameters": counts, "seconds": round(seconds, 1)}
    (OUT / "results.json").write_text(json.dumps(report | {"jax": jax.__version__}, indent=1))
    console.print(f"{seconds:.0f} s. In {OUT.relative_to(ROOT)}: merged/ (Hugging Face), peft/,")
    console.print("losses.png, singular_values.png, results.json")


if __name__ == "__main__":
    main()
