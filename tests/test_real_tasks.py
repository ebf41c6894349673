"""The study on a real model: its rows, its search for a rate, and its arms."""

import argparse
import json
import math

import jax
import numpy as np
import pytest

import genlora_jax as gl
from train.benchmarks.frontier.arms import rate_at
from train.benchmarks.frontier.tune import search
from train.benchmarks.real_tasks import report, run, tasks
from train.benchmarks.real_tasks.arms import ARMS, SETS


class FakeTrials:
    """Losses that are lowest at one exponent of the grid."""

    def __init__(self, best):
        self.best, self.members = best, []

    def add(self, rates, seeds):
        self.members += [(rate, seed) for rate in rates for seed in seeds]

    def ranked(self, seeds):
        rates = {rate for rate, _ in self.members}
        assert all((rate, seed) in self.members for rate in rates for seed in range(seeds))
        return sorted(rates, key=lambda rate: abs(math.log10(rate) * 4 - self.best))


@pytest.mark.parametrize(("best", "tried"), [(-14, 5), (-11, 3), (-10, 4)])
def test_one_rate_at_a_time_climbs_to_the_best(best, tried):
    trials = FakeTrials(best)
    search(trials, -11, 3, at_once=1, seeds=3)
    assert len(trials.members) == 3 * tried


@pytest.mark.parametrize(("best", "tried"), [(-10, 3), (-14, 9), (-6, 9)])
def test_rates_are_added_until_the_best_is_inside(best, tried):
    trials = FakeTrials(best)
    search(trials, -11, 3, at_once=3, seeds=2)
    assert len(trials.members) == 2 * tried
    rates = sorted({rate for rate, _ in trials.members})
    assert rates[0] < rate_at(best) < rates[-1]


def test_the_search_ends_when_it_is_told():
    trials = FakeTrials(5)
    search(trials, -11, 3, at_once=3, stop=lambda: True)
    assert len(trials.members) == 3


def test_the_search_begins_around_the_best_rate_of_an_earlier_run(tmp_path):
    earlier = {"runs": {"math": {"rbf": {"best_rate": rate_at(-9)}}}}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    options = argparse.Namespace(start_from=[tmp_path / "earlier.json"], rates=3, seeds=1)
    assert run.first_exponent(options, "math", "rbf", ARMS["rbf"]) == -10
    assert run.first_exponent(options, "letters", "rbf", ARMS["rbf"]) == -10
    assert run.first_exponent(options, "math", "lora r=1", ARMS["lora r=1"]) == run.LOWEST - 1
    # Several seeds of the rate in the middle come first.
    options.seeds = 3
    assert run.first_exponent(options, "math", "rbf", ARMS["rbf"]) == -9
    options.start_from = None
    assert run.first_exponent(options, "math", "rbf", ARMS["rbf"]) == run.LOWEST + 1


def test_rows_are_asked_in_training_as_in_evaluation(tmp_path):
    boolq = {
        "instruction": "Please answer the following question with true or false, question: "
        "is it so?\n\nAnswer format: true/false",
        "answer": "false",
    }
    choice = {
        "instruction": "Please choose the correct answer to the question: Which?\n\n"
        "Answer1: one Answer2: two\n\nAnswer format: answer1/answer2",
        "answer": "answer2",
    }
    for quiz in tasks.QUIZZES:
        (tmp_path / quiz).mkdir(parents=True)
        row = boolq if quiz.endswith("boolq") else choice
        (tmp_path / quiz / "train.json").write_text(json.dumps([row]))
    (tmp_path / "gsm8k").mkdir()
    row = {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}
    (tmp_path / "gsm8k/train.jsonl").write_text(json.dumps(row))
    program = {"text": "Add.", "code": "def add(a, b): return a + b", "test_list": ["assert add"]}
    lines = [json.dumps(program | {"text": f"Add {i}."}) for i in range(1, 512)]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(lines))
    rows = {name: tasks.rows_of(tmp_path, task, "train") for name, task in tasks.TASKS.items()}
    assert rows["completions"][0] == {
        "prompt": "Question: is it so?\nAnswer:",
        "completion": " false",
    }
    assert rows["completions"][1] == {"prompt": "Question: Which?\nAnswer:", "completion": " two"}
    assert rows["letters"][1] == {
        "prompt": "Question: Which?\nA. one\nB. two\nAnswer:",
        "completion": " B",
    }
    asked = {"role": "user", "content": "1 + 1?"}
    answer = {"role": "assistant", "content": "It is 2.\n#### 2"}
    assert rows["chat"] == [{"messages": [asked, answer]}]
    assert rows["code"] == [
        {"prompt": '"""\nAdd 511.\nassert add\n"""\n', "completion": program["code"]}
    ]
    assert rows["math"] == [
        {"prompt": "Question: 1 + 1?\nAnswer:", "completion": " It is 2.\n#### 2"}
    ]


def test_small_latents_make_the_same_factors():
    base = {"layers": {"proj": {"kernel": jax.ShapeDtypeStruct((2, 16, 12), np.float32)}}}
    cfg = gl.GenLoRAConfig(rank=2, group_size=4, kernels=3, rbf_init=0.5)
    adapter = gl.init_adapter(cfg, jax.random.key(0), base)
    large = adapter.replace(
        trainable=adapter.trainable
        | {"latents": jax.tree.map(lambda z: 50 * z, adapter.trainable["latents"])}
    )
    small = run.with_small_latents(large)
    for z in jax.tree.leaves(small.trainable["latents"]):
        np.testing.assert_allclose(np.square(z).mean(-1), cfg.latent_std**2, rtol=1e-5)
    one, other = (gl.generate_factors(cfg, each)["layers"]["proj"]["a"] for each in (large, small))
    # eps is 1e-6 beside a variance of 4e-4.
    np.testing.assert_allclose(one, other, rtol=0, atol=5e-3 * np.abs(one).max())


def test_every_set_names_arms_and_no_arm_wastes_rank_on_smollm2():
    assert set().union(*SETS.values()) == set(ARMS)
    for name, arm in ARMS.items():
        for n in (192, 576, 1536):
            limit = arm.cfg.attainable_rank(n)
            assert limit is None or limit >= min(arm.cfg.rank, n), (name, n)


def test_arms_that_replace_the_residual_by_rbfs_have_its_parameters():
    """Beside the centres and projections, which are few."""
    sizes = {
        name: ARMS[name].cfg.group_size * (ARMS[name].cfg.group_size + ARMS[name].cfg.kernels)
        for name in ("residual g=32", "rbf K=48 g=16", "rbf K=120 g=8, well, half of A")
    }
    assert set(sizes.values()) == {1024}


def test_the_report_has_a_line_an_arm_with_its_spread():
    records = {
        "lora r=1": {
            "parameters": 1000,
            "best_rate": 0.001,
            "inside": False,
            "best_loss": 2.5,
            "best_losses": [2.4, 2.6],
            "accuracy": [{"boolq": 0.5, "mean": 0.5}, {"boolq": 0.75, "mean": 0.75}],
        },
        "base": {"accuracy": [{"boolq": 0.25, "mean": 0.25}]},
        "rbf": {"failed": "ValueError: no"},
    }
    lines = report.table(records).splitlines()
    assert lines[0] == "| arm | parameters | rate | validation loss | boolq | mean |"
    assert lines[2] == (
        "| lora r=1 | 1,000 | 0.001, at an end | 2.500 ± 0.141 | 62.5 ± 17.7 | 62.5 ± 17.7 |"
    )
    assert lines[3] == "| base | | | | 25.0 | 25.0 |"
    assert lines[-1] == "failed: rbf: ValueError: no"
