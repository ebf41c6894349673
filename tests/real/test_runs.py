"""Runs, their files and their resume, as people interrupt, move, damage and repeat them."""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_base import write_base
from tiny_models import Numbers, random_llama

import genlora_jax as gl
from genlora_jax import atomic_files
from genlora_jax.adapter_files import spec_to_json, write_adapter
from genlora_jax.atomic_files import locked, new_directory, recover, refuse_existing, write_whole
from genlora_jax.data.examples import examples_fingerprint
from genlora_jax.generation.decoding import decode
from genlora_jax.hf.checkpoint import locate
from genlora_jax.mesh import make_mesh
from genlora_jax.settings import parse
from genlora_jax.training import finetune as script
from genlora_jax.training import processes, setup
from genlora_jax.training.checkpoint import Checkpoints
from genlora_jax.training.checksums import checksums
from genlora_jax.training.divergence import check_finite
from genlora_jax.training.find_adapter import find_adapter, remark_on_base
from genlora_jax.training.metrics import MetricsLog, read_records
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.output import claimed
from genlora_jax.training.provenance import checkpoint_digest
from genlora_jax.training.recipe import Recipe
from genlora_jax.training.step import init_state

CFG = gl.GenLoRAConfig(rank=4, group_size=4, kernels=2)


class Killed(BaseException):
    """What a test raises for kill -9; nothing catches it, and no clean-up may run."""


@contextlib.contextmanager
def killed_at(owner, name, nth=1, after=False):
    """Has the nth call of `owner.name` kill the block, before or after its work."""
    original, calls = getattr(owner, name), []

    def deadly(*args, **options):
        calls.append(name)
        dead = len(calls) >= nth
        if dead:
            patch.setattr(shutil, "rmtree", lambda *args, **options: None)
        result = None if dead and not after else original(*args, **options)
        if dead:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, deadly)
        with pytest.raises(Killed):
            yield


def listing(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != atomic_files.WRITTEN
    }


def write(path, text, **options):
    with new_directory(path, **options) as directory:
        (directory / "result.txt").write_text(text)


# Outputs that are overwritten.


def a_run(path):
    (path / "checkpoints" / "3").mkdir(parents=True)
    (path / "recipe.yaml").write_text("a recipe")


def an_added_file(path):
    write(path, "ours")
    (path / "notes.txt").write_text("mine")


def an_added_directory(path):
    write(path, "ours")
    (path / "more").mkdir()


@pytest.mark.parametrize(
    "make",
    [
        a_run,
        an_added_file,
        an_added_directory,
        lambda path: write_base(path),
        lambda path: path.write_text("a file"),
        lambda path: (path.mkdir(), (path / "thesis.tex").write_text("years")),
    ],
    ids=["run", "file added", "directory added", "model", "file", "documents"],
)
def test_overwriting_spares_what_was_not_written_here(make, tmp_path):
    path = tmp_path / "out"
    make(path)
    before = sorted(tmp_path.rglob("*")), listing(tmp_path)
    for act in (
        lambda: write(path, "new", overwrite=True),
        lambda: refuse_existing(path, overwrite=True),
    ):
        with pytest.raises(FileExistsError, match="out is not overwritten, as nothing says"):
            act()
    assert (sorted(tmp_path.rglob("*")), listing(tmp_path)) == before


def test_overwriting_replaces_what_was_written_here(tmp_path):
    path, link = tmp_path / "out", tmp_path / "link"
    write(path, "one")
    link.symlink_to(path)
    write(link, "two", overwrite=True)
    assert link.is_symlink()
    assert listing(path) == {"result.txt": b"two"}
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


@pytest.mark.parametrize("out", ["base", "base/merged", "base/../base/x", "link/merged"])
def test_an_output_in_what_is_read_is_refused(out, tmp_path):
    write(tmp_path / "base", "weights")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(FileExistsError, match=r"is, or lies in, .*, which is read"):
        refuse_existing(tmp_path / out, overwrite=True, inputs=(str(tmp_path / "base"), None))
    refuse_existing(tmp_path / "base2", overwrite=True, inputs=(str(tmp_path / "base"), "org/name"))


