"""Our own adapters' files, damaged or not finite, and the commands that read them."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_peft import FUZZ, damaged, outcome
from tiny_base import write_base

import genlora_jax as gl
from genlora_jax import cli

CFG = gl.GenLoRAConfig(rank=3, alpha=6.0, group_size=4, kernels=2, targets=["q_proj", "down_proj"])


@pytest.fixture
def saved(tmp_path):
    """A base, its parameters and the directory of an adapter for it."""
    base = write_base(tmp_path / "base")
    model, params = gl.load_llama(base, dtype=jnp.float32, param_dtype=jnp.float32)
    adapter = jax.jit(gl.init_adapter, static_argnums=0)(CFG, jax.random.key(0), params)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    gl.save_adapter(tmp_path / "adapter", CFG, adapter, model=model)
    return base, model, params, tmp_path / "adapter"


def test_damaged_settings_are_the_user_s_error(saved):
    _, model, params, path = saved
    file = path / "adapter.json"
    settings = json.loads(file.read_text())
    for name in sorted(settings["config"]):  # so that values of every field are replaced
        settings["config"].setdefault(name, None)

    @FUZZ
    @given(st.data(), st.booleans())
    def run(data, with_base):
        file.write_text(json.dumps(damaged(data, settings)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given_base = {"params": params, "model": model} if with_base else {}
            outcome(lambda: gl.load_adapter(path, **given_base), "adapter")

    run()
    whole = file.read_text()
    file.write_text(json.dumps(settings | {"base": settings["base"] | {"shapes": []}}))
    with pytest.raises(ValueError, match=r"adapter\.json"):
        gl.load_adapter(path, params)
    file.write_text(whole)
    for text in ("", "[]", "null", "3", "{", "[" * 100_000, "\udcff"):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises((ValueError, OSError), match=r"adapter\.json"):
            gl.load_adapter(path)


# Numbers that are not finite.


def rewrite(path, change):
    file = path / "adapter.safetensors"
    save_file(change(load_file(file)), file)


def run(capsys, *arguments):
    """The command's exit status, and what it printed on stdout and stderr."""
    capsys.readouterr()
    try:
        cli.main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as end:
        status = end.code
    return status or 0, *capsys.readouterr()


def test_an_adapter_that_is_not_finite_is_not_written(saved, tmp_path):
    _, model, _, path = saved
    _, adapter = gl.load_adapter(path)
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), adapter)
    with pytest.raises(FloatingPointError, match=r"out is not written: trainable/\S+ holds a NaN"):
        gl.save_adapter(tmp_path / "out", CFG, broken, model=model)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_named_and_nothing_is_written(saved, tmp_path, capsys, bad):
    base, _, params, path = saved
    original = load_file(path / "adapter.safetensors")
    name = sorted(original)[-1]
    broken = original[name].copy()
    broken.flat[-1] = bad
    rewrite(path, lambda arrays: arrays | {name: broken})
    with pytest.raises(ValueError, match=rf"tensor {name} holds a NaN or an infinity"):
        gl.load_adapter(path, params)
    out = tmp_path / "out"
    for arguments in (
        ("merge", "--base", base, "--adapter", path, "--out", out),
        ("export-peft", "--adapter", path, "--out", out),
        ("generate", "--model", base, "--prompt", "a", "--adapter", path),
        ("inspect", "--adapter", path),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 1
        assert f"tensor {name} holds a NaN or an infinity" in err
        assert err.count("\n") == 1
    assert {x.name for x in tmp_path.iterdir()} == {"base", "adapter"}
    rewrite(path, lambda _: original | {name: original[name].astype(np.int32)})
    with pytest.raises(ValueError, match=rf"tensor {name} is of dtype int32, no float"):
        gl.load_adapter(path, params)


def test_a_merge_that_leaves_the_range_of_its_dtype_is_named(saved, tmp_path, capsys):
    base, model, params, path = saved
    cfg, adapter = gl.load_adapter(path, params)
    large = jax.tree.map(lambda x: x * 1e3, adapter)
    gl.save_adapter(tmp_path / "large", cfg, large, model=model)
    arguments = ("merge", "--base", base, "--adapter", tmp_path / "large", "--out")
    status, _, err = run(capsys, *arguments, tmp_path / "out", "--dtype", "float16")
    assert status == 1
    assert "layers.0.mlp.down_proj.weight has values that float16 cannot hold" in err
    assert run(capsys, *arguments, tmp_path / "wide", "--dtype", "bfloat16")[0] == 0
    assert {x.name for x in tmp_path.iterdir()} == {"base", "adapter", "large", "wide"}


def test_factors_that_are_not_finite_are_not_exported(saved, tmp_path):
    base, _, params, path = saved
    factors = gl.generate_factors(*gl.load_adapter(path, params))
    factors["model"]["layers"]["mlp"]["down_proj"]["b"] *= jnp.nan
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.lora_B\.weight holds a NaN"):
        gl.export_peft(tmp_path / "out", None, factors, base=base)
    assert not (tmp_path / "out").exists()


NOT_FINITE = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e39, -1e39, 10**400])


