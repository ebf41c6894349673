"""The study's LoRA beside PEFT's: the same base, rows and rate, several seeds of each.

    python -m train.benchmarks.frontier.against_peft --model stories260k --text grimm.txt

The bridge's setting, a real small LLaMA tuned on a book, in the sweep that the study uses. Seeds
change initial factors alone.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import genlora_jax as gl
from genlora_jax.training.optim import OptimConfig
from genlora_jax.training.step_options import StepOptions
from genlora_jax.training.sweep.loop import run_sweep
from genlora_jax.training.sweep.members import Member
from genlora_jax.training.sweep.program import SweepProgram
from train.benchmarks.bridge import LORA, ROWS, STEPS, batch, peft, read_rows
from train.benchmarks.measuring import RESULTS, write_result

RESULT = RESULTS / "against_peft.json"


def ours(model_path: Path, text: Path, seeds: int) -> list[float]:
    """Held-out losses after the last step, one for each seed."""
    train, held = read_rows(model_path, text)
    model, params = gl.load_llama(model_path, dtype="float32", param_dtype="float32", scan=False)
    program = SweepProgram(
        model=model,
        cfg=LORA.config,
        optim=OptimConfig(),
        steps=STEPS,
        options=StepOptions(packed=False),
    )
    members = [
        Member(learning_rate=LORA.learning_rate, generator_ratio=1.0, seed=seed)
        for seed in range(seeds)
    ]
    held_out = [batch(held[i : i + ROWS]) for i in range(0, len(held), ROWS)]
    batches = (batch(rows) for rows in train)
    result = run_sweep(program, params, members, batches, held_out, steps_per_call=10)
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
    write_result(RESULT, found)


if __name__ == "__main__":
    main()
