"""The study's LoRA beside PEFT's: the same base, rows and rate, several seeds of each.

    python -m train.benchmarks.frontier.against_peft --model stories260k --text grimm.txt

The bridge's setting, a real small LLaMA tuned on a book, run through the sweep that the study is
made with. Seeds change initial factors alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import genlora_jax as gl
from genlora_jax.training.optim import OptimConfig
from genlora_jax.training.provenance import provenance
from genlora_jax.training.sweep.members import Member
from genlora_jax.training.sweep.run import run_sweep
from train.benchmarks.bridge import LORA, ROWS, STEPS, batch, peft, read_rows

RESULT = Path(__file__).parent.parent / "results" / "against_peft.json"


def ours(model_path: Path, text: Path, seeds: int) -> list[float]:
    """Held-out losses after the last step, a seed each."""
    train, held = read_rows(model_path, text)
    model, params = gl.load_llama(model_path, dtype="float32", param_dtype="float32", scan=False)
    result = run_sweep(
        model,
        params,
        LORA.config,
        [
            Member(learning_rate=LORA.learning_rate, generator_ratio=1.0, seed=seed)
            for seed in range(seeds)
        ],
        (batch(rows) for rows in train),
        [batch(held[i : i + ROWS]) for i in range(0, len(held), ROWS)],
        optim=OptimConfig(),
        steps=STEPS,
        steps_per_call=10,
        packed=False,
    )
    return [float(loss) for loss in result.eval_loss[-1]]


def summary(losses: list[float]) -> dict[str, Any]:
    return {"losses": losses, "mean": np.mean(losses), "deviation": np.std(losses, ddof=1)}


def main() -> None:
    """Runs both and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    found = {
        "sweep": summary(ours(options.model, options.text, options.seeds)),
        "peft": summary(
            [
                peft(options.model, options.text, LORA, seed)["after"]
                for seed in range(options.seeds)
            ]
        ),
        "learning_rate": LORA.learning_rate,
    }
    for name in ("sweep", "peft"):
        print(f"{name}: {found[name]['mean']:.4f} +- {found[name]['deviation']:.4f}")
    RESULT.write_text(json.dumps(found | provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main()