@given(NOT_FINITE)
def test_settings_take_no_number_that_float32_does_not_hold(value):
    from dataclasses import fields

    from genlora_jax.data.config import DataConfig
    from genlora_jax.evaluation.tasks.task import AnswerConfig
    from genlora_jax.generation.decoding import check_sampling
    from genlora_jax.methods import METHODS
    from genlora_jax.training.optim import OptimConfig
    from genlora_jax.training.sweep.members import Member

    needed = {
        DataConfig: {"train": "x"},
        AnswerConfig: {"data": "x"},
        Member: {"learning_rate": 1.0, "generator_ratio": 1.0, "seed": 0},
    }
    for kind in (*METHODS.values(), OptimConfig, *needed):
        names = [f.name for f in fields(kind) if f.type in (float, float | None)]
        assert names
        for name in names:
            with pytest.raises(ValueError, match=name):
                kind(**needed.get(kind, {}) | {name: value})
    for sampling in ((8, value, 1.0), (8, 1.0, value)):
        with pytest.raises(ValueError, match=r"temperature|top_p"):
            check_sampling(*sampling)


# The commands.


@pytest.mark.parametrize("columns", ["80", "200"])
def test_inspect_is_read_in_80_columns(saved, tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    base, _, params, path = saved
    factors = gl.generate_factors(*gl.load_adapter(path, params))
    gl.export_peft(tmp_path / "peft", None, factors, base=base)
    tables = []
    for adapter in (path, tmp_path / "peft"):
        status, said, err = run(capsys, "inspect", "--adapter", adapter)
        assert status == 0, err
        lines = said.splitlines()
        assert max(map(len, lines)) <= int(columns)
        rows = {line.split()[0]: line.split()[1:] for line in lines if "_proj" in line}
        assert set(rows) == {"model.layers.self_attn.q_proj", "model.layers.mlp.down_proj"}
        tables.append({name: [*row[:4], *row[5:]] for name, row in rows.items()})
    assert tables[0] == tables[1]  # but for the parameters, which LoRA's factors have more of
    assert f"base {base}" in "".join(lines).replace("\n", "") or len(str(base)) > 60


def test_inspect_names_what_else_a_peft_adapter_holds(saved, tmp_path, capsys):
    _, _, params, path = saved
    factors = gl.generate_factors(*gl.load_adapter(path, params))
    gl.export_peft(tmp_path / "peft", None, factors, base="")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    whole = {"base_model.model.model.norm.weight": np.ones(24, np.float32)}
    save_file(load_file(file) | whole, file)
    assert "also model.norm.weight" in run(capsys, "inspect", "--adapter", tmp_path / "peft")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "-1"), "temperature must be a finite number >= 0"),
        (("--temperature", ".nan"), "temperature must be a finite number >= 0"),
        (("--temperature", ".inf"), "temperature must be a finite number >= 0"),
        (("--top_p", "0"), "top_p must lie above 0"),
        (("--top_p", ".nan"), "top_p must lie above 0"),
        (("--max_new_tokens", "0"), "max_new_tokens must be a whole number >= 1"),
        (("--seed", "-1"), "seed must be a whole number >= 0"),
    ],
)
def test_generate_refuses_options_before_it_loads(capsys, options, message):
    status, _, err = run(capsys, "generate", "--model", "none", "--prompt", "a", *options)
    assert status == 1
    assert message in err


@pytest.mark.parametrize("name", ["gpu:0x80", "gpu:8x0", "v5e:0x4", "gpu:999999x80", "v5e:4x4x4x4"])
def test_a_topology_without_chips_is_named(name):
    from genlora_jax.plan.chips import parse_topology

    with pytest.raises(ValueError, match=f"topology '{name}' is not known"):
        parse_topology(name)


@pytest.mark.parametrize("command", ["finetune", "sweep", "evaluate", "merge"])
def test_the_usage_names_the_subcommand(capsys, command):
    status, said, _ = run(capsys, command, "--help")
    assert status == 0
    assert said.splitlines()[0].startswith(f"usage: genlora {command} ") or (
        f"genlora [options] {command}" in said.splitlines()[0]
    )


def test_a_sweep_that_finds_its_output_advises_no_flag_that_it_lacks(tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    options = ("--model.path", "none", "--data.train", data, "--data.eval", data)
    status, _, err = run(capsys, "sweep", *options, "--train.output", tmp_path)
    assert status == 1
    assert err == f"error: {tmp_path} exists: choose another train.output\n"


def test_a_warning_is_one_line_without_the_code_that_gave_it(monkeypatch):
    from genlora_jax.settings import report_errors

    monkeypatch.setattr(warnings, "formatwarning", None)  # for the old one to come back
    with report_errors():
        assert warnings.formatwarning("of this", UserWarning, "a.py", 3) == "note: of this\n"
