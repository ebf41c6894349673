"""`train/finetune.py`: a run, its errors, and what a killed run leaves."""

import dataclasses
import itertools
import json
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
from finetune_process import start_finetune
from safetensors.numpy import load_file
from tiny_base import SHAPE, write_base

import genlora_jax as gl
from genlora_jax.data.config import DataConfig
from genlora_jax.mesh import MeshConfig, make_mesh
from genlora_jax.models.config import LlamaConfig
from genlora_jax.settings import parse
from genlora_jax.training import finetune as script
from genlora_jax.training import processes, setup
from genlora_jax.training.optim import OptimConfig
from genlora_jax.training.output import keep_recipe
from genlora_jax.training.recipe import ModelConfig, Recipe, TrainConfig

STEPS = 300
RECIPE = """
model: {{path: {here}/base, dtype: float32, param_dtype: float32}}
adapter: {{rank: 4, alpha: 8.0, group_size: 4, kernels: 2, targets: [q_proj, up_proj]}}
data:
  train: {here}/train.jsonl
  eval: {here}/eval.jsonl
  length: 8
  batch_size: 4
  pack: false
optim: {{learning_rate: 0.02}}
train: {{output: {here}/out, steps: {steps}, progress: false, save_every: 75, eval_every: 100}}
"""


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """The runs are alike: what one has compiled, the others need not."""
    directory = tmp_path_factory.mktemp("compiled")
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Of the eight that other tests have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A directory with a base, data and a recipe; runs are made elsewhere."""
    here = tmp_path_factory.mktemp("workshop")
    write_base(here / "base")
    for name, count, shift in (("train", 20, 0), ("eval", 8, 3)):  # evaluation contradicts
        rows = [
            {"prompt": f"{i % 7} and", "completion": f" {(i + shift) % 7}"} for i in range(count)
        ]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "recipe.yaml").write_text(RECIPE.format(here=here, steps=STEPS))
    return here


@pytest.fixture(scope="module")
def launch(workshop, compilation_cache):
    """A function that starts the script in a process of its own."""

    def start(output, *arguments):
        recipe = workshop / "recipe.yaml"
        return start_finetune(recipe, "--train.output", output, *arguments, cache=compilation_cache)

    return start


@pytest.fixture
def run(workshop, run_main):
    """A function that runs the script's main: returns exit status, stdout and stderr."""

    def call(output, *arguments):
        settings = ["--config", workshop / "recipe.yaml", "--train.output", output]
        return run_main(script.main, *settings, *arguments)

    return call


@pytest.fixture(scope="module")
def finished(launch, tmp_path_factory):
    """A run that nothing disturbed, and its output."""
    output = tmp_path_factory.mktemp("finished") / "run"
    process = launch(output)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return output, out, err


def records(output, field="loss"):
    """(step, value) of a field, in the order of the file."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[field]) for line in lines if field in line]


def steps_saved(output):
    return {int(path.name) for path in (output / "checkpoints").iterdir() if path.name.isdecimal()}


def unfinished(output):
    """Directories of checkpoints that are still being written."""
    directory = output / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return [name for name in names if not name.isdecimal()]


def wait_for(condition, process, what):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.001)


def lines_in(output):
    file = output / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def listing(directory):
    """All that lies under a directory, files with their bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


# A run.


def test_a_run_learns_and_leaves_what_it_promises(finished):
    output, out, err = finished
    losses = records(output)
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    values = [value for _, value in losses]
    assert np.mean(values[-10:]) < 0.5 * np.mean(values[:5])
    assert [step for step, _ in records(output, "eval_loss")] == [100, 200, 300]
    assert {path.name for path in output.iterdir()} == {
        "adapter",
        "adapter-best",
        "checkpoints",
        "metrics.jsonl",
        "recipe.yaml",
        "tensorboard",
    }
    assert {"adapter.json", "adapter.safetensors"} == {
        p.name for p in (output / "adapter").iterdir()
    }
    assert "20 examples" in out
    assert "parameters to train" in out
    assert str(output / "adapter") in out
    assert "it/s" not in err
    assert "step/s" not in err


def test_the_best_and_the_last_checkpoints_are_kept(finished):
    output, *_ = finished
    losses = dict(records(output, "eval_loss"))
    best = min(losses, key=losses.get)
    assert best == 100  # the longer it trains, the surer it is of what evaluation contradicts
    assert steps_saved(output) == {225, 300, best}
    assert not unfinished(output)