@pytest.mark.parametrize(
    ("name", "nth", "after", "left"),
    [
        ("write_text", 1, False, "old"),
        ("rename", 1, False, "old"),
        ("rename", 1, True, "new"),
        ("rename", 2, False, "new"),
        ("rename", 2, True, "new"),
    ],
)
def test_a_kill_while_replacing_leaves_one_or_the_other_whole(name, nth, after, left, tmp_path):
    path = tmp_path / "out[1]"  # a name that is a pattern
    write(path, "old")
    with killed_at(Path, name, nth, after):
        write(path, "new", overwrite=True)
    assert os.listdir(tmp_path) != [path.name]  # something is left to tidy
    assert locate(path) == path  # as any command does with a model
    assert listing(path) == {"result.txt": left.encode()}
    assert os.listdir(tmp_path) == [path.name]


def test_recovery_leaves_alone_what_another_process_is_writing(tmp_path):
    with new_directory(tmp_path / "out") as directory:
        recover(tmp_path / "out")
        (directory / "result.txt").write_text("whole")
    assert listing(tmp_path / "out") == {"result.txt": b"whole"}


def test_two_commands_do_not_write_one_output(tmp_path):
    with new_directory(tmp_path / "out") as first:
        (first / "result.txt").write_text("first")
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="being written by another command"):
                refuse_existing(tmp_path / "out", overwrite=overwrite)
    assert listing(tmp_path) == {"out/result.txt": b"first"}
    with pytest.raises(FileExistsError, match=r"out exists: .*--overwrite in a command"):
        refuse_existing(tmp_path / "out", overwrite=False)
    with (
        pytest.raises(FileExistsError, match="made by something else meanwhile"),
        new_directory(tmp_path / "other"),
    ):
        (tmp_path / "other").mkdir()
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(OSError, match=r"No space left on device: .*out was not written; make room"),
        new_directory(tmp_path / "out", overwrite=True),
    ):
        raise full
    assert listing(tmp_path) == {"out/result.txt": b"old"}

    def fail(*args, **options):
        raise full

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*recipe\.yaml was not written"):
        write_whole(tmp_path / "recipe.yaml", "text")


# Checkpoints.


@pytest.fixture(scope="module")
def state():
    _, params = random_llama()
    adapter = gl.init_adapter(CFG, jax.random.key(0), params)
    return init_state(adapter, make_optimizer(OptimConfig(), 10))


def at(state, step):
    """The state of some step, each with numbers of its own."""
    trainable = jax.tree.map(lambda x: x + step, state.adapter.trainable)
    return dataclasses.replace(
        state, adapter=state.adapter.replace(trainable=trainable), step=jnp.int32(step)
    )


