"""The study: its data's shares, its sweeps, and that its pages show the committed results."""

import argparse
import json
import re

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from flax import linen as nn

import genlora_jax as gl
from genlora_jax.methods import config_from_json
from train.benchmarks.frontier import report, run, tune
from train.benchmarks.frontier.arms import ARMS, SETS, rate_at
from train.benchmarks.frontier.prepare import split
from train.benchmarks.frontier.pretrain import pretrain_base

JOB = {"base": "tiny", "regime": "known", "task": "letters", "arm": "model r=32 g=8"}
LENGTH, STEPS = 16, 16


def write_batches(file, batches, seed):
    """Counting upwards from a random start, two segments a row, the second half of each trained."""
    rng = np.random.default_rng(seed)
    place = np.arange(LENGTH) % (LENGTH // 2)
    starts = np.repeat(rng.integers(1, 40, (batches, 2, 2)), LENGTH // 2, axis=-1)
    shape = starts.shape
    arrays = {
        "input_ids": starts + place,
        "loss_mask": np.broadcast_to(place >= LENGTH // 4, shape),
        "segment_ids": np.broadcast_to(1 + np.arange(LENGTH) // (LENGTH // 2), shape),
        "positions": np.broadcast_to(place, shape),
    }
    np.savez(file, **{f"letters/{name}": value for name, value in arrays.items()})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Options of a run on little data, without test rows, and its base."""
    here = tmp_path_factory.mktemp("study")
    (here / "about.json").write_text(json.dumps({"vocabulary": 48}))
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 48, (320, LENGTH)) for name in ("novels", "known-letters")}
    np.savez(here / "pretraining.npz", **rows)
    write_batches(here / "tuned.npz", STEPS, 1)
    write_batches(here / "validation.npz", 2, 2)
    options = argparse.Namespace(
        data=here, folder=here, pretraining_steps=10, seeds=2, rates=4, test=False
    )
    assert pretrain_base(options, JOB)["steps"] == 10
    return options


def test_shares_of_a_task_have_no_row_in_common():
    rows = [{"prompt": str(i)} for i in range(1000)]
    shares = split(rows, seed=3)
    drawn = [row["prompt"] for share in shares.values() for row in share]
    assert len(set(drawn)) == len(drawn) == 1000
    assert [len(shares[name]) for name in ("known", "validation", "tuned")] == [500, 125, 375]


def test_a_sweep_goes_on_until_its_best_rate_lies_inside(study, monkeypatch):
    monkeypatch.setitem(tune.FIRST, "known", -24)  # far too low: 1e-6
    record = tune.sweep_rates(study, JOB)
    rates = sorted({member["learning_rate"] for member in record["members"]})
    assert rates[0] == rate_at(-24)
    assert rates[3] < record["best_rate"]
    assert record["best_rate"] < rates[-1] or len(rates) == tune.MOST_RATES
    losses = {}
    for member, loss in zip(record["members"], record["validation_loss"], strict=True):
        losses.setdefault(member["learning_rate"], []).append(loss)
    # The two best of the first seed have the second as well, and one of them is chosen.
    best = sorted(losses, key=lambda rate: losses[rate][0])[:2]
    assert {rate for rate, seeds in losses.items() if len(seeds) == 2} == set(best)
    expected = min(np.mean(losses[rate]) for rate in best)
    assert record["best_loss"] == pytest.approx(expected, abs=1e-5)
    assert np.mean(losses[record["best_rate"]]) == pytest.approx(expected, abs=1e-5)
    assert record["singular_values"][0] == 1.0
    assert "test_loss" not in record


def test_a_sweep_has_as_many_rates_as_are_asked_for(study):
    record = tune.sweep_rates(argparse.Namespace(**vars(study) | {"rates": 7}), JOB)
    rates = sorted({member["learning_rate"] for member in record["members"]})
    assert 7 <= len(rates) <= tune.MOST_RATES
    assert rates[0] < record["best_rate"] < rates[-1]
    assert report.over_seeds(report.losses_by_seed(record)).startswith(f"{record['best_loss']:.3f}")


def test_each_length_of_tuning_is_a_run_of_its_own(study):
    wanted = {"bases": ["wide"], "regimes": ["known"], "tasks": ["letters"], "arms": ["lora r=1"]}
    _, once = run.jobs_of(argparse.Namespace(**wanted, steps=[]))
    _, several = run.jobs_of(argparse.Namespace(**wanted, steps=[2 * STEPS, 8]))
    assert [run.run_of(job) for job in once] == ["wide known letters"]
    names = [f"wide known letters, {steps} steps" for steps in (2 * STEPS, 8)]
    assert [run.run_of(job) for job in several] == names
    one_seed = argparse.Namespace(**vars(study) | {"seeds": 1})
    assert tune.sweep_rates(one_seed, several[0] | {"base": "tiny"})["steps"] == 2 * STEPS


def test_test_rows_are_measured_with_the_members_that_validation_chose(study):
    (study.data / "validation.npz").rename(study.data / "test.npz")
    write_batches(study.data / "validation.npz", 2, 2)  # the same rows
    testing = argparse.Namespace(**vars(study) | {"test": True})
    record = tune.sweep_rates(testing, JOB)
    (study.data / "test.npz").unlink()
    assert len(record["test_loss"]) == 2
    assert np.mean(record["test_loss"]) == pytest.approx(record["best_loss"], rel=1e-4)
    assert all(0 <= share <= 1 for share in record["test_exact_match"])


def test_a_completion_matches_if_all_its_tokens_do():
    class Counting(nn.Module):
        """Predicts the next number, but 9 after 6; nearly sure."""

        @nn.compact
        def __call__(self, ids, *, positions, segment_ids):
            predicted = jnp.where(ids == 6, 9, ids + 1)
            adapted = nn.Dense(10, use_bias=False, name="proj")(jnp.ones((*ids.shape, 4)))
            return 5.0 * jax.nn.one_hot(predicted, 10) + 0.0 * adapted

    batch = {
        "input_ids": np.array([[1, 2, 3, 4, 5, 6, 7, 8]]),
        "loss_mask": np.array([[0, 0, 1, 1, 0, 0, 1, 1]], bool),
        "segment_ids": np.array([[1, 1, 1, 1, 2, 2, 2, 2]]),
        "positions": np.array([[0, 1, 2, 3, 0, 1, 2, 3]]),
    }
    params, cfg = {"proj": {"kernel": jnp.zeros((4, 10))}}, gl.LoRAConfig(rank=1)
    adapter = gl.init_adapter(cfg, jax.random.key(0), params)
    scores = tune.tested(Counting(), params, adapter, [batch, batch])
    right = np.log(np.exp(5) + 9) - 5
    assert scores["test_loss"] == pytest.approx((3 * right + right + 5) / 4, abs=1e-4)
    assert scores["test_exact_match"] == 0.5  # 3 4, but not 7 8


def test_arms_can_be_asked_for_by_set_or_name_on_every_base():
    wanted = {"bases": ["wide", "deep"], "regimes": ["hard"], "tasks": ["math", "code"]}
    bases, tuning = run.jobs_of(argparse.Namespace(**wanted, arms=["few", "full"], steps=[]))
    assert len(bases) == 2
    assert len(tuning) == 2 * 2 * (len(SETS["few"]) + 1)


def test_committed_results_are_of_the_arms_of_their_names():
    gone = set()
    for file in report.RESULTS.glob("*.json"):
        for arms in json.loads(file.read_text())["runs"].values():
            for name, record in report.finished(arms).items():
                if name not in ARMS:
                    gone.add(name)
                    with pytest.raises(ValueError, match="is no longer supported"):
                        config_from_json(record["config"])
                    continue
                arm = ARMS[name]
                assert config_from_json(record["config"]) == arm.cfg, name
                assert record["b_ratio"] == arm.b_ratio, name
                assert record.get("weight_decay", 0.0) == arm.weight_decay, name
    assert len(gone) == 6


def test_what_lora_needs_is_interpolated_between_its_ranks():
    arms = {
        "lora r=1": {"parameters": 100, "best_loss": 2.0},
        "lora r=4": {"parameters": 400, "best_loss": 1.0},
    }
    assert report.lora_equivalent({"parameters": 50, "best_loss": 1.5}, arms) == pytest.approx(4)
    assert report.lora_equivalent({"parameters": 50, "best_loss": 0.5}, arms) is None
    # LoRA's best of a size counts: with dropout where that helps it.
    arms |= {"lora r=1, dropout 0.1": {"parameters": 100, "best_loss": 1.5}}
    assert report.lora_equivalent({"parameters": 50, "best_loss": 1.5}, arms) == pytest.approx(2)
    assert report.lora_equivalent({"parameters": 50, "best_loss": 1.6}, arms) is None


def test_a_line_over_ranks_is_of_one_dropout():
    def arm(rank, loss):
        return {"config": {"method": "lora", "rank": rank}, "best_loss": loss}

    arms = {
        "lora r=1": arm(1, 3.0),
        "lora r=4": arm(4, 2.0),
        "lora r=4, dropout 0.1": arm(4, 1.0),
        "lora r=4, decay 1": arm(4, 4.0),
    }
    axis = matplotlib.figure.Figure().subplots()
    report.plot_scaling(axis, arms)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert drawn == {"lora": [[1, 3.0], [4, 2.0]], "lora, dropout 0.1": [[4, 1.0]]}


def test_arms_of_one_rank_stand_together():
    def arm(rank, parameters):
        return {
            "config": {"rank": rank},
            "parameters": parameters,
            "members": [{"learning_rate": 0.1}] * 2,
            "validation_loss": [2.0, 4.0],
            "best_rate": 0.1,
            "test_loss": [1.0],
        }

    told = report.table_by_rank({"one": arm(8, 30), "two": arm(2, 10), "three": arm(8, 20)})
    assert told.splitlines()[2:] == [
        "| 8 | three | 20 | 3.0000 ± 1.4142 | 1.0000 |",
        "| 8 | one | 30 | 3.0000 ± 1.4142 | 1.0000 |",
    ]
    assert report.table_by_rank({"one": arm(8, 30), "two": arm(2, 10)}) == ""


def test_the_tables_are_those_of_the_committed_results():
    files = sorted(report.RESULTS.glob("*.json"))
    assert report.TABLES.read_text() == report.page(files)


def test_the_findings_tell_no_loss_that_no_arm_has():
    runs = [json.loads(file.read_text())["runs"] for file in report.RESULTS.glob("*.json")]
    every = [
        arm
        for run_arms in runs
        for arms in run_arms.values()
        for arm in report.finished(arms).values()
    ]
    measured = {f"{arm['best_loss']:.3f}" for arm in every}
    measured |= {f"{np.mean(arm['test_loss']):.3f}" for arm in every if "test_loss" in arm}
    told = re.findall(r"\b[1-9]\.\d{3}\b", (report.RESULTS / "findings.md").read_text())
    assert len(told) > 40
    assert set(told) <= measured