@pytest.mark.parametrize(("name", "step"), [("adapter", 300), ("adapter-best", 100)])
def test_a_warm_start_goes_on_from_the_adapters_values(
    finished, workshop, run, tmp_path, name, step
):
    output, *_ = finished
    # All of the evaluation set in one batch, so that the first loss is its mean.
    arguments = ["--data.train", workshop / "eval.jsonl", "--data.batch_size", 8]
    status, _, err = run(
        tmp_path / "warm", "--train.init_from", output / name, "--train.steps", 1, *arguments
    )
    assert status == 0, err
    ((_, first),) = records(tmp_path / "warm")
    assert first == pytest.approx(dict(records(output, "eval_loss"))[step], rel=1e-5)


def test_the_config_is_printed_as_yaml(run, tmp_path):
    status, out, _ = run(tmp_path / "run", "--adapter.rank", 5, "--print_config")
    assert status == 0
    assert "rank: 5" in out
    printed = tmp_path / "printed.yaml"
    printed.write_text(out)
    status, again, _ = run(tmp_path / "run", "--config", printed, "--print_config")
    assert (status, again) == (0, out)
    assert not (tmp_path / "run").exists()


def test_the_recipe_is_kept_whole(finished, workshop):
    output, *_ = finished
    kept = output / "recipe.yaml"
    (start,) = (line for line in kept.read_text().splitlines() if line.startswith("#"))
    label, _, said = start.partition(": ")
    assert label == "# from step 0"
    assert json.loads(said).keys() == {"versions", "commit", "machine"}
    given = ["--config", str(workshop / "recipe.yaml"), "--train.output", str(output)]
    assert parse(Recipe, ["--config", str(kept)]) == parse(Recipe, given)
    assert "class_path: genlora_jax.GenLoRAConfig" in kept.read_text()


