"""Runs of several processes on one machine: the losses are those of one, whatever befalls them."""

import itertools
import json
import re
import shutil
import signal
import socket
import time
from collections import Counter

import numpy as np
import pytest
from finetune_process import start_finetune
from safetensors.numpy import load_file
from tiny_base import write_base

from genlora_jax.training.metrics import read_records

GLOO = re.compile(r"\[Gloo\]|connected peer ranks")  # its lines may be cut in two
STEPS = 40
RECIPE = """
model: {{path: {here}/base, dtype: float32, param_dtype: float32}}
adapter: {{rank: 4, alpha: 8.0, group_size: 4, kernels: 2, targets: [q_proj, up_proj]}}
data: {{train: {here}/rows.jsonl, eval: {here}/eval.jsonl, length: 8, batch_size: 8, pack: false}}
optim: {{learning_rate: 0.003}}
train: {{output: out, steps: {steps}, progress: false, save_every: 5, eval_every: 20}}
"""
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8}

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    here = tmp_path_factory.mktemp("workshop")
    write_base(here / "base", **SHAPE)
    for name, count in (("rows", 52), ("eval", 11)):  # no multiples of a batch
        rows = [{"prompt": f"{i % 7} and", "completion": f" {i % 5}"} for i in range(count)]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = RECIPE.format(here=here, steps=STEPS)
    (here / "recipe.yaml").write_text(recipe)
    full = re.sub("adapter:.*", "adapter: {class_path: genlora_jax.FullConfig}", recipe)
    (here / "full.yaml").write_text(full)
    return here


@pytest.fixture(scope="module")
def launch(workshop, tmp_path_factory):
    """A function that starts a run in so many processes with so many devices each."""
    cache = tmp_path_factory.mktemp("compiled")

    def start(output, processes, devices, *arguments, recipe="recipe.yaml", **settings):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        given = ["--train.output", output, *arguments]
        given += ["--train.distributed", "true"] if processes > 1 else []
        started = []
        for index in range(processes):
            environment = {"JAX_NUM_CPU_DEVICES": str(devices)}
            if processes > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(index),
                }
            settings |= environment
            process = start_finetune(workshop / recipe, *given, cache=cache, **settings)
            started.append(process)
        return started

    return start


def finish(started):
    outputs = [process.communicate(timeout=240) for process in started]
    codes = [process.returncode for process in started]
    assert codes == [0] * len(started), [err[-2000:] for _, err in outputs]
    return outputs


def losses(output):
    """The losses of a run by step, and those of its evaluations."""
    records = read_records(output, STEPS)
    training = {record["step"]: record["loss"] for record in records if "loss" in record}
    return training, {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert list(mine) == list(other)
        np.testing.assert_allclose(list(mine.values()), list(other.values()), rtol=2e-5)


@pytest.fixture(scope="module")
def alone(launch, tmp_path_factory):
    """The losses of one process with one device."""
    output = tmp_path_factory.mktemp("alone") / "out"
    finish(launch(output, 1, 1))
    return losses(output)


def wait_for_step(output, step, started):
    """Until a run has got so far."""
    until = time.monotonic() + 200
    while time.monotonic() < until:
        if (output / "metrics.jsonl").exists() and max(losses(output)[0], default=0) >= step:
            return
        assert all(process.poll() is None for process in started), started[0].communicate()
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(2, 2, {"fsdp": 4}), (4, 1, {"fsdp": 2, "tensor": 2}), (1, 4, {"data": 2, "fsdp": 2})],
)
def test_losses_are_those_of_one_process(launch, alone, tmp_path, processes, devices, mesh):
    sizes = itertools.chain(*((f"--mesh.{axis}", str(size)) for axis, size in mesh.items()))
    outputs = finish(launch(tmp_path / "out", processes, devices, *sizes))
    assert_same(losses(tmp_path / "out"), alone)
    assert (tmp_path / "out" / "adapter" / "adapter.safetensors").is_file()
    assert "parameters to train" in outputs[0][0]
    for out, _ in outputs[1:]:  # one of them speaks, and Gloo
        assert [line for line in out.splitlines() if not GLOO.search(line)] == []
    logs = tmp_path / "out" / "logs"
    if processes == 1:
        assert not logs.exists()
        return
    for index, (out, err) in enumerate(outputs):  # what each said is kept, and still shown
        log = (logs / f"process-{index}.log").read_text()
        assert f" process {index} of {processes}, " in log.splitlines()[0]
        kept = Counter(line[len("2026-01-01 00:00:00 ") :] for line in log.splitlines()[1:])
        said = Counter((out + err).splitlines())
        assert kept - said == Counter()
        assert not any("adapter:" in line for line in (said - kept))


