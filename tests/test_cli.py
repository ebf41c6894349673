"""The `genlora` command."""

import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from tiny_base import write_base
from transformers import AutoTokenizer

import genlora_jax as gl
from genlora_jax import cli, settings
from genlora_jax.cli import main
from genlora_jax.settings import report_errors

CFG = gl.GenLoRAConfig(rank=3, alpha=6.0, group_size=4, kernels=2, targets=["q_proj", "down_proj"])
PROMPT = "Ann has 3 pies and"
# What each command needs, in the order in which these tests give it.
NEEDS = {
    "merge": ("base", "adapter", "out"),
    "export-peft": ("adapter", "out"),
    "inspect": ("adapter",),
    "generate": ("model", "prompt"),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Bases of both dtypes and an adapter for either; nothing in it is ever changed."""
    here = tmp_path_factory.mktemp("shop")
    init = jax.jit(gl.init_adapter, static_argnums=0)
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        base = write_base(here / dtype, dtype=dtype)
        model, params = gl.load_llama(base, dtype=dtype, param_dtype=dtype)
        adapter = jax.tree.map(
            lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32),
            init(CFG, jax.random.key(0), params),
        )
        gl.save_adapter(here / f"{dtype}-adapter", CFG, adapter, model=model)
    return here


@pytest.fixture
def genlora(capsys):
    """A function that runs the command: returns exit status, stdout and stderr."""

    def call(command, *values):
        capsys.readouterr()
        needs = NEEDS[command]
        named = [x for pair in zip(needs, values, strict=False) for x in (f"--{pair[0]}", pair[1])]
        try:
            main([str(argument) for argument in (command, *named, *values[len(needs) :])])
            status = 0
        except SystemExit as end:
            status = end.code
        return status or 0, *capsys.readouterr()

    return call


def tensors(file):
    with safetensors.safe_open(file, framework="numpy") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def deltas(adapter):
    """Name in the checkpoint -> the delta, float64, as PyTorch holds it."""
    cfg, loaded = gl.load_adapter(adapter)
    factors = gl.generate_factors(cfg, loaded)["model"]["layers"]
    found = {}
    for block, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        a, b = (np.asarray(factors[block][name][side], np.float64) for side in "ab")
        for layer in range(a.shape[0]):
            found[f"model.layers.{layer}.{block}.{name}.weight"] = (a[layer] @ b[layer]).T
    return found


def listing(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.*")}


# merge


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_has_the_dtype_of_its_base(shop, genlora, tmp_path, dtype):
    out = tmp_path / "merged"
    status, said, err = genlora("merge", shop / dtype, shop / f"{dtype}-adapter", out)
    assert status == 0, err
    assert str(out) in said
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    ours, theirs = tensors(out / "model.safetensors"), tensors(shop / dtype / "model.safetensors")
    assert ours.keys() == theirs.keys()
    changes = deltas(shop / f"{dtype}-adapter")
    assert len(changes) == 4
    for name, value in ours.items():
        assert value.dtype == jnp.dtype(dtype)
        if name not in changes:
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)
            continue
        expected = theirs[name].astype(np.float64) + changes[name]
        assert abs(changes[name]).max() > 0.05
        step = float(jnp.finfo(dtype).eps)  # half of it by rounding, the rest for float32 sums
        np.testing.assert_allclose(value.astype(np.float64), expected, rtol=0.6 * step, atol=1e-6)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (shop / dtype / name).read_bytes()


def test_a_float32_base_is_rounded_to_bfloat16_once(shop, genlora, tmp_path):
    base, adapter = shop / "float32", shop / "float32-adapter"
    assert genlora("merge", base, adapter, tmp_path / "wide")[0] == 0
    assert genlora("merge", base, adapter, tmp_path / "once", "--dtype", "bfloat16")[0] == 0
    wide, once = (tensors(tmp_path / n / "model.safetensors") for n in ("wide", "once"))
    twice_differs = False
    stored = tensors(base / "model.safetensors")
    for name, value in once.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, wide[name].astype(jnp.bfloat16), err_msg=name)
        if name in (changes := deltas(adapter)):
            early = stored[name].astype(jnp.bfloat16).astype(np.float64) + changes[name]
            twice_differs |= bool((early.astype(jnp.bfloat16) != value).any())
    assert twice_differs  # so rounding the base first would have been seen
    assert json.loads((tmp_path / "once" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_bfloat16_base_can_be_merged_without_rounding(shop, genlora, tmp_path):
    base, adapter = shop / "bfloat16", shop / "bfloat16-adapter"
    status, *_ = genlora("merge", base, adapter, tmp_path / "wide", "--dtype", "float32")
    assert status == 0
    wide, stored = (
        tensors(tmp_path / "wide" / "model.safetensors"),
        tensors(base / "model.safetensors"),
    )
    for name, change in deltas(adapter).items():
        assert wide[name].dtype == np.float32
        expected = stored[name].astype(np.float64) + change
        np.testing.assert_allclose(wide[name], expected, rtol=1e-6, atol=1e-6)


def commands(shop, out):
    """Each command that writes, with its arguments."""
    return {
        "merge": ["merge", shop / "float32", shop / "float32-adapter", out],
        "export-peft": ["export-peft", shop / "float32-adapter", out],
    }


@pytest.mark.parametrize("command", ["merge", "export-peft"])
def test_an_existing_target_is_refused_or_replaced_whole(shop, genlora, tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    arguments = commands(shop, out)[command]
    status, _, err = genlora(*arguments)
    assert status == 1
    assert str(out) in err
    assert err.count("\n") == 1
    assert listing(tmp_path) == {"out/precious.txt": b"keep me"}
    status, _, err = genlora(*arguments, "--overwrite")
    assert status == 1
    assert "nothing says that genlora wrote" in err
    assert listing(tmp_path) == {"out/precious.txt": b"keep me"}
    (out / "precious.txt").unlink()
    for _ in range(2):  # in place of an empty directory, and of its own
        status, _, err = genlora(*arguments, "--overwrite")
        assert status == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list(out.glob("*.safetensors"))


@pytest.mark.parametrize("command", ["merge", "export-peft", "inspect", "generate"])
def test_an_adapter_that_is_not_there_is_named(shop, genlora, tmp_path, command):
    missing, out = tmp_path / "missing", tmp_path / "out"
    arguments = {
        "merge": [shop / "float32", missing, out],
        "export-peft": [missing, out],
        "inspect": [missing],
        "generate": [shop / "float32", PROMPT, "--adapter", missing],
    }[command]
    status, _, err = genlora(command, *arguments)
    assert status == 1
    assert str(missing) in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change", [{"intermediate_size": 44}, {"rope_theta": 5e5}], ids=["shapes", "config"]
)
def test_another_base_is_refused(shop, genlora, tmp_path, change):
    other, adapter = write_base(tmp_path / "other", **change), shop / "float32-adapter"
    for arguments in (
        ["merge", other, adapter, tmp_path / "out"],
        ["generate", other, PROMPT, "--adapter", adapter],
    ):
        status, _, err = genlora(*arguments)
        assert status == 1
        assert f"{adapter} was made for another base" in err
        assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    "arguments", [["merge", "--dtype", "float12"], ["generate", "--dtype", "x"]]
)
def test_an_unknown_dtype_is_named(shop, genlora, tmp_path, arguments):
    command, *option = arguments
    place = [shop / "float32-adapter", tmp_path / "out"] if command == "merge" else [PROMPT]
    status, _, err = genlora(command, shop / "float32", *place, *option)
    assert status != 0
    assert option[1] in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# export-peft and inspect


def test_an_exported_adapter_has_the_same_deltas(shop, genlora, tmp_path):
    out = tmp_path / "peft"
    status, said, err = genlora("export-peft", shop / "float32-adapter", out, "--base", "some/base")
    assert status == 0, err
    assert str(out) in said
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["lora_alpha"] == config["r"] == 3
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    factors = tensors(out / "adapter_model.safetensors")
    expected = deltas(shop / "float32-adapter")
    assert len(factors) == 2 * len(expected)
    for name, delta in expected.items():
        prefix = "base_model.model." + name.removesuffix(".weight")
        product = factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
        np.testing.assert_allclose(product, delta, rtol=1e-4, atol=1e-5)


def test_inspect_shows_targets_and_their_cost(shop, genlora, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, said, err = genlora("inspect", shop / "float32-adapter")
    assert status == 0, err
    _, adapter = gl.load_adapter(shop / "float32-adapter")
    lora = 2 * 3 * ((24 + 24) + (40 + 24))
    assert "model.layers.self_attn.q_proj" in said
    assert "24 x 24" in said
    assert "40 x 24" in said
    assert f"{gl.count_parameters(adapter):,} parameters" in said
    assert f"LoRA of this rank has {lora:,}" in said
    rows = [line for line in said.splitlines() if "_proj" in line]
    assert len(rows) == 2
    for row in rows:
        above, effective = (float(number) for number in re.findall(r"\d+\.\d+", row)[-2:])
        assert 1.0 <= effective <= above <= 3.0


# generate


@pytest.fixture(scope="module")
def continuation(shop):
    """The greedy continuation, token by token through the whole model each time."""
    base = shop / "float32"
    model, params = gl.load_llama(base, dtype="float32", param_dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(base)
    _, adapter = gl.load_adapter(shop / "float32-adapter", params, model=model)
    width = 40
    forward = jax.jit(lambda factors, ids: gl.apply(model, params, factors, ids))

    def text(factors, count=6):
        ids = tokenizer(PROMPT)["input_ids"]
        new = []
        for _ in range(count):
            known = [*ids, *new]
            padded = jnp.array([known + [0] * (width - len(known))])
            token = int(forward(factors, padded)[0, len(known) - 1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
        return PROMPT + tokenizer.decode(new)

    return {"base": text({}), "adapted": text(gl.generate_factors(CFG, adapter))}


def test_the_text_is_the_greedy_continuation(shop, genlora, tmp_path, continuation):
    assert continuation["base"] != continuation["adapted"]
    options = ["--max_new_tokens", 6, "--dtype", "float32"]
    base, adapter = shop / "float32", shop / "float32-adapter"
    status, said, err = genlora("generate", base, PROMPT, *options)
    assert (status, said) == (0, continuation["base"] + "\n"), err
    status, said, err = genlora("generate", base, PROMPT, "--adapter", adapter, *options)
    assert (status, said) == (0, continuation["adapted"] + "\n"), err
    assert genlora("merge", base, adapter, tmp_path / "merged")[0] == 0
    status, said, err = genlora("generate", tmp_path / "merged", PROMPT, *options)
    assert (status, said) == (0, continuation["adapted"] + "\n"), err


def test_a_sample_follows_its_seed(shop, genlora):
    options = ["--max_new_tokens", 6, "--temperature", 1.5, "--dtype", "float32"]
    texts = [
        genlora("generate", shop / "float32", PROMPT, "--seed", seed, *options)[1]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(PROMPT) for text in texts)


def test_a_message_is_asked_in_the_chat_template(shop, genlora, tmp_path):
    base, options = tmp_path / "base", ["--max_new_tokens", 6, "--dtype", "float32"]
    shutil.copytree(shop / "float32", base)
    status, _, err = genlora("generate", base, PROMPT, "--chat", "true", *options)
    assert status == 1
    assert "the tokenizer has no chat template" in err
    (base / "chat_template.jinja").write_text("<<{{ messages[0].content }}>>")
    status, said, err = genlora("generate", base, PROMPT, "--chat", "true", *options)
    assert status == 0, err
    assert genlora("generate", base, f"<<{PROMPT}>>", *options)[1] == f"<<{PROMPT}>>{said}"


def test_an_answer_of_nothing_is_said(shop, genlora, monkeypatch):
    monkeypatch.setattr("genlora_jax.cli.answers", lambda *args, **options: [[""]])
    options = ["--max_new_tokens", 6, "--dtype", "float32"]
    status, said, err = genlora("generate", shop / "float32", PROMPT, *options)
    assert (status, said.strip(), err) == (0, PROMPT, "note: the model ended at once\n")


@pytest.mark.shared
def test_no_space_is_lost_between_prompt_and_text(shared, genlora):
    prompt, base = "Once upon a time, there was a", shared / "models" / "stories260k"
    options = ["--max_new_tokens", 12, "--dtype", "float32"]
    status, said, err = genlora("generate", base, prompt, *options)
    assert status == 0, err
    assert said.startswith(f"{prompt} little girl")


def test_a_full_device_is_a_line_that_says_what_saves_memory(capsys):
    def fail(said):
        with report_errors():
            raise jax.errors.JaxRuntimeError(said)

    with pytest.raises(SystemExit, match="1"):
        fail("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\n\tfull")
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.remat full" in line
    assert line.endswith("allocate 9 bytes. full")
    for said in ("INTERNAL: none", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"):
        with pytest.raises(jax.errors.JaxRuntimeError, match=said):
            fail(said)


def test_more_tokens_than_positions_are_refused(shop, genlora):
    status, _, err = genlora("generate", shop / "float32", PROMPT, "--max_new_tokens", 64)
    assert status == 1
    assert "64 positions" in err
    assert err.count("\n") == 1


def test_a_peft_adapter_is_merged_like_ours(shop, genlora, tmp_path):
    base, adapter = shop / "float32", shop / "float32-adapter"
    assert genlora("export-peft", adapter, tmp_path / "peft")[0] == 0
    assert genlora("merge", base, adapter, tmp_path / "ours")[0] == 0
    assert genlora("merge", base, tmp_path / "peft", tmp_path / "theirs")[0] == 0
    ours, theirs = (
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
        for name in ("ours", "theirs")
    )
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, atol=1e-6 * np.abs(value).max())


@pytest.mark.parametrize("command", ["merge", "export-peft"])
def test_a_target_that_cannot_be_written_is_refused_before_the_work(
    shop, genlora, tmp_path, monkeypatch, command
):
    for module, name in ((gl.merge_files, "load_llama"), (gl.cli, "load_adapter")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").write_text("no directory")
    arguments = [shop / "float32", shop / "float32-adapter", tmp_path / "file" / "out"]
    status, _, err = genlora(command, *(arguments if command == "merge" else arguments[1:]))
    assert status == 1
    assert f"cannot write to {tmp_path / 'file'}" in err


def test_the_shop_is_as_it_was(shop, genlora, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(shop / "float32", copy)
    before = listing(copy)
    assert genlora("merge", copy, shop / "float32-adapter", tmp_path / "out")[0] == 0
    assert listing(copy) == before


def test_a_command_says_which_extra_it_lacks(tmp_path, monkeypatch):
    (tmp_path / "takes_the_extra.py").write_text("import a_library_of_the_extra\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.RECIPES, "sweep", "takes_the_extra")
    message = r"^error: sweep needs a_library_of_the_extra: pip install \"genlora_jax\[train\]\"$"
    with pytest.raises(SystemExit, match=message):
        cli.main(["sweep", "--help"])


def test_without_a_command_the_commands_are_named_and_help_says_what_they_do(run_main):
    status, _, err = run_main(cli.main)
    assert status == 1
    assert len(err.splitlines()) == 1
    assert all(name in err for name in (*cli.RECIPES, *cli.COMMANDS))
    status, out, _ = run_main(cli.main, "--help")
    assert status == 0
    shown = " ".join(out.split())
    for function in cli.COMMANDS.values():
        assert function.__doc__.splitlines()[0] in shown


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_compilations_are_kept_unless_jax_keeps_them_elsewhere(given, monkeypatch, tmp_path):
    changes = {}
    config = SimpleNamespace(jax_compilation_cache_dir=given, update=changes.__setitem__)
    monkeypatch.setattr(settings, "jax", SimpleNamespace(config=config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings.keep_compilations()
    kept = changes.get("jax_compilation_cache_dir", given)
    assert kept == (given or str(tmp_path / "genlora_jax"))
    everything = changes.get("jax_persistent_cache_min_compile_time_secs") == 0.0
    assert everything == (given is None)  # as the user's own settings say, in a place of theirs