def test_a_run_that_goes_on_otherwise_says_so(workshop, tmp_path, capsys):
    given = ["--config", str(workshop / "recipe.yaml"), "--train.output", str(tmp_path)]
    keep_recipe(parse(Recipe, given))
    again = [*given, "--train.resume", "true"]
    keep_recipe(parse(Recipe, again), 3)
    assert not capsys.readouterr().out
    more = [*again, "--train.steps", str(STEPS + 1)]
    keep_recipe(parse(Recipe, [*more, "--adapter.dropout", "0.1"]), 5)
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()
    starts = [line.partition(": ")[0] for line in lines if line.startswith("#")]
    assert starts == [f"# from step {step}" for step in (0, 3, 5)]
    assert "  resume: false" in lines  # so that another run can be started from it
    assert capsys.readouterr().out.splitlines() == [
        "resumed with adapter.dropout 0.1, which was 0.0",
        f"resumed with train.steps {STEPS + 1}, which was {STEPS}",
    ]
    (tmp_path / "recipe.yaml").write_text("model: {path: x, bogus: 1}")
    keep_recipe(parse(Recipe, more))
    assert "recipe.yaml cannot be compared" in capsys.readouterr().out
    assert f"steps: {STEPS + 1}" in (tmp_path / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    "adapter",
    [
        gl.GenLoRAConfig(alpha=None, layers=[2, 0]),
        gl.GenLoRAConfig(kernels=3, bandwidth=0.5, exclude=["v_proj"]),
        gl.LoRAConfig(alpha=None, targets=["q_proj", r".*\.mlp\..*"], hadamard=True),
        gl.DoRAConfig(side_a="seeded"),
        gl.PiSSAConfig(rank=3),
        gl.VeRAConfig(d_initial=1e-3),
        gl.FullConfig(dropout=0.1),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_a_recipe_is_read_as_it_was_written(adapter, tmp_path):
    recipe = Recipe(
        model=ModelConfig(path="base", revision="main", shape=LlamaConfig(**SHAPE)),
        data=DataConfig(train=["a.jsonl", "b.jsonl"]),
        train=TrainConfig(output=str(tmp_path), steps=None, eval_every=None),
        adapter=adapter,
        optim=OptimConfig(learning_rate=1e-5, clip=None),
        mesh=MeshConfig(data=2, fsdp=-1),
    )
    keep_recipe(recipe)
    assert parse(Recipe, ["--config", str(tmp_path / "recipe.yaml")]) == recipe


LORA = ["--adapter", "genlora_jax.LoRAConfig", "--adapter.targets", "[q_proj, up_proj]"]


def test_a_peft_adapter_is_a_start_for_lora(finished, run, workshop, tmp_path):
    output, *_ = finished
    base = workshop / "base"
    _, params = gl.load_llama(base, dtype="float32", param_dtype="float32")
    factors = gl.generate_factors(*gl.load_adapter(output / "adapter", params))
    gl.export_peft(tmp_path / "peft", None, factors, base=base)
    start = [*LORA, "--train.init_from", tmp_path / "peft", "--train.steps", 1]
    start += ["--data.train", workshop / "eval.jsonl", "--data.batch_size", 8]
    status, _, err = run(tmp_path / "warm", *start, "--adapter.rank", 6)
    assert status == 0, err
    ((_, first),) = records(tmp_path / "warm")
    assert first == pytest.approx(dict(records(output, "eval_loss"))[STEPS], rel=1e-5)
    for arguments, said in (
        ([*start, "--adapter.rank", 2], "has rank 4, more than adapter.rank (2)"),
        (start[len(LORA) :], "a PEFT adapter, which goes on as LoRA alone"),
    ):
        status, _, err = run(tmp_path / "other", *arguments)
        assert (status, said in err, err.count("\n")) == (1, True, 1)


# Errors.

BAD = {
    "unknown field": (["--adapter.rnk", "3"], "rnk"),
    "unknown section": (["--data.bogus", "3"], "bogus"),
    "rank 0": (["--adapter.rank", "0"], "rank"),
    "rank of text": (["--adapter.rank", "many"], "rank"),
    "no steps": (["--train.steps", "0"], "train.steps"),
    "unmatched target": (["--adapter.targets", "[z_proj]"], "z_proj"),
    "unknown dtype": (["--model.dtype", "float12"], "float12"),
    "no base": (["--model.path", "{here}/nowhere"], "nowhere"),
    "no data": (["--data.train", "{here}/missing.jsonl"], "missing.jsonl"),
    "no evaluation data": (["--data.eval", "{here}/missing.jsonl"], "missing.jsonl"),
    "bad line": (["--data.train", "{here}/bad.jsonl"], "bad.jsonl:2"),
    "parts": (["--train.accumulate", "3"], "train.accumulate"),
    "nothing to resume": (["--train.resume", "true"], "nothing to resume"),
    "another's directory": (["--train.output", "{here}", "--train.resume", "auto"], "not empty"),
    "resume of text": (["--train.resume", "maybe"], "train.resume"),
    "no recipe": (["--config", "{here}/missing.yaml"], "missing.yaml"),
    "no adapter": (["--train.init_from", "{here}/missing"], "missing"),
    "output under a file": (["--train.output", "{here}/file/run"], "file/run"),
    "output is a file": (["--train.output", "{here}/file"], "file"),
    "output not empty": (["--train.output", "{here}"], "not empty"),
    "no wandb": (["--train.wandb", "project"], "train.wandb"),
}


@pytest.mark.parametrize(("arguments", "named"), BAD.values(), ids=BAD)
def test_an_error_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, arguments, named):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (tmp_path / "file").write_text("here first")
    before = listing(tmp_path)
    arguments = [argument.format(here=tmp_path) for argument in arguments]
    status, _, err = run(tmp_path / "new", *arguments)
    assert status != 0
    assert named in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert listing(tmp_path) == before


def test_an_adapter_of_another_config_is_no_start(finished, run, tmp_path, monkeypatch):
    output, *_ = finished
    monkeypatch.delattr(gl, "load_llama")  # it is refused before the base is loaded
    arguments = ["--train.init_from", output / "adapter", "--adapter.alpha", 9]
    status, _, err = run(tmp_path / "new", *arguments)
    assert status == 1
    assert "was made with adapter.alpha 8.0, and the recipe has 9.0" in err
    assert err.count("\n") == 1
    assert listing(tmp_path) == {}


# Orbax leaves tasks behind when it refuses a shape.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "change", [["--adapter.rank", 3], ["--adapter.targets", "[q_proj]"]], ids=str
)
def test_a_run_of_another_adapter_is_not_resumed(finished, run, tmp_path, change):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    before = listing(copy)
    status, _, err = run(copy, "--train.resume", "true", *change)
    assert status == 1
    assert err.startswith(f"error: {copy}")
    assert "does not fit" in err
    assert err.count("\n") == 1
    assert listing(copy) == before