def save(directory, state, *steps, **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(at(state, step), Numbers(step))


def assert_is(restored, expected):
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's tasks
def test_a_flipped_bit_is_never_taken_for_data(state, tmp_path):
    """At random places of every file of the newest checkpoint."""
    save(tmp_path / "run", state, 3, 6)
    files = [f for f in sorted((tmp_path / "run" / "6").rglob("*")) if f.stat().st_size]
    files = [f for f in files if f.is_file()]
    rng, outcomes = random.Random(0), []
    largest = max(files, key=lambda f: f.stat().st_size)
    for file in [*files, largest, largest, largest]:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        data = Numbers()
        with Checkpoints(tmp_path / "run") as checkpoints:
            restored = checkpoints.restore(state, data)
        step = int(restored.step)
        outcomes.append(step)
        assert_is(restored, at(state, step))
        assert next(data) == step
        file.write_bytes(whole)
    assert set(outcomes) <= {3, 6}
    assert 3 in outcomes  # 6 where the bit is of no array, and nothing is lost


def test_a_damaged_array_is_named(state, tmp_path, monkeypatch, capsys):
    from genlora_jax.training import checkpoint_reading

    save(tmp_path / "run", state, 3, 6)
    found = checkpoint_reading.checksums
    calls = []

    def once(leaves):
        sums = found(leaves)
        calls.append(leaves)
        return [sums[0] + 1, *sums[1:]] if len(calls) == 1 else sums

    monkeypatch.setattr(checkpoint_reading, "checksums", once)
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert int(checkpoints.restore(state, Numbers()).step) == 3
    err = capsys.readouterr().err
    assert f"array {next(iter(calls[0]))} of {tmp_path / 'run' / '6'} is damaged" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_checksum_sees_any_change_of_one_element_or_of_two(dtype):
    values = (np.arange(24).reshape(2, 3, 4) % 5).astype(jnp.dtype(dtype))
    changed = values.copy()
    changed[1, 2, 3] = 0
    swapped = values.copy()
    swapped[0, 0, 1], swapped[1, 0, 0] = values[1, 0, 0], values[0, 0, 1]
    negative = values.copy()
    negative[0, 1, 2:] = -values[0, 1, 2:] if dtype != "bool" else True
    variants = [values, changed] if dtype == "bool" else [values, changed, swapped]
    variants += [negative] if dtype in ("float32", "bfloat16", "int32") else []
    assert len({checksums({"x": v})[0] for v in map(jnp.asarray, variants)}) == len(variants)


def test_a_checksum_does_not_depend_on_the_sharding():
    values = jnp.arange(64.0).reshape(8, 8)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    for spec in (jax.P("x", "y"), jax.P("y"), jax.P(None, "x")):
        sharded = jax.device_put(values, jax.NamedSharding(mesh, spec))
        assert checksums({"x": sharded}) == checksums({"x": values})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(state, tmp_path, bad):
    opt_state = jax.tree.map(lambda x: x.at[...].set(bad) if x.ndim else x, state.opt_state)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(at(state, 3), Numbers())
        with pytest.raises(FloatingPointError, match=r"opt_state\.\S+ is not finite after step 6"):
            checkpoints.save(dataclasses.replace(at(state, 6), opt_state=opt_state), Numbers())
        checkpoints.wait()
        assert checkpoints.latest() == 3


def test_a_save_that_failed_leaves_nothing_open(state, tmp_path, monkeypatch):
    level = logging.getLogger("absl").level
    checkpoints, closed = Checkpoints(tmp_path / "run"), []
    inner = checkpoints._checkpointer
    close = inner.close
    monkeypatch.setattr(inner, "wait", lambda: (_ for _ in ()).throw(OSError("a broken disk")))
    monkeypatch.setattr(inner, "close", lambda: closed.append(close()))
    with pytest.raises(OSError, match="a broken disk"), checkpoints:
        pass
    assert closed == [None]
    assert logging.getLogger("absl").level == level


def test_a_full_disk_stops_a_checkpoint_before_it_begins(state, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with (
        Checkpoints(tmp_path / "run") as checkpoints,
        pytest.raises(OSError, match=r"No space left .*run.*go on with --train\.resume true"),
    ):
        checkpoints.save(at(state, 3), Numbers())
    assert not [name for name in os.listdir(tmp_path / "run") if "3" in name]


ORIGIN = {"model.path": "a", "data.train": "b", "data.eval": "c"}


@pytest.mark.parametrize("field", ORIGIN)
def test_a_resume_with_other_content_is_refused(state, tmp_path, field):
    save(tmp_path / "run", state, 3, origin=ORIGIN)
    with (
        Checkpoints(tmp_path / "run", origin=ORIGIN | {field: "other"}) as checkpoints,
        pytest.raises(ValueError, match=f"checkpoint 3 was trained with another .*{field}"),
    ):
        checkpoints.restore(state, Numbers())
    fewer = {name: value for name, value in ORIGIN.items() if name != "data.eval"}
    for origin in (ORIGIN, fewer, None):
        with Checkpoints(tmp_path / "run", origin=origin) as checkpoints:
            assert int(checkpoints.restore(state, Numbers()).step) == 3


def test_the_fingerprint_of_a_base_is_that_of_its_tensors(tmp_path):
    base = write_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    expected = checkpoint_digest(base)
    names = sorted(tensors)
    parts = tmp_path / "parts"
    parts.mkdir()
    for i in range(2):  # other files, the same tensors
        chosen = {name: tensors[name] for name in names[i::2]}
        save_file(chosen, parts / f"model-{i}.safetensors")
    assert checkpoint_digest(parts) == expected
    assert checkpoint_digest(write_base(tmp_path / "other", seed=1)) != expected
    name = next(name for name in names if "q_proj" in name)  # one module trained on
    save_file(tensors | {name: tensors[name] + 1}, base / "model.safetensors")
    assert checkpoint_digest(base) != expected


def test_the_fingerprint_of_examples_sees_tokens_masks_order_and_borders():
    def example(ids, mask):
        return {"input_ids": np.array(ids, np.int32), "loss_mask": np.array(mask, bool)}

    one, two = example([1, 2], [0, 1]), example([3], [1])
    variants = [
        [one, two],
        [two, one],
        [one],
        [example([1, 2], [1, 1]), two],
        [example([1], [0]), example([2, 3], [1, 1])],
        [example([1, 4], [0, 1]), two],
    ]
    assert len({examples_fingerprint(v) for v in variants}) == len(variants)
    assert examples_fingerprint([one, two]) == examples_fingerprint(iter([dict(one), two]))


# The adapter of a run.


def test_the_best_adapter_that_a_run_has_is_found(state, tmp_path, capsys):
    run = tmp_path / "run"
    save(run / "checkpoints", state, 3, 6)
    found = find_adapter(str(run))
    _, adapter = gl.load_adapter(found)
    assert_is(adapter, at(state, 6).adapter)
    assert adapter.spec == state.adapter.spec
    assert "adapter-step-6, that of the newest checkpoint" in capsys.readouterr().out
    assert find_adapter(str(run)) == found  # made once
    for name in ("adapter-best", "adapter"):
        gl.save_adapter(run / name, CFG, state.adapter)
        assert find_adapter(str(run)) == str(run / name)
        assert f"adapter: {run / name}, " in capsys.readouterr().out
    for path in (run / "adapter", tmp_path / "missing"):
        assert find_adapter(str(path)) == str(path)

    # The run went on after its end, and was stopped: what it ended with then is not the newest.
    settings = spec_to_json(state.adapter.spec, None)
    for step, taken, said in (
        (6, "adapter", "run's end"),
        (5, "adapter-best", "of step 5, and"),
    ):
        write_adapter(run / "adapter", settings | {"step": step}, state.adapter, overwrite=True)
        assert find_adapter(str(run)) == str(run / taken)
        assert said in capsys.readouterr().out
    assert find_adapter(str(run / "adapter")) == str(run / "adapter")
    assert f"to take the newest, give {run}" in capsys.readouterr().out
    shutil.rmtree(run / "adapter-best")
    assert find_adapter(str(run)) == found
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*--train\.resume true"):
        find_adapter(str(tmp_path / "empty"))


# What is not finite.

GOOD = {"loss": 2.0, "grad_norm": 1.0, "adapter_finite": 1.0}


@pytest.mark.parametrize(
    ("step", "changes", "cause", "advice"),
    [
        (9, {"loss": math.nan, "grad_norm": math.nan}, "the loss is nan at step 9", "Lower optim"),
        (9, {"grad_norm": math.inf}, "norm, unlike the loss, is inf at step 9", "Lower optim"),
        (9, {"adapter_finite": 0.0}, "update of step 9 is not finite; its loss", "Lower optim"),
        (1, {"adapter_finite": 0.0}, "update of step 1 is not finite; its loss", "Lower optim"),
        (1, {"loss": math.nan}, "the loss is nan at step 1", "rate is not at fault"),
        (1, {"grad_norm": math.nan}, "norm, unlike the loss, is nan", "rate is not at fault"),
    ],
)
def test_what_was_not_finite_first_is_said_and_the_advice_fits(step, changes, cause, advice):
    fine, broken = {"a": jnp.ones(2)}, {"a": {"kernel": jnp.array([1.0, jnp.nan])}}
    check_finite(step, GOOD, broken, None)
    check_finite(step, {"eval_loss": 2.0}, broken, None)
    with pytest.raises(FloatingPointError) as caught:
        check_finite(step, GOOD | changes, fine, 5)
    assert cause in str(caught.value)
    assert advice in str(caught.value)
    assert "of step 5, is kept" in str(caught.value)
    with pytest.raises(FloatingPointError, match=r"a\.kernel of the base is not finite") as caught:
        check_finite(step, GOOD | changes, broken, None)
    assert "Lower" not in str(caught.value)


def test_decoding_refuses_logits_that_are_not_finite():
    model, params = random_llama()
    assert decode(model, params, [[1, 2, 3]], max_new_tokens=2)
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[3, 5].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        decode(model, params, [[1, 2, 3]], max_new_tokens=2)


# Metrics.


@pytest.mark.parametrize(
    "line",
    [b'{"step": 2, "lo', b"\xff\xfe\x00", b"[" * 100_000, b"5", b'{"step": "2"}', b"null",
     b'{"step": 2, "loss": "low"}', b'{"loss": 1.0}', b'{"step": 2, "loss": ' + b"9" * 5000 + b"}"],
    ids=lambda line: line[:12],
)  # fmt: skip
def test_a_damaged_line_of_the_metrics_is_named_and_left_out(line, tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": i, "loss": 1.0 / i}).encode() for i in (1, 2, 3)]
    file.write_bytes(b"\n".join([good[0], line, good[1], good[2], b""]))
    assert [record["step"] for record in read_records(tmp_path, 2)] == [1, 2]
    options = {"steps": 5, "wandb": None, "settings": {}, "progress": False, "primary": True}
    with MetricsLog(tmp_path, start=2, **options) as log:
        log.write(3, {"loss": 0.5})
    assert "metrics.jsonl: left out what is no record, in line 2\n" in capsys.readouterr().out
    steps = [json.loads(text)["step"] for text in file.read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_tensorboard_reads_what_is_written(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator as loader

    options = {"steps": 5, "wandb": None, "settings": {}, "progress": False, "primary": True}
    with MetricsLog(tmp_path, start=0, **options) as log:
        log.write(1, {"loss": 0.5})
    found = loader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 0.5)]


# Recipes.

REQUIRED = ["--data.train", "x", "--train.output", "out", "--model.path", "base"]
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "data: {train: " + "[" * 500 + "]" * 500 + "}", "data: {train: &a [*a]}",
     "data: {train: " + "[" * 50_000 + "]" * 50_000 + "}"],
    ids=["bomb", "deep", "itself", "very deep"],
)  # fmt: skip
@pytest.mark.parametrize("flag", [False, True])
def test_a_recipe_that_would_not_end_is_refused_at_once(text, flag, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    arguments = ["--train.steps", text] if flag else ["--config", str(tmp_path / "recipe.yaml")]
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"nest|aliases|Expected a") as caught:
        parse(Recipe, [*arguments, *REQUIRED])
    assert time.monotonic() - began < 5
    assert len(str(caught.value)) < 1000


def test_aliases_that_stand_for_little_are_read(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "model: {path: &base one}\ndata: {train: *base}\ntrain: {output: *base}"
    )
    recipe = parse(Recipe, ["--config", str(tmp_path / "recipe.yaml")])
    assert (recipe.model.path, recipe.data.train, recipe.train.output) == ("one",) * 3


@pytest.mark.parametrize(
    "field",
    [
        *("train.steps", "train.seed", "train.chunk", "adapter.rank", "adapter.seed"),
        *("optim.learning_rate", "optim.weight_decay", "optim.clip", "adapter.alpha"),
    ],
)
@pytest.mark.parametrize("value", ["9" * 50, "9" * 400, "9" * 5000, "1e39", "-1e400", ".nan"])
def test_a_number_that_is_too_large_is_refused_by_field(field, value):
    # jsonargparse itself stops at numbers of hundreds of digits, some of whose fields it names.
    named = field if len(value) < 400 else r"adapter|rank|seed|optim|train|too large"
    with pytest.raises(ValueError, match=named.removeprefix("adapter.")):
        parse(Recipe, [*REQUIRED, f"--{field}={value}"])


# Signals.


def test_a_second_signal_ends_at_once_with_one_line(monkeypatch, capfd):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with processes.Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.split("\n")[-2] == "ended at once; nothing more was saved"


def test_ctrl_c_before_the_first_step_is_one_line(run_main, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "finetune", interrupted)
    arguments = ("--data.train", "x", "--train.output", "out", "--model.path", "base")
    status, _, err = run_main(script.main, *arguments)
    assert (status, err) == (130, "interrupted\n")


# Whole runs that are killed.

RECIPE = """
model: {{path: {here}/base, dtype: float32, param_dtype: float32}}
adapter: {{rank: 4, alpha: 8.0, group_size: 4, kernels: 2, targets: [q_proj]}}
data: {{train: {here}/rows.jsonl, eval: {here}/rows.jsonl, length: 8, batch_size: 4, pack: false}}
train: {{output: {here}/alone, steps: 4, progress: false, save_every: 2, eval_every: 2}}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    here = tmp_path_factory.mktemp("workshop")
    write_base(here / "base")
    rows = [{"prompt": f"{i % 7} and", "completion": f" {i % 5}"} for i in range(11)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "recipe.yaml").write_text(RECIPE.format(here=here))
    return here


@pytest.fixture
def run(workshop, run_main, monkeypatch):
    """A function that runs the script's main: returns exit status, stdout and stderr."""
    monkeypatch.setattr(setup, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))

    def call(output, *arguments, recipe=workshop / "recipe.yaml"):
        settings = ["--config", recipe, "--train.output", output]
        return run_main(script.main, *settings, *arguments)

    return call


