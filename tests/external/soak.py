"""Commands killed again and again, at any moment: `make soak`, half an hour.

Not collected with the rest. Every life of a command is ended by kill -9 after a random time: while
it starts, restores, trains, evaluates, saves, or writes an adapter or a model. After each kill the
same command is given again; a run goes on with `--train.resume true` if the message says so, and
never otherwise. What comes out must be what a run makes that was left alone.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
from finetune_process import start_finetune
from tiny_base import REPOSITORY, write_base

from genlora_jax.atomic_files import WRITTEN
from genlora_jax.training.metrics import read_records

KILLS = int(os.environ.get("KILLS", "100"))
STEPS = 40 * KILLS
RESUME = "--train.resume true"
RECIPE = """
model: {{path: {here}/base, dtype: float32, param_dtype: float32}}
adapter: {{rank: 4, alpha: 8.0, group_size: 4, kernels: 2, targets: [q_proj, up_proj]}}
data: {{train: {here}/rows.jsonl, eval: {here}/rows.jsonl, length: 8, batch_size: 8, pack: false}}
optim: {{learning_rate: 0.003}}
train: {{output: {here}/out, steps: {steps}, progress: false, save_every: 7, eval_every: 5}}
"""
rng = random.Random(int(os.environ.get("SEED", "0")))


def workshop(here):
    write_base(here / "base")
    rows = [{"prompt": f"{i % 7} and", "completion": f" {i % 5}"} for i in range(52)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "recipe.yaml").write_text(RECIPE.format(here=here, steps=STEPS))


def launch(here, *arguments):
    return start_finetune(here / "recipe.yaml", *arguments, cache=here / "compiled")


def changed(file):
    """A function that says whether a file was written to since."""
    before = file.stat().st_mtime_ns if file.exists() else None
    return lambda: file.exists() and file.stat().st_mtime_ns != before


def killed(process, *moments, begun=None):
    """Kills a process a random time after it has `begun`; False if it has ended well before."""
    while begun and not begun() and process.poll() is None:
        time.sleep(0.02)
    end = time.monotonic() + rng.uniform(*moments)
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    process.kill()
    process.wait()
    return True


def files(directory):
    found = {str(f.relative_to(directory)): f for f in directory.rglob("*") if f.is_file()}
    return {name: file.read_bytes() for name, file in found.items() if file.name != WRITTEN}


def losses(output):
    return {r["step"]: r["loss"] for r in read_records(output, STEPS) if "loss" in r}


def saved(output):
    """Steps of the complete checkpoints; one under way has another name."""
    return [int(f.name) for f in (output / "checkpoints").glob("*") if f.name.isdecimal()]


def live(start, kill, most, complete, note=str):
    """Starts a run until it ends by itself; `kill(life, number)` ends at most so many lives.

    `complete` has the steps of its checkpoints, none of which a kill may take away; `note` adds to
    what is printed.
    """
    newest, arguments, kills = 0, [], 0
    while True:
        life = start(*arguments)
        if kills < most and kill(life, kills):
            kills += 1
        elif life.wait():
            # The other command, because the message names it.
            message = life.stderr.read()
            assert not arguments, message
            assert RESUME in message, message
            assert message.count("\n") == 1, message
            arguments = RESUME.split()
            continue
        else:
            return
        last = max(complete(), default=0)
        assert last >= newest, f"kill {kills}: step {newest} is gone"
        newest, arguments = last, []
        print(f"kill {kills}: newest checkpoint {newest}{note()}", flush=True)


def test_no_kill_at_any_moment_changes_a_run(tmp_path):
    workshop(tmp_path)
    alone = launch(tmp_path, "--train.output", tmp_path / "alone")
    assert alone.wait() == 0, alone.stderr.read()

    output = tmp_path / "out"

    def kill(life, kills):
        # Every third while it starts, the others once it has begun to train.
        starting = kills % 3 == 0
        moments = (0.5, 12.0) if starting else (0.0, 6.0)
        begun = None if starting else changed(output / "metrics.jsonl")
        return killed(life, *moments, begun=begun)

    live(lambda *arguments: launch(tmp_path, *arguments), kill, KILLS, lambda: saved(output))
    ours, theirs = losses(output), losses(tmp_path / "alone")
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    np.testing.assert_array_equal(list(ours.values()), list(theirs.values()))
    for name in ("adapter", "adapter-best"):
        assert files(output / name) == files(tmp_path / "alone" / name)
    assert not [name for name in os.listdir(output) if name.startswith(".")]


def test_no_kill_before_the_first_checkpoint_stops_a_run_for_good(tmp_path):
    workshop(tmp_path)
    for kill in range(KILLS // 4):
        output = tmp_path / f"out-{kill}"
        where = ("--train.output", output, "--train.steps", "3")
        if not killed(launch(tmp_path, *where), 2.0, 6.0):
            continue
        again = launch(tmp_path, *where)
        if again.wait():
            message = again.stderr.read()
            assert RESUME in message, message
            again = launch(tmp_path, *where, *RESUME.split())
            assert again.wait() == 0, again.stderr.read()
        assert list(losses(output)) == [1, 2, 3]
        assert (output / "adapter").is_dir()
        print(f"kill {kill} before the first checkpoint", flush=True)


def test_no_kill_while_merging_or_exporting_loses_an_output(tmp_path):
    workshop(tmp_path)
    run = launch(tmp_path, "--train.steps", "10")
    assert run.wait() == 0, run.stderr.read()
    adapter = ["--adapter", tmp_path / "out"]
    commands = {
        "merged": ["merge", "--base", tmp_path / "base", *adapter],
        "peft": ["export-peft", *adapter],
    }

    def command(name, *arguments):
        settings = {"PYTHONPATH": str(REPOSITORY), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "c")}
        line = [sys.executable, "-m", "genlora_jax.cli", *commands[name], "--out", tmp_path / name]
        return subprocess.Popen(
            [*line, *arguments],
            env=os.environ | settings,
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    expected = {}
    for name in commands:
        began = time.monotonic()
        first = command(name)
        assert first.wait() == 0, first.stderr.read()
        expected[name] = files(tmp_path / name), time.monotonic() - began
    for kill in range(KILLS // 4):
        for name, (content, seconds) in expected.items():
            if kill % 2:
                shutil.rmtree(tmp_path / name)
            # Mostly while it writes, which is at its end.
            killed(command(name, "--overwrite"), 0.6 * seconds, 1.1 * seconds)
            if (tmp_path / name).exists():
                assert files(tmp_path / name) == content
            again = command(name, "--overwrite")
            assert again.wait() == 0, again.stderr.read()
            assert files(tmp_path / name) == content
            assert not [entry for entry in os.listdir(tmp_path) if entry.startswith(".")]
        print(f"kill {kill} of a merge and of an export", flush=True)