def test_a_loss_that_is_not_finite_ends_the_run(run, tmp_path):
    arguments = [
        "--train.steps",
        5,
        "--optim.learning_rate",
        3e38,
        "--optim.warmup",
        0,
        "--train.save_every",
        1,
    ]
    status, _, err = run(tmp_path / "run", *arguments)
    assert status == 1
    assert err.count("\n") == 1
    assert "at step 2;" in err
    assert "checkpoint, of step 1, is kept" in err
    assert steps_saved(tmp_path / "run") == {1}
    assert [step for step, _ in records(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_loss_that_is_not_finite_says_so_when_nothing_is_saved(run, tmp_path):
    arguments = ["--train.steps", 5, "--optim.learning_rate", 3e38, "--optim.warmup", 0]
    status, _, err = run(tmp_path / "run", *arguments)
    assert status == 1
    assert "at step 2;" in err
    assert "None" not in err


def test_a_shape_that_is_not_the_checkpoints_is_named(workshop, run, tmp_path):
    config = json.loads((workshop / "base" / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(LlamaConfig)}
    shape = {name: value for name, value in config.items() if name in names}
    arguments = ["--train.steps", 1, "--model.shape", json.dumps(shape)]
    assert run(tmp_path / "right", *arguments)[0] == 0
    arguments[-1] = json.dumps(shape | {"rope_theta": 5e5})
    status, _, err = run(tmp_path / "wrong", *arguments)
    assert status == 1
    assert "model.shape: rope_theta is 500000.0; the checkpoint has 10000.0" in err
    assert not (tmp_path / "wrong").exists()


# Interruptions.


def test_a_signal_at_any_moment_is_saved_before_the_run_says_so(run, tmp_path, monkeypatch):
    class Late(processes.Interruption):
        """Notes a signal between the first look and the second."""

        looks = itertools.count()

        @property
        def signal(self):
            return signal.SIGTERM if next(self.looks) > 0 else None

        @signal.setter
        def signal(self, value):
            pass

    monkeypatch.setattr(processes, "Interruption", Late)
    status, out, _ = run(tmp_path / "run", "--train.steps", 10)
    assert status == 128 + signal.SIGTERM
    (step,) = steps_saved(tmp_path / "run")
    assert f"stopped at step {step}, saved" in out


@pytest.fixture(scope="module")
def battered(launch, finished, tmp_path_factory):
    """The same run, stopped by SIGTERM, killed between saves, killed in a save, then finished."""
    output = tmp_path_factory.mktemp("battered") / "run"
    reference = finished[0]

    process = launch(output, "--train.resume", "auto")  # there is nothing, and it begins
    wait_for(lambda: lines_in(output) >= 10, process, "ten records")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    stopped = max(steps_saved(output))
    assert f"stopped at step {stopped}, saved; go on with --train.resume true" in out
    assert "resumed" not in out
    assert records(output) == records(reference)[:stopped]
    assert not (output / "adapter").exists()

    # Between saves: the records are ahead of the newest checkpoint.
    process = launch(output, "--train.resume", "true")
    wait_for(lambda: lines_in(output) >= 120, process, "120 records")
    process.kill()
    out, _ = process.communicate(timeout=120)
    assert f"resumed at step {stopped}" in out
    assert process.returncode == -signal.SIGKILL
    reached = len(records(output))
    assert max(steps_saved(output)) < reached < STEPS

    # In a save.
    saved = max(steps_saved(output))
    process = launch(output, "--train.resume", "true", "--train.save_every", "3")
    wait_for(lambda: max(steps_saved(output)) > saved and unfinished(output), process, "a save")
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert unfinished(output), "the save was complete before the kill"

    process = launch(output, "--train.resume", "auto")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert f"resumed at step {saved}" not in out  # but at a later one
    assert "resumed at step" in out
    return output


def test_a_battered_run_has_the_records_of_an_undisturbed_one(battered, finished):
    for field in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert records(battered, field) == records(finished[0], field)


def test_a_battered_run_ends_with_the_same_adapter(battered, finished):
    assert listing(battered / "adapter") == listing(finished[0] / "adapter")


def test_a_resumed_run_still_knows_the_best_adapter(battered, finished):
    ours, theirs = (
        load_file(output / "adapter-best" / "adapter.safetensors")
        for output in (battered, finished[0])
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_a_battered_run_leaves_no_half_of_a_checkpoint(battered):
    assert not unfinished(battered)
    assert {225, 300} <= steps_saved(battered)
