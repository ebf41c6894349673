"""A run killed again and again, at any moment: `make soak`, a quarter of an hour.

Not collected with the rest. Every life of the run is ended by kill -9 after a random time: while it
starts, restores, trains or saves. The losses must be those of a run that was left alone.
"""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
from finetune_process import start_finetune
from tiny_base import write_base

from genlora_jax.training.metrics import read_records

KILLS = int(os.environ.get("KILLS", "100"))
STEPS = 40 * KILLS
RECIPE = """
model: {{path: {here}/base, dtype: float32, param_dtype: float32}}
adapter: {{rank: 4, alpha: 8.0, group_size: 4, kernels: 2, targets: [q_proj, up_proj]}}
data: {{train: {here}/rows.jsonl, length: 8, batch_size: 8, pack: false}}
optim: {{learning_rate: 0.003}}
train: {{output: {here}/out, steps: {steps}, progress: false, save_every: 7}}
"""


def launch(here, *arguments):
    return start_finetune(here / "recipe.yaml", *arguments, cache=here / "compiled")


def losses(output):
    return {record["step"]: record["loss"] for record in read_records(output, STEPS)}


def saved(output):
    """Steps of the complete checkpoints; one under way has another name."""
    return [int(f.name) for f in (output / "checkpoints").glob("*") if f.name.isdecimal()]


def test_no_kill_at_any_moment_changes_the_losses(tmp_path):
    write_base(tmp_path / "base")
    rows = [{"prompt": f"{i % 7} and", "completion": f" {i % 5}"} for i in range(52)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(here=tmp_path, steps=STEPS))
    alone = launch(tmp_path, "--train.output", tmp_path / "alone")
    assert alone.wait() == 0, alone.stderr.read()

    output, rng, newest = tmp_path / "out", random.Random(0), 0
    for kill in range(KILLS):
        resume = ["--train.resume", "true"] if newest else []
        if not newest and output.exists():
            shutil.rmtree(output)  # killed before its first save
        life = launch(tmp_path, *resume)
        began, end = time.monotonic(), rng.uniform(0.5, 12.0)
        while time.monotonic() < began + end and life.poll() is None:
            time.sleep(0.01)
        if life.poll() is not None:
            assert life.returncode == 0, life.stderr.read()
            break
        life.send_signal(signal.SIGKILL)
        life.wait()
        complete = saved(output)
        assert max(complete, default=0) >= newest, f"kill {kill}: step {newest} is gone"
        newest = max(complete, default=0)
        print(f"kill {kill}: at {end:.1f} s, newest checkpoint {newest}", flush=True)
    else:
        life = launch(tmp_path, "--train.resume", "true")
        assert life.wait() == 0, life.stderr.read()
    ours, theirs = losses(output), losses(tmp_path / "alone")
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    np.testing.assert_array_equal(list(ours.values()), list(theirs.values()))
