"""Hugging Face in and out, PEFT out, adapters on disk."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny_models import perturb, random_llama, torch_logits

import genlora_jax as gl
from genlora_jax.atomic_files import new_directory
from genlora_jax.hf import peft_export
from genlora_jax.hf.base_model import ModelConfig

CFG = gl.GenLoRAConfig(rank=4, alpha=4.0, group_size=4, kernels=2, rbf_init=0.5)
IDS = np.random.default_rng(0).integers(3, 61, (2, 11)).astype(np.int32)


def load(path, dtype=jnp.float32, **options):
    return gl.load_llama(path, dtype=dtype, param_dtype=dtype, **options)


def run(model, params, factors=None):
    return np.asarray(jax.jit(lambda p, f: gl.apply(model, p, f, IDS))(params, factors or {}))


def tensors(path):
    """All tensors of a checkpoint, whatever its shards."""
    files = [load_file(file) for file in sorted(path.glob("model*.safetensors"))]
    assert files
    return {name: value for file in files for name, value in file.items()}


@pytest.fixture
def make_adapter():
    """A function that gives an adapter whose delta is not zero."""

    def make(params, cfg=CFG):
        adapter = jax.jit(lambda key: gl.init_adapter(cfg, key, params))(jax.random.key(1))
        return perturb(adapter, size=0.1)

    return make


def generate(cfg, adapter):
    return jax.jit(gl.generate_factors, static_argnums=0)(cfg, adapter)


# Loading.


def test_one_file_and_shards_load_alike(torch_twin):
    one, _ = torch_twin("one")
    many, _ = torch_twin("many", max_shard_size="20KB")
    assert (one / "model.safetensors").is_file()
    assert len(list(many.glob("model-*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, load(one)[1], load(many)[1])


def edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path, edit):
    arrays = load_file(path / "model.safetensors")
    edit(arrays)
    save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"config\.json: model_type 'mamba' is not supported"),
        ({"quantization_config": {"bits": 4}}, r"config\.json: quantized"),
        ({"hidden_act": "gelu"}, r"config\.json: hidden_act 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            r"config\.json: rope scaling 'yarn'",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}},
            r"config\.json: field 'low_freq_factor' is missing",
        ),
        ({"num_key_value_heads": 3}, r"config\.json: num_attention_heads"),
    ],
)
def test_a_config_that_is_not_supported_raises_and_names_the_field(torch_twin, changes, message):
    path, _ = torch_twin()
    edit_config(path, **changes)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_damaged_tensors_raise_and_are_named(torch_twin):
    path, _ = torch_twin()
    name = "model.layers.1.mlp.up_proj.weight"
    whole = load_file(path / "model.safetensors")
    edit_tensors(path, lambda arrays: arrays.pop(name))
    with pytest.raises(ValueError, match=f"tensor {name} is missing"):
        load(path)
    edit_tensors(path, lambda arrays: arrays.update({name: whole[name][:-1]}))
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \(47, 32\), not \(48, 32\)"):
        load(path)
    edit_tensors(
        path, lambda arrays: arrays.update({name: whole[name], "extra.weight": whole[name]})
    )
    with pytest.raises(ValueError, match=r"tensor extra\.weight has no place"):
        load(path)


def test_missing_and_truncated_files_raise_and_are_named(torch_twin, tmp_path):
    path, _ = torch_twin(max_shard_size="20KB")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged or truncated"):
        load(path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the shard {shard.name}"):
        load(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither model"):
        load(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


# Export.


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
@pytest.mark.parametrize("scan", [True, False])
def test_what_was_loaded_is_exported_byte_for_byte(torch_twin, tmp_path, scan, changes):
    path, _ = torch_twin(**changes)
    _, params = load(path, scan=scan)
    gl.export_hf(tmp_path / "out", params, base=path)
    before, after = tensors(path), tensors(tmp_path / "out")
    assert set(before) == set(after)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert after[name].tobytes() == value.tobytes()
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported == json.loads((path / "config.json").read_text())


def test_a_sharded_export_of_a_merged_model_loads_in_transformers(
    torch_twin, make_adapter, tmp_path
):
    import transformers

    path, _ = torch_twin()
    model, params = load(path)
    factors = generate(CFG, make_adapter(params))
    out = tmp_path / "deep" / "out"
    gl.export_hf(out, gl.merge(params, factors), base=path, max_shard_bytes=20_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    twin = transformers.LlamaForCausalLM.from_pretrained(out).eval()
    ours = run(model, params, factors)
    assert np.abs(torch_logits(twin, IDS) - ours).max() <= 2e-4
    assert np.abs(run(model, params) - ours).max() > 1e-2


def test_a_bfloat16_export_says_so_and_is_rounded_once(torch_twin, tmp_path):
    import transformers

    path, _ = torch_twin()
    _, params = load(path)
    gl.export_hf(tmp_path / "out", params, base=path, dtype=jnp.bfloat16)
    before, after = tensors(path), tensors(tmp_path / "out")
    for name, value in before.items():
        assert after[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(after[name], value.astype(jnp.bfloat16))
    twin = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert str(twin.dtype) == "torch.bfloat16"


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_an_existing_directory_is_refused_untouched_or_replaced_on_request(torch_twin, tmp_path):
    path, _ = torch_twin()
    _, params = load(path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists"):
        gl.export_hf(out, params, base=path)
    assert content(out) == {"precious.txt": b"mine"}
    with pytest.raises(FileExistsError, match=r"nothing says that genlora wrote .*precious\.txt"):
        gl.export_hf(out, params, base=path, overwrite=True)
    assert content(out) == {"precious.txt": b"mine"}
    (out / "precious.txt").unlink()
    for _ in range(2):  # in place of an empty directory, and of its own
        gl.export_hf(out, params, base=path, overwrite=True)
    assert {"config.json", "model.safetensors"} <= set(content(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_midway_leaves_nothing_and_spoils_nothing(
    torch_twin, tmp_path, monkeypatch, exists
):
    path, _ = torch_twin()
    _, params = load(path)
    calls = []

    pwrite = os.pwrite

    def full(file, data, start):
        calls.append(file)
        if len(calls) > 20:  # the disk is full, for all threads
            raise OSError("No space left on device")
        return pwrite(file, data, start)

    monkeypatch.setattr(os, "pwrite", full)
    if exists:
        with new_directory(tmp_path / "out") as out:
            (out / "precious.txt").write_text("written before")
        before = content(tmp_path / "out")
    with pytest.raises(OSError, match="No space"):
        gl.export_hf(tmp_path / "out", params, base=path, max_shard_bytes=20_000, overwrite=exists)
    assert len(calls) > 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", *(["out"] if exists else [])]
    if exists:
        assert content(tmp_path / "out") == before


def test_parameters_of_another_shape_are_not_exported(torch_twin, tmp_path):
    path, _ = torch_twin()
    _, params = random_llama(vocab_size=60)
    with pytest.raises(ValueError, match=r"lm_head\.kernel has shape \(32, 60\)"):
        gl.export_hf(tmp_path / "out", params, base=path)
    assert not (tmp_path / "out").exists()


# PEFT.


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("changes", "scan"),
    [
        ({}, True),
        ({"layers": [1]}, True),
        ({"layers": [0, 2], "targets": ["q_proj", "down_proj"]}, False),
        ({"scaling": "rslora", "alpha": 3.0, "dropout": 0.1}, False),
    ],
)
def test_a_peft_export_loads_in_peft_with_the_same_logits(
    torch_twin, make_adapter, tmp_path, changes, scan
):
    from peft import PeftModel

    path, twin = torch_twin()
    model, params = load(path, scan=scan)
    cfg = dataclasses.replace(CFG, **changes)
    factors = generate(cfg, make_adapter(params, cfg))
    gl.export_peft(tmp_path / "peft", cfg, factors, base=path)
    # PEFT warns of adapters that it would make and finds no tensors for: warnings are errors.
    adapted = PeftModel.from_pretrained(twin, tmp_path / "peft").eval()
    ours = run(model, params, factors)
    assert np.abs(ours - run(model, params)).max() > 1e-2
    assert np.abs(torch_logits(adapted, IDS) - ours).max() <= 2e-4
    made = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert made == {name.split(".lora_A")[0] for name in stored if "lora_A" in name}


def test_a_peft_export_that_fails_leaves_nothing(torch_twin, make_adapter, tmp_path, monkeypatch):
    path, _ = torch_twin()
    _, params = load(path)
    factors = generate(CFG, make_adapter(params))

    def full(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(peft_export, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        gl.export_peft(tmp_path / "peft", None, factors, base=path)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


# Adapters on disk.


@pytest.mark.parametrize(
    "cfg",
    [
        CFG,
        dataclasses.replace(CFG, layers=[1], generator="elementwise", targets=["q_proj"]),
        gl.LoRAConfig(rank=3),
    ],
)
def test_an_adapter_comes_back_bit_for_bit(make_adapter, tmp_path, cfg):
    model, params = random_llama()
    adapter = make_adapter(params, cfg)
    gl.save_adapter(tmp_path / "adapter", cfg, adapter, model=model)
    for options in ({}, {"params": params, "model": model}):
        found, loaded = gl.load_adapter(tmp_path / "adapter", **options)
        assert found == loaded.config == cfg
        assert loaded.spec == adapter.spec
        assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
        for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapter), strict=True):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_what_is_rebuilt_from_the_seed_is_not_in_the_file(make_adapter, tmp_path):
    _, params = random_llama()
    cfg = dataclasses.replace(CFG, latents="seeded", trainable_centers=False)
    adapter = make_adapter(params, cfg)
    gl.save_adapter(tmp_path / "adapter", cfg, adapter)
    stored = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert sum(value.size for value in stored.values()) == gl.count_parameters(adapter)
    assert {name.split("/")[1] for name in stored} == {"generators"}
    assert {name.rsplit("/", 1)[1] for name in stored} == {"weights", "residual"}
    loaded = generate(*gl.load_adapter(tmp_path / "adapter", params))
    jax.tree.map(np.testing.assert_array_equal, loaded, generate(cfg, adapter))


@pytest.mark.parametrize(
    ("given", "cpu", "gpu"),
    [
        ({}, ("float32", "float32"), ("bfloat16", "bfloat16")),
        ({"dtype": "bfloat16"}, ("bfloat16", "bfloat16"), ("bfloat16", "bfloat16")),
        ({"dtype": "float32"}, ("float32", "float32"), ("float32", "bfloat16")),
        ({"param_dtype": "bfloat16"}, ("float32", "bfloat16"), ("bfloat16", "bfloat16")),
        ({"param_dtype": "float32"}, ("float32", "float32"), ("bfloat16", "float32")),
    ],
)
def test_dtypes_that_are_not_given_are_chosen_by_the_device(given, cpu, gpu):
    config = ModelConfig(path="base", **given)
    assert config.dtypes("cpu") == cpu
    assert config.dtypes("gpu") == config.dtypes("tpu") == gpu


@pytest.mark.parametrize("remat", ["auto", "ful"])
def test_a_loader_that_cannot_choose_refuses_what_is_no_policy(remat):
    with pytest.raises(ValueError, match=rf"remat must be one of .*'full'.*, got '{remat}'"):
        gl.load_llama("nowhere", remat=remat)


@pytest.mark.parametrize(
    ("given", "on_gpus"),
    [
        ({}, False),
        ({"base_dtype": "fp8"}, False),
        ({"base_dtype": "nf4"}, True),
        ({"base_dtype": "int8", "scan": False}, False),
        ({"scan": True}, True),
    ],
)
def test_layers_are_unrolled_on_gpus_unless_their_kernels_are_dequantised(given, on_gpus):
    config = ModelConfig(path="base", **given)
    assert config.scans("gpu") == on_gpus
    assert config.scans("cpu") == config.scans("tpu") == given.get("scan", True)


def test_an_adapter_of_a_scanned_base_serves_an_unrolled_one(make_adapter, tmp_path):
    cfg = dataclasses.replace(CFG, layers=[0, 2])
    (scanned, stacked), (unrolled, single) = random_llama(scan=True), random_llama(scan=False)
    adapter = make_adapter(stacked, cfg)
    gl.save_adapter(tmp_path / "adapter", cfg, adapter, model=scanned)
    _, loaded = gl.load_adapter(tmp_path / "adapter", single, model=unrolled)
    ours = run(unrolled, single, generate(cfg, loaded))
    theirs = run(scanned, stacked, generate(cfg, adapter))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(run(unrolled, single) - ours).max() > 1e-2


def test_another_base_is_refused(make_adapter, tmp_path):
    model, params = random_llama()
    gl.save_adapter(tmp_path / "adapter", CFG, make_adapter(params), model=model)
    other_model, other = random_llama(vocab_size=62)
    with pytest.raises(ValueError, match="another base: its names or shapes differ"):
        gl.load_adapter(tmp_path / "adapter", other)
    other_model, other = random_llama(rope_theta=500.0)
    with pytest.raises(ValueError, match=r"another base: .*config\.json"):
        gl.load_adapter(tmp_path / "adapter", other, model=other_model)


def test_a_damaged_adapter_raises_and_names_the_file(make_adapter, tmp_path):
    _, params = random_llama()
    path = tmp_path / "adapter"
    gl.save_adapter(path, CFG, make_adapter(params))
    whole, settings = (path / "adapter.safetensors", path / "adapter.json")
    content, text = whole.read_bytes(), settings.read_text()
    whole.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"adapter\.safetensors is damaged"):
        gl.load_adapter(path)
    whole.write_bytes(content)
    settings.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"adapter\.json: "):
        gl.load_adapter(path)
    settings.write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(ValueError, match=r"adapter\.json: its format is 99"):
        gl.load_adapter(path)
    settings.write_text(text)
    arrays = load_file(whole)
    save_file({name: arrays[name] for name in sorted(arrays)[1:]}, whole)
    with pytest.raises(ValueError, match=f"tensor {sorted(arrays)[0]} is missing"):
        gl.load_adapter(path)
    whole.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.safetensors is missing"):
        gl.load_adapter(path)
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match=r"adapter\.json is missing"):
        gl.load_adapter(path)


def test_saving_over_an_adapter_is_refused_unless_asked_for(make_adapter, tmp_path):
    _, params = random_llama()
    adapter = make_adapter(params)
    gl.save_adapter(tmp_path / "adapter", CFG, adapter)
    with pytest.raises(FileExistsError, match="adapter exists"):
        gl.save_adapter(tmp_path / "adapter", CFG, adapter)
    moved = jax.tree.map(lambda leaf: leaf + 1, adapter)
    gl.save_adapter(tmp_path / "adapter", CFG, moved, overwrite=True)
    _, loaded = gl.load_adapter(tmp_path / "adapter")
    first, second = (flatten_dict(a.trainable) for a in (loaded, moved))
    assert set(first) == set(second)
    for path in first:
        np.testing.assert_array_equal(first[path], second[path])


def test_a_rank_that_vllm_does_not_serve_is_warned_of(tmp_path):
    zeros = {"proj": {"a": jnp.zeros((4, 513)), "b": jnp.zeros((513, 4))}}
    with pytest.warns(UserWarning, match="rank 513 exceeds 512, the largest that vLLM serves"):
        gl.export_peft(tmp_path / "out", None, zeros, base="base")


def test_a_hub_id_is_taken_from_the_cache(torch_twin, tmp_path, monkeypatch):
    # As the hub's client leaves a download; it is offline here and must find it.
    path, _ = torch_twin()
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (cached / "refs" / revision).write_text(commit)
        shutil.copytree(path, cached / "snapshots" / commit)
    config = cached / "snapshots" / ("b" * 40) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, params = load("someone/tiny")
    assert model.config.rms_norm_eps != 0.5
    assert load("someone/tiny", revision="v2")[0].config.rms_norm_eps == 0.5
    for found, expected in zip(
        jax.tree.leaves(params), jax.tree.leaves(load(path)[1]), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(FileNotFoundError, match="someone/other is no local directory"):
        load("someone/other")
