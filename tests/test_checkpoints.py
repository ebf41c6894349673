"""Checkpoints: their size, and what happens when the newest is damaged."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import Numbers, random_llama

import genlora_jax as gl
from genlora_jax.data.batches import train_batches
from genlora_jax.data.config import DataConfig
from genlora_jax.data.sources import MemorySource
from genlora_jax.remote_path import RemoteError
from genlora_jax.training.checkpoint import Checkpoints
from genlora_jax.training.checkpoint_storage import RETRIES, _of_bucket, naming_whole
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.recipe import TrainConfig
from genlora_jax.training.step import init_state

CFG = gl.GenLoRAConfig(rank=4, group_size=4, kernels=2)
FIXTURES = Path(__file__).parent / "fixtures" / "0.1"


@pytest.fixture
def state():
    _, params = random_llama(hidden_size=64, intermediate_size=128, head_dim=16)
    adapter = gl.init_adapter(CFG, jax.random.key(0), params)
    return init_state(adapter, make_optimizer(OptimConfig(), 10))


def at(state, step):
    """The state of some step, each with numbers of its own."""
    trainable = jax.tree.map(lambda x: x + step, state.adapter.trainable)
    adapter = state.adapter.replace(trainable=trainable)
    return dataclasses.replace(state, adapter=adapter, step=jnp.int32(step))


@pytest.fixture
def saved(state, tmp_path):
    """Checkpoints of steps 3, 6 and 9, the data as far on as the steps."""
    data = Numbers()
    with Checkpoints(tmp_path / "run", keep=3) as checkpoints:
        for step in (3, 6, 9):
            for _ in range(3):
                next(data)
            checkpoints.save(at(state, step), data)
    return tmp_path / "run"


def damage(directory, step):
    """Cuts every file of a checkpoint's arrays to half its length."""
    files = [f for f in (directory / str(step) / "state").rglob("*") if f.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_says_so(saved, state, capsys):
    damage(saved, 9)
    data = Numbers()
    with Checkpoints(saved, keep=3) as checkpoints:
        restored = checkpoints.restore(state, data)
        assert "checkpoint 9 cannot be read" in capsys.readouterr().err
        assert int(restored.step) == 6
        assert next(data) == 6
        for leaf, first in zip(
            jax.tree.leaves(restored.adapter), jax.tree.leaves(state.adapter), strict=True
        ):
            np.testing.assert_array_equal(leaf, first + 6)
        assert checkpoints.latest() == 6
        checkpoints.save(at(state, 7), data)  # before the damaged one
    with Checkpoints(saved, keep=3) as checkpoints:
        assert int(checkpoints.restore(state, data).step) == 7
        checkpoints.save(at(state, 9), data)  # in place of the damaged one
    with Checkpoints(saved, keep=3) as checkpoints:
        assert int(checkpoints.restore(state, Numbers()).step) == 9


def test_nothing_that_can_be_read_is_an_error(saved, state, capsys):
    for step in (3, 6, 9):
        damage(saved, step)
    with (
        Checkpoints(saved, keep=3) as checkpoints,
        pytest.raises(ValueError, match="no checkpoint in it can be read"),
    ):
        checkpoints.restore(state, Numbers())
    assert capsys.readouterr().err.count("cannot be read") == 3


def test_a_checkpoint_of_other_settings_is_refused_by_field(state, tmp_path):
    """Of settings that change no shape, too."""

    def with_settings(**changed):
        adapter = state.adapter.with_config(dataclasses.replace(CFG, **changed))
        return dataclasses.replace(state, adapter=adapter)

    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(at(state, 3), Numbers())
        for changed, message in (
            ({"hadamard": True}, r"adapter\.hadamard False, and the recipe has True"),
            ({"alpha": 8.0}, r"adapter\.alpha 16\.0, and the recipe has 8\.0"),
        ):
            with pytest.raises(ValueError, match=message):
                checkpoints.restore(with_settings(**changed), Numbers())
        same = with_settings(dropout=0.5, layers=None)
        assert int(checkpoints.restore(same, Numbers()).step) == 3


def test_a_checkpoint_of_another_base_is_refused(state, tmp_path):
    with Checkpoints(tmp_path / "run", base_config="one") as checkpoints:
        checkpoints.save(at(state, 3), Numbers())
    with (
        Checkpoints(tmp_path / "run", base_config="other") as checkpoints,
        pytest.raises(ValueError, match="checkpoint 3 was trained on another base: the config"),
    ):
        checkpoints.restore(state, Numbers())
    spec = dataclasses.replace(state.adapter.spec, fingerprint="other")
    moved = dataclasses.replace(state, adapter=state.adapter.replace(spec=spec))
    with (
        Checkpoints(tmp_path / "run", base_config="one") as checkpoints,
        pytest.raises(ValueError, match="checkpoint 3 was trained on another base: the shapes"),
    ):
        checkpoints.restore(moved, Numbers())


def test_a_checkpoint_s_leaves_bear_names(state, tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(at(state, 3), Numbers())
    stored = json.loads((tmp_path / "run" / "3" / "state" / "_METADATA").read_text())
    names = {
        ".".join(part["key"] for part in entry["key_metadata"])
        for entry in stored["tree_metadata"].values()
    }
    target = "model.layers.self_attn.q_proj"
    assert {"step", "key", f"adapter.trainable.latents.{target}.a"} <= names
    assert f"opt_state.1.mu.latents.{target}.a" in names


def test_a_checkpoint_of_version_0_1_is_restored_bit_for_bit(tmp_path):
    shutil.copytree(FIXTURES / "checkpoints", tmp_path / "run")
    cfg = gl.GenLoRAConfig(rank=4, alpha=8.0, group_size=4, targets=["q_proj", "down_proj"])
    adapter = gl.init_adapter(cfg, jax.random.key(0), random_llama()[1])
    state = init_state(adapter, make_optimizer(OptimConfig(), 10))
    with Checkpoints(tmp_path / "run", base_config="any") as checkpoints:
        restored = checkpoints.restore(state, Numbers())
    with np.load(FIXTURES / "state.npz") as expected:
        leaves, _ = jax.tree.flatten_with_path(restored)
        assert len(leaves) + 1 == len(expected.files)
        for path, leaf in leaves:
            name = "/".join(str(key) for key in path)
            np.testing.assert_array_equal(leaf, expected[name])
    changed = adapter.with_config(dataclasses.replace(cfg, alpha=9.0))
    other = dataclasses.replace(state, adapter=changed)
    with (
        pytest.raises(ValueError, match=r"adapter\.alpha 8\.0, and the recipe has 9\.0"),
        Checkpoints(tmp_path / "run") as checkpoints,
    ):
        checkpoints.restore(other, Numbers())
    examples = [{"input_ids": np.ones(5, np.int32), "loss_mask": np.ones(5, bool)}] * 8
    cfg = DataConfig(train="none", length=16, batch_size=2)
    with (
        pytest.raises(
            ValueError, match=r"checkpoint 2 has its place in the data as an older .*ini"
        ),
        Checkpoints(tmp_path / "run") as checkpoints,
    ):
        checkpoints.restore(state, train_batches(MemorySource(examples), cfg))


def test_a_checkpoint_holds_the_adapter_and_the_optimizer_and_little_else(saved, state):
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
    written = sum(file.stat().st_size for file in (saved / "9").rglob("*") if file.is_file())
    assert held > 3 * 4 * gl.count_parameters(state.adapter)  # Adam has two moments
    # Orbax writes the name of a leaf, up to 90 characters, in five places, and its sharding.
    assert written < held + 700 * len(jax.tree.leaves(state))


def test_the_latest_and_those_of_every_so_many_steps_are_kept(state, tmp_path):
    with Checkpoints(tmp_path / "run", keep=1, keep_every=4) as checkpoints:
        for step in range(2, 16, 2):
            checkpoints.save(at(state, step), Numbers())
    left = {int(f.name) for f in (tmp_path / "run").iterdir() if f.name.isdecimal()}
    assert left == {4, 8, 12, 14}


def test_keeping_steps_that_are_never_saved_is_refused():
    with pytest.raises(ValueError, match=r"keep_every \(10\) must be a multiple .*save_every \(4"):
        TrainConfig(output="out", save_every=4, keep_every=10)


def test_an_error_of_a_bucket_says_what_is_saved():
    for step, words in ((8, "step 8 is saved"), (None, "no checkpoint was whole")):
        with (
            pytest.raises(
                PermissionError, match=f"^s3://bucket/run: refused. {words}: go on with --train.res"
            ),
            naming_whole("s3://bucket/run", lambda step=step: step),
        ):
            raise PermissionError("s3://bucket/run: refused")
    with pytest.raises(PermissionError, match=r"^refused$"), naming_whole("run", lambda: 8):
        raise PermissionError("refused")
    with (  # of where the rows are
        pytest.raises(PermissionError, match=r"^s3://rows: refused$"),
        naming_whole("s3://bucket/run", lambda: 8),
    ):
        raise PermissionError("s3://rows: refused")

    class Answer(RemoteError):
        def __init__(self, *, code):
            super().__init__(f"s3://bucket/run: code {code}")

    with (
        pytest.raises(RemoteError, match=r"^s3://bucket/run: code 503\. step 8 is saved"),
        naming_whole("s3://bucket/run", lambda: 8),
    ):
        raise Answer(code=503)
    spec = {"driver": "ocdbt", "base": {"driver": "gcs", "bucket": "b", "path": "p/"}}
    base = _of_bucket(spec, "gs")["base"]
    assert base == spec["base"] | {"gcs_request_retries": RETRIES}
