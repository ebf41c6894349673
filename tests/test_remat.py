"""`model.remat: auto`: which step is taken for which memory."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from tiny_base import write_base
from tiny_models import TINY

import genlora_jax as gl
from genlora_jax.data.config import DataConfig
from genlora_jax.hf.base_model import ModelConfig
from genlora_jax.mesh import MeshConfig
from genlora_jax.models.config import LlamaConfig
from genlora_jax.plan import estimate
from genlora_jax.plan.chips import GIB, parse_topology
from genlora_jax.plan.estimate import fastest_that_fits, rank_meshes
from genlora_jax.plan.report import report
from genlora_jax.training import finetune, remat
from genlora_jax.training.recipe import Recipe, TrainConfig
from genlora_jax.training.remat import step_that_fits
from genlora_jax.training.setup import prepare
from genlora_jax.training.sweep.members import SweepRecipe

HELD = {"none": 70, "dots": 50, "full": 20}  # GiB
POLICIES = tuple(HELD)


class Step:
    """A jitted step whose program takes so many GiB, half of them as arguments."""

    def __init__(self, policy, refused=()):
        self.policy, self.refused = policy, refused

    def __call__(self, state):
        return self.policy, state

    def lower(self, state):
        return self

    def compile(self):
        if self.policy in self.refused:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm")
        half = HELD[self.policy] * GIB // 2
        return SimpleNamespace(
            memory_analysis=lambda: SimpleNamespace(
                argument_size_in_bytes=half, temp_size_in_bytes=half, peak_memory_in_bytes=2 * half
            )
        )


def device(platform, memory):
    stats = None if memory is None else {"bytes_limit": memory * GIB}
    return SimpleNamespace(platform=platform, memory_stats=lambda: stats)


@pytest.mark.parametrize(
    ("platform", "memory", "refused", "line"),
    [
        ("gpu", 79, (), "remat: none (70.0 of 79.0 GiB)"),
        ("gpu", 71, (), "remat: dots (50.0 of 71.0 GiB)"),
        ("gpu", 40, (), "remat: full (no other fits 40.0 GiB)"),
        ("gpu", 10, (), "remat: full (no other fits 10.0 GiB)"),
        ("gpu", None, (), "remat: full (the device does not say how much memory it has)"),
        ("tpu", 95, ("none",), "remat: dots (50.0 of 95.0 GiB)"),
        ("cpu", None, (), "remat: none (as on all CPUs)"),
    ],
)
def test_the_fastest_that_fits_is_taken_and_said_once(platform, memory, refused, line):
    lines = []
    step = step_that_fits(
        lambda policy: Step(policy, refused), POLICIES, device(platform, memory), lines.append
    )
    for state in (1, 2):
        assert step(state) == (line.split()[1], state)
    assert lines == [line]


@pytest.mark.parametrize("refused", [(), ("none",)])
def test_a_policy_must_fit_in_all_processes_which_agree_on_each(refused, monkeypatch):
    others, said = [79 * GIB, 51 * GIB], []  # of another process, by policy

    def gather_values(values):
        said.extend(values)
        return np.array([values, [others[len(said) - 1]]], np.float32)

    monkeypatch.setattr(remat, "gather_values", gather_values)
    lines = []
    step = step_that_fits(
        lambda policy: Step(policy, refused), POLICIES, device("gpu", 79), lines.append
    )
    assert step(1) == ("dots", 1)
    assert lines == ["remat: dots (51.0 of 79.0 GiB)"]
    assert said == [float("inf") if refused else 70 * GIB, 50 * GIB]


@pytest.mark.parametrize(
    ("memory", "beyond", "line"),
    [
        (40, 0, "remat: dots in the last 9 of 16 layers, full in the others (36.9 of 40.0 GiB)"),
        (40, 2, "remat: dots in the last 8 of 16 layers, full in the others (37.0 of 40.0 GiB)"),
        (40, 9, "remat: full (no other fits 40.0 GiB)"),
        (22, 0, "remat: full (no other fits 22.0 GiB)"),
    ],
)
def test_as_many_layers_keep_their_products_as_fit(memory, beyond, line):
    lines, made = [], []

    class Mixed(Step):
        """Its program takes what is between, and so much more than by proportion."""

        def compile(self):
            if isinstance(self.policy, str):
                return super().compile()
            share = self.policy.count("dots") / len(self.policy)
            held = HELD["full"] + share * (HELD["dots"] - HELD["full"]) + beyond
            return SimpleNamespace(
                memory_analysis=lambda: SimpleNamespace(
                    argument_size_in_bytes=held * GIB, temp_size_in_bytes=0
                )
            )

    def make(policy):
        made.append(policy)
        return Mixed(policy)

    step = step_that_fits(make, POLICIES, device("gpu", memory), lines.append, layers=16)
    policy, _ = step(1)
    assert lines == [line]
    if policy != "full":
        count = policy.count("dots")
        assert policy == ("full",) * (16 - count) + ("dots",) * count
    assert made[:3] == list(POLICIES)


def test_a_policy_that_is_given_is_not_weighed():
    lines = []
    step = step_that_fits(Step, ("dots",), device("gpu", 1), lines.append)
    assert step(1) == ("dots", 1)
    assert not lines


def test_another_error_of_the_compiler_is_not_hidden():
    class Broken(Step):
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    step = step_that_fits(Broken, POLICIES, device("gpu", 79), print)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        step(1)


def recipe(**model):
    return Recipe(
        model=ModelConfig(path="nowhere", shape=LlamaConfig(**TINY), **model),
        data=DataConfig(train="nowhere", length=64, batch_size=64),
        train=TrainConfig(output="nowhere"),
        adapter=gl.LoRAConfig(rank=2),
    )


def test_a_plan_takes_the_first_that_fits_by_its_estimate():
    topology = parse_topology("gpu:1x80")
    found, ranked = fastest_that_fits(recipe(remat="auto"), topology)
    assert found.model.remat == "none"
    assert ranked == rank_meshes(recipe(remat="none"), topology)
    memory = rank_meshes(recipe(remat="dots"), topology)[0]
    chip = dataclasses.replace(topology.chip, memory=1.2 * (memory.arguments + memory.temporaries))
    found, _ = fastest_that_fits(recipe(remat="auto"), dataclasses.replace(topology, chip=chip))
    assert found.model.remat == "dots"


def test_gpus_that_scan_layers_stack_no_more_than_products():
    scanned, unrolled = ({"scan": scan} for scan in (True, False))
    for platform, model, given, policies in (
        ("gpu", scanned, None, ("dots",)),
        ("gpu", {"base_dtype": "nf4"}, None, ("dots",)),
        ("gpu", unrolled, None, ("none",)),
        ("gpu", unrolled, "none", ("none",)),
        ("gpu", scanned, "none", ("none",)),  # to evaluate with a run's recipe
        ("tpu", scanned, "none", ("none",)),
        ("gpu", scanned, "auto", ("dots", "full")),
        ("gpu", unrolled, "auto", POLICIES),
        ("tpu", scanned, None, ("none",)),
        ("cpu", scanned, "auto", POLICIES),
    ):
        assert ModelConfig(path="", remat=given, **model).policies(platform) == policies


@pytest.mark.parametrize("model", [{"scan": True}, {"base_dtype": "nf4"}])
def test_stacks_of_all_activations_are_refused_where_a_gpu_scans_layers(model):
    with pytest.raises(ValueError, match=r"model.remat none: .*; give dots or full"):
        rank_meshes(recipe(remat="none", **model), parse_topology("gpu:1x80"))
    mesh: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    with pytest.raises(ValueError, match=r"model.remat none: .*"):  # before any data is read
        prepare(recipe(remat="none", **model), mesh)
    assert rank_meshes(recipe(remat="none", **model), parse_topology("v5p:2x2x1"))


def test_a_plan_takes_the_policy_that_a_run_on_its_chips_has():
    model = recipe(base_dtype="nf4"), recipe(base_dtype="nf4", remat="dots")
    plans = [rank_meshes(each, parse_topology("gpu:1x80"))[0] for each in model]
    assert plans[0] == plans[1]


def test_a_plan_in_which_nothing_fits_takes_what_needs_least(monkeypatch):
    meshes = [MeshConfig(data=2, fsdp=1)]  # `full` keeps more than `dots` there, on GPUs
    monkeypatch.setattr(estimate, "candidates", lambda recipe, topology: iter(meshes))
    topology = parse_topology("gpu:2x80")
    small = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=2**20))
    found, ranked = fastest_that_fits(recipe(remat="auto"), small)
    held = {
        policy: sum(e.arguments + e.temporaries for e in rank_meshes(recipe(remat=policy), small))
        for policy in POLICIES
    }
    assert held["dots"] < held["full"]
    assert not ranked[0].fits
    assert (found.model.remat, ranked) == ("dots", rank_meshes(recipe(remat="dots"), small))


def test_a_plan_says_for_which_mesh_it_chose(capsys):
    report(recipe(remat="auto"), parse_topology("gpu:1x80"), compiled=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "none, which auto stands for on the best mesh by this estimate; a run" in said


def test_a_sweep_refuses_to_choose():
    given = vars(recipe(remat="auto")) | {"data": DataConfig(train="nowhere", eval="nowhere")}
    with pytest.raises(ValueError, match=r"model\.remat auto: a sweep does not choose"):
        SweepRecipe(**given)


def test_a_run_on_a_cpu_keeps_everything(run_main, tmp_path):
    base = write_base(tmp_path / "base", num_hidden_layers=1)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "completion": " two"}\n' * 4)
    recipe = {
        "model": {"path": str(base), "remat": "auto"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "length": 16, "batch_size": 8},
        "mesh": {"data": 8, "fsdp": 1},
        "train": {"output": str(tmp_path / "run"), "steps": 1},
        "adapter": {"class_path": "genlora_jax.LoRAConfig", "init_args": {"rank": 2}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    status, out, err = run_main(finetune.main, "--config", tmp_path / "recipe.yaml")
    assert status == 0, err
    assert out.count("remat: none (as on all CPUs)") == 1