def test_whole_deltas_in_parts_are_saved_whole_and_restored_elsewhere(launch, tmp_path):
    output, steps = tmp_path / "out", ("--train.steps", "6")
    finish(launch(output, 2, 2, *steps, "--mesh.tensor", "2", recipe="full.yaml"))
    saved = load_file(output / "adapter" / "adapter.safetensors")
    shapes = {name.split(".")[-1]: value.shape for name, value in saved.items()}
    assert shapes["up_proj"] == (2, 32, 64)
    assert all((value != 0).mean() > 0.9 for value in saved.values())
    # No step is left: what is saved now is what the checkpoint held.
    shutil.rmtree(output / "adapter")
    finish(launch(output, 1, 1, *steps, "--train.resume", "true", recipe="full.yaml"))
    again = load_file(output / "adapter" / "adapter.safetensors")
    assert saved.keys() == again.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(value, again[name])


def test_a_killed_process_and_a_restart_elsewhere_change_nothing(launch, alone, tmp_path):
    output = tmp_path / "out"
    again = ("--train.resume", "auto")  # the same command for each start
    started = launch(output, 2, 1, "--train.heartbeat", "10", *again)
    wait_for_step(output, 12, started)
    started[1].kill()
    _, err = started[0].communicate(timeout=120)  # ends on its own, and says why
    assert started[0].returncode not in (0, None)
    assert "heartbeat" in err or "Connection closed by peer" in err, err[-2000:]
    started[1].communicate()
    # The same processes again, ended by SIGTERM to the one that does not write.
    started = launch(output, 2, 1, *again)
    wait_for_step(output, 20, started)
    started[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [128 + signal.SIGTERM] * 2, outputs
    assert "stopped at step" in outputs[0][0] + outputs[0][1]
    # Another number of devices, and another mesh.
    finish(launch(output, 1, 4, *again, "--mesh.tensor", "2"))
    assert_same(losses(output), alone)
    # What the first said is still there, with its own words for the end of the other.
    log = (output / "logs" / "process-0.log").read_text()
    assert log.count("process 0 of 2, ") == 2
    assert "heartbeat" in log or "by peer" in log


HINDERED = """
import os, time
from genlora_jax.training import finetune, pace

pace.EVERY, pace.SHORTEST = 20, 1.0
record = finetune.Recorder.record

def hang(seconds):
    time.sleep(seconds)

def hindered(self, step, metrics):
    if os.environ["JAX_PROCESS_ID"] == "1":
        hang(6.0 if step == 27 else 0.1)  # after which none is saved
    record(self, step, metrics)

finetune.Recorder.record = hindered
if __name__ == "__main__":
    finetune.main()
"""


def test_the_slowest_process_is_named_and_a_hung_step_shows_all_stacks(launch, tmp_path):
    (tmp_path / "hindered.py").write_text(HINDERED)
    run = {"script": str(tmp_path / "hindered.py")}
    outputs = finish(launch(tmp_path / "out", 2, 1, "--train.steps", "34", **run))
    (found,) = [r for r in read_records(tmp_path / "out", STEPS) if "slowest_host" in r]
    assert found["slowest_host"] == 1
    assert found["slowest_host_seconds"] > 0.03
    assert 0 < found["slowest_device_seconds"] < 1
    said = f"step 20: process 1 ({socket.gethostname()}) is the slowest"
    assert said in outputs[0][0] + outputs[0][1]
    # Both print their stacks: the one that hangs, and the one that waits for it.
    for index, (_, err) in enumerate(outputs):
        log = (tmp_path / "out" / "logs" / f"process-{index}.log").read_text()
        for text in (err, log):
            assert re.search(rf"has not ended after \d s, process {index} of 2 on", text)
        assert ("in hang" in err.partition("has not ended")[2]) == (index == 1)
        assert err.count("has not ended") == 1


def test_a_process_without_its_fellows_is_told_what_is_missing(workshop, tmp_path):
    arguments = ("--train.output", tmp_path / "out", "--train.distributed", "true")
    recipe = workshop / "recipe.yaml"
    done = start_finetune(recipe, *arguments, cache=tmp_path, JAX_NUM_PROCESSES="2")
    _, err = done.communicate(timeout=240)
    assert done.returncode == 1
    assert "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID must be set as well" in err
    assert not (tmp_path / "out").exists()