@pytest.fixture
def alone(workshop, run):
    if not (workshop / "alone" / "adapter").exists():
        status, out, err = run(workshop / "alone")
        assert status == 0, err
        assert "compiling the training step ...\ncompiled, and made the first step, in " in out
    return workshop / "alone"


POINTS = {
    "directory made": (script, "run_in_output", 1, False),
    "checkpoints opened": (script, "keep_recipe", 1, False),
    "recipe kept": (script, "keep_recipe", 1, True),
    "first step": (script.Recorder, "record", 1, False),
    "first save": (Checkpoints, "save", 1, False),
    "first save under way": (Checkpoints, "save", 1, True),
    "best adapter, first": (script, "write_adapter", 1, False),
    "best adapter, replaced": (Path, "rename", 3, True),
    "last save": (Checkpoints, "save", 2, True),
    "last adapter": (script, "write_adapter", 3, False),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_is_killed_goes_on_by_the_command_that_is_named(point, alone, run, tmp_path):
    output = tmp_path / "out"
    with killed_at(*POINTS[point]):
        run(output)
    status, _, err = run(output)
    if status:
        assert "go on there with --train.resume true" in err
        assert err.count("\n") == 1
        status, _, err = run(output, "--train.resume", "true")
    assert status == 0, err
    assert listing(output / "adapter") == listing(alone / "adapter")
    assert listing(output / "adapter-best") == listing(alone / "adapter-best")
    losses = [[record.get("loss") for record in read_records(o, 9)] for o in (output, alone)]
    assert losses[0] == losses[1]
    assert not [name for name in os.listdir(output) if name.startswith(".")]


def test_two_runs_in_one_directory_are_refused(alone, run, tmp_path):
    with locked(alone):  # as another process that trains there
        for arguments in ((), ("--train.resume", "true")):
            status, _, err = run(alone, *arguments)
            assert status == 1
            assert "another run is under way in it" in err
            assert err.count("\n") == 1
    given = ["--config", str(alone / "recipe.yaml"), "--train.resume", "true"]
    recipe = parse(Recipe, given)
    with claimed(recipe), pytest.raises(FileExistsError, match="under way"), claimed(recipe):
        pass


def test_a_run_with_other_data_or_another_base_does_not_go_on(workshop, alone, run, tmp_path):
    here = tmp_path / "here"
    shutil.copytree(workshop, here)
    text = (workshop / "recipe.yaml").read_text().replace(str(workshop), str(here))
    (here / "recipe.yaml").write_text(text)
    more = ("--train.resume", "true", "--train.steps", 5)
    before = listing(here / "alone")
    for change, field in (
        (lambda: write_base_again(here / "base"), "model.path"),
        (lambda: (here / "rows.jsonl").write_text(other_rows()), "data.train"),
    ):
        shutil.copytree(workshop, here, dirs_exist_ok=True)
        (here / "recipe.yaml").write_text(text)
        change()
        status, _, err = run(here / "alone", *more, recipe=here / "recipe.yaml")
        assert status == 1
        assert f"another content of {field}" in err
        assert err.count("\n") == 1
        assert listing(here / "alone") == before


def test_an_adapter_on_other_weights_of_the_same_shapes_is_remarked_on(workshop, alone, tmp_path):
    base, adapter = workshop / "base", alone / "adapter"
    assert json.loads((adapter / "adapter.json").read_text())["step"] == 4
    taken = tmp_path / "stopped"
    shutil.copytree(alone / "checkpoints", taken / "checkpoints")
    for found in (adapter, alone / "adapter-best", Path(find_adapter(str(taken)))):
        remark_on_base(str(found), base)  # a warning would be an error
        with pytest.warns(UserWarning, match="was trained on other weights than those of"):
            remark_on_base(str(found), write_base(tmp_path / f"other-{found.name}", seed=1))


def test_examples_longer_than_the_models_positions_are_remarked_on(workshop, tmp_path):
    rows, said = tmp_path / "rows.jsonl", []
    rows.write_text(json.dumps({"text": "plums and " * 40}))  # tiny_base: 64 positions
    given = ["--config", workshop / "recipe.yaml", "--data.train", rows, "--data.length", 256]
    recipe = parse(Recipe, [str(argument) for argument in given])
    run = setup.prepare(recipe, make_mesh(recipe.mesh), said.append)
    longest = int(run.source.lengths[0])
    assert longest > 64
    (note,) = (line for line in said if str(line).startswith("note: "))
    assert f"the longest example has {longest} tokens" in note
    assert "64 positions" in note


def write_base_again(base):
    shutil.rmtree(base)
    write_base(base, seed=1)


def other_rows():
    return "".join(
        json.dumps({"prompt": f"{i % 7} and", "completion": f" {i % 3}"}) + "\n" for i in range(11)
    )


def test_an_output_in_the_base_is_refused(workshop, run):
    before = listing(workshop / "base")
    status, _, err = run(workshop / "base" / "run")
    assert status == 1
    assert "which is read" in err
    assert err.count("\n") == 1
    assert listing(workshop / "base") == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model:\n  path: \xfe\n", "not UTF-8"),
        (b"", "must hold the fields of a recipe"),
        (b"- a\n", "must hold the fields of a recipe"),
        (b"mesh: null\n", "mesh"),
        (b"optim: 2\n", "optim"),
        (b"train: {b1: {}}\n", "train.b1 is empty"),
        (b"train: [\n", "no YAML"),
        (b"eval: rows.jsonl\n", r"recipe\.yaml: no field is 'eval'; there are adapter, data"),
        (b"optim: {b1: 0.5}\ndata: {}\noptim: {b1: 0.9}\n", "line 3: optim is there twice"),
        (b"optim:\n  b1: 0.5\n  b1: 0.9\n", "line 3: b1 is there twice"),
        (b"data: {train: [null]}", r"must be one of str, list\[str \| MixedSource\], got \[None\]"),
        (b"data: {train: [{path: a, weight: b}]}", r"data\.train.*weight"),
        (b"data: {train: [{path: a, weight: .inf}]}", "^data.train: weight must be a finite numb"),
        (b"mesh: {data: null}", "mesh.data must be at least 1, or -1, got None"),
    ],
)
def test_a_recipe_that_is_none_is_named(content, message, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    required = ["--model.path", "m", "--train.output", "o"]
    required += [] if b"data: {train" in content else ["--data.train", "d.jsonl"]
    with pytest.raises(ValueError, match=message) as raised:
        parse(Recipe, ["--config", str(file), *required])
    assert len(str(raised.value)) < 480
