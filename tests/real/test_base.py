"""The files of bases as people have them; the expected values are those of transformers.

Tensors, index and `config.json` are here, tokenizers and what an export carries in
`test_tokenizer.py`.
"""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_base import write_base
from tiny_models import TINY

import genlora_jax as gl
from genlora_jax.hf.checkpoint import Checkpoint, checkpoint_dtype, model_config
from genlora_jax.hf.families import parse_config
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.rope import rope_frequencies
from genlora_jax.validation import first_not_finite

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


def load(path, dtype="float32"):
    return gl.load_llama(path, dtype=dtype, param_dtype=dtype)


def edit_json(file, **changes):
    """Writes fields of a JSON file; those that are given as `...` are removed."""
    fields = json.loads(file.read_text()) if file.exists() else {}
    fields = {k: v for k, v in (fields | changes).items() if v is not ...}
    file.write_text(json.dumps(fields))


def edit_tensors(file, **changes):
    arrays = load_file(file) | {name.replace("__", "."): v for name, v in changes.items()}
    save_file({k: v for k, v in arrays.items() if v is not None}, file, metadata={"format": "pt"})


def theirs(path):
    """The model of transformers and the names of all its parameters that are not tied."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model, {name: p.detach().float().numpy() for name, p in model.named_parameters()}


def shard(path, *, unlisted=()):
    """Splits a base's file in two and writes the index; returns its weight map."""
    arrays = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names, weight_map = sorted(arrays), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: arrays[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part if name not in unlisted}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


# Rotary embeddings.

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 16}
ROPE = {
    "original positions beside the scaling": {"rope_scaling": LLAMA3} | ORIGINAL,
    "original positions in both places": ORIGINAL
    | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    "original positions nowhere": {"rope_scaling": LLAMA3},
    "rope_parameters": {"rope_parameters": LLAMA3 | ORIGINAL | {"rope_theta": 500.0}},
    "beside rope_parameters": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}} | ORIGINAL,
    "rope_scaling and rope_parameters": {
        "rope_scaling": LLAMA3 | ORIGINAL,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "two thetas": {
        "rope_theta": 300.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "type for rope_type": {
        "rope_scaling": LLAMA3 | ORIGINAL | {"rope_type": ..., "type": "llama3"}
    },
    "null": {"rope_scaling": None},
    "empty": {"rope_scaling": {}},
    "default with an empty factor": {"rope_scaling": {"rope_type": "default", "factor": None}},
    "linear by 1": {"rope_scaling": {"type": "linear", "factor": 1.0}},
    "llama3 by 1": {"rope_scaling": LLAMA3 | ORIGINAL | {"factor": 1.0}},
    "partial factor of a family without": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("fields", ROPE.values(), ids=ROPE)
def test_rotary_frequencies_are_those_of_transformers(base, fields):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for value in fields.values():
        if isinstance(value, dict) and value.get("rope_type") is ...:
            del value["rope_type"]
    edit_json(base / "config.json", **fields)
    expected = LlamaRotaryEmbedding(AutoConfig.from_pretrained(base))
    assert expected.attention_scaling == 1
    ours = np.asarray(rope_frequencies(model_config(base)))
    np.testing.assert_allclose(ours, expected.inv_freq.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        *({"quantization_config": None}, {"quantization_config": {}}, {"hidden_act": "swish"}),
        *({"head_dim": None}, {"sliding_window": None}, {"pretraining_tp": 1}),
    ],
)
def test_a_setting_that_is_present_but_off_is_off(base, fields):
    before = model_config(base)
    edit_json(base / "config.json", **fields)
    assert model_config(base) == before


# Index and files.


@pytest.fixture
def both(base):
    """A base whose single file is new and whose shards and index are stale."""
    stale = base.with_name("stale")
    shutil.copytree(base, stale)
    shard(stale)
    for file in [*stale.glob("model-*"), stale / INDEX]:
        shutil.move(file, base / file.name)
    edit_tensors(base / "model.safetensors", model__norm__weight=np.full(24, 2, np.float32))
    return base


def test_of_a_single_file_and_a_stale_index_the_file_is_read_and_that_is_said(both):
    with pytest.warns(UserWarning, match=r"model\.safetensors is read, as transformers does"):
        _, params = load(both)
    _, expected = theirs(both)
    np.testing.assert_array_equal(params["model"]["norm"]["scale"], expected["model.norm.weight"])


def test_an_index_of_the_single_file_is_no_second_source(base):
    names = load_file(base / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    load(base)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors", 7, None])
def test_an_index_does_not_lead_out_of_its_directory(base, name):
    weight_map = shard(base)
    shutil.copyfile(base / weight_map[EMBEDDING], base.parent / "outside.safetensors")
    edit_json(base / INDEX, weight_map=weight_map | {EMBEDDING: name})
    with pytest.raises(ValueError, match=rf"{INDEX}: {EMBEDDING} is in .* no file of the directo"):
        load(base)


def test_links_to_blobs_outside_are_followed_as_the_cache_of_the_hub_has_them(base):
    _, expected = load(base)
    shard(base)
    blobs = base.with_name("blobs")
    blobs.mkdir()
    for file in base.iterdir():
        file.rename(blobs / file.name)
        file.symlink_to(os.path.relpath(blobs / file.name, base))
    jax.tree.map(np.testing.assert_array_equal, load(base)[1], expected)


def test_a_tensor_that_no_index_names_is_read_from_its_shard(base):
    shard(base, unlisted=["model.norm.weight"])
    _, expected = theirs(base)
    _, params = load(base)
    np.testing.assert_array_equal(params["model"]["norm"]["scale"], expected["model.norm.weight"])


def test_a_tensor_that_an_index_names_and_no_shard_has_is_missed_if_the_model_needs_it(base):
    weight_map = shard(base)  # of a tied model: its head is in many an index, and in no shard
    edit_json(base / INDEX, weight_map=weight_map | {HEAD: weight_map[EMBEDDING]})
    assert HEAD not in theirs(base)[1]
    load(base)
    edit_tensors(base / weight_map["model.norm.weight"], model__norm__weight=None)
    with pytest.raises(ValueError, match=r"base: tensor model\.norm\.weight is missing"):
        load(base)
    edit_json(base / INDEX, weight_map={})
    with pytest.raises(ValueError, match=rf"{INDEX}: weight_map is missing, empty"):
        load(base)


def test_a_tensor_in_two_shards_must_be_the_same_in_both(base):
    weight_map = shard(base)
    first, second = (base / name for name in sorted(set(weight_map.values())))
    name, value = next(iter(load_file(first).items()))
    edit_tensors(second, **{name.replace(".", "__"): value})
    load(base)
    edit_tensors(second, **{name.replace(".", "__"): value + 1})
    with pytest.raises(ValueError, match=rf"tensor {name} differs in .*00001-of.* and .*00002-of"):
        load(base)


def test_shapes_of_all_tensors_are_checked_before_any_is_read(base, monkeypatch):
    last = "model.norm.weight"
    edit_tensors(base / "model.safetensors", **{last.replace(".", "__"): np.ones(23, np.float32)})
    monkeypatch.setattr(Checkpoint, "read", None)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor model\.norm\.weight has sha"):
        load(base)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_one(base, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (base / name).write_text(pointer)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.* run `git lfs pull` in"):
        load(base)


# config.json and tensors.


def own_head(base, value):
    edit_tensors(base / "model.safetensors", lm_head__weight=value)


def test_a_head_beside_a_tied_embedding_is_used_as_by_transformers_and_exported(base, tmp_path):
    embedding = load_file(base / "model.safetensors")[EMBEDDING]
    own_head(base, 2 * embedding)
    with pytest.warns(
        UserWarning, match=r"says tie_word_embeddings, but the files hold an lm_head"
    ):
        model, params = load(base)
    ids = np.array([[1, 5, 7, 9]])
    twin, expected = theirs(base)
    np.testing.assert_array_equal(params["lm_head"]["kernel"].T, expected[HEAD])
    import torch

    logits = twin(torch.tensor(ids)).logits.detach().numpy()
    ours = model.apply({"params": params}, jnp.asarray(ids))
    np.testing.assert_allclose(ours, logits, atol=1e-5 * np.abs(logits).max())
    gl.export_hf(tmp_path / "out", params, base=base)
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    np.testing.assert_array_equal(theirs(tmp_path / "out")[1][HEAD], expected[HEAD])


def test_a_head_that_is_the_embedding_once_more_stays_tied(base):
    own_head(base, load_file(base / "model.safetensors")[EMBEDDING])
    model, params = load(base)
    assert model.config.tie_word_embeddings
    assert "lm_head" not in params


def test_a_tied_model_stored_as_the_head_alone_is_read(base):
    value = load_file(base / "model.safetensors")[EMBEDDING]
    edit_tensors(
        base / "model.safetensors", lm_head__weight=value, model__embed_tokens__weight=None
    )
    np.testing.assert_array_equal(theirs(base)[1][EMBEDDING], value)
    np.testing.assert_array_equal(load(base)[1]["model"]["embed_tokens"]["embedding"], value)
    edit_json(base / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"tensor model\.embed_tokens\.weight is missing"):
        load(base)


@pytest.mark.parametrize("stated", [..., None, "bfloat16"])
def test_a_config_without_dtype_has_that_of_its_tensors(tmp_path, run_main, stated):
    from genlora_jax import cli

    base = write_base(tmp_path / "base", dtype="bfloat16")
    edit_json(base / "config.json", dtype=...)
    edit_json(base / "config.json", torch_dtype=stated)
    assert str(theirs(base)[0].dtype) == "torch.bfloat16"
    assert checkpoint_dtype(base) == "bfloat16"
    cfg = gl.LoRAConfig(rank=2)
    _, params = load(base, "bfloat16")
    gl.save_adapter(tmp_path / "adapter", cfg, gl.init_adapter(cfg, jax.random.key(0), params))
    given = ["--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out"]
    status, said, error = run_main(lambda: cli.main(["merge", *map(str, given)]))
    assert (status, error) == (0, "")
    assert said == f"merged model: {tmp_path / 'out'} (bfloat16)\n"
    merged, before = (load_file(p / "model.safetensors") for p in (tmp_path / "out", base))
    assert all(merged[name].tobytes() == value.tobytes() for name, value in before.items())


@pytest.mark.parametrize("stated", ["auto", "torch.bfloat16", "int8", 7])
def test_a_dtype_that_transformers_does_not_read_is_refused_with_the_way_out(base, stated):
    edit_json(base / "config.json", dtype=..., torch_dtype=stated)
    with pytest.raises(
        ValueError, match=rf"config\.json: torch_dtype {stated!r} is not read: writ"
    ):
        load(base)


# Values.


def test_the_first_array_that_is_not_finite_is_named():
    good = np.ones(3, np.float32)
    assert first_not_finite({"a": good, "b": [good.astype(jnp.bfloat16), np.arange(3)]}) is None
    for bad in (np.nan, np.inf, -np.inf):
        wrong = jnp.array([1, bad], jnp.bfloat16)
        assert first_not_finite({"a": good, "b": {"c": wrong}, "d": wrong}) == "b.c"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("host", [True, False])
def test_a_base_that_is_not_finite_is_refused_with_file_and_tensor(
    tmp_path, monkeypatch, bad, dtype, host
):
    monkeypatch.setattr("genlora_jax.hf.load.transposes_on_host", lambda: host)  # as on a GPU
    base, name = write_base(tmp_path / "base", dtype=dtype), "model.layers.1.mlp.up_proj.weight"
    value = load_file(base / "model.safetensors")[name].copy()
    value[-1, -1] = bad
    edit_tensors(base / "model.safetensors", **{name.replace(".", "__"): value})
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: tensor {name} holds a NaN or an in"
    ):
        load(base, dtype)


@pytest.mark.parametrize("host", [True, False])
def test_values_that_float16_cannot_hold_are_refused_and_named(base, tmp_path, monkeypatch, host):
    monkeypatch.setattr("genlora_jax.hf.load.transposes_on_host", lambda: host)  # as on a GPU
    name = "model.layers.1.mlp.up_proj.weight"
    value = load_file(base / "model.safetensors")[name].copy()
    value[0, 0] = 65504
    edit_tensors(base / "model.safetensors", **{name.replace(".", "__"): value})
    load(base, "float16")
    value[0, 0] = 7e4
    edit_tensors(base / "model.safetensors", **{name.replace(".", "__"): value})
    with pytest.raises(ValueError, match=rf"tensor {name} has values that float16 cannot hold"):
        load(base, "float16")
    _, params = load(base)
    with pytest.raises(ValueError, match=rf"tensor {name} has values that float16 cannot hold"):
        gl.export_hf(tmp_path / "out", params, base=base, dtype="float16")
    params["model"]["norm"]["scale"] = params["model"]["norm"]["scale"].at[3].set(jnp.nan)
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight holds a NaN or an infinity"):
        gl.export_hf(tmp_path / "out", params, base=base)
    assert not (tmp_path / "out").exists()


# Modes.


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_written_has_the_modes_of_the_umask(base, tmp_path, umask):
    _, params = load(base)
    cfg = gl.LoRAConfig(rank=2)
    adapter = gl.init_adapter(cfg, jax.random.key(0), params)
    before = os.umask(umask)
    try:
        gl.export_hf(tmp_path / "merged", params, base=base)
        gl.export_peft(tmp_path / "peft", cfg, gl.generate_factors(cfg, adapter), base=base)
        gl.save_adapter(tmp_path / "adapter", cfg, adapter)
    finally:
        os.umask(before)
    for name in ("merged", "peft", "adapter"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o777 & ~umask
        modes = {file.stat().st_mode & 0o777 for file in (tmp_path / name).iterdir()}
        assert modes == {0o666 & ~umask}


# Anything at all in the files.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 10**9, 10**30, 1e300, float("nan"), float("inf"), True])
FIELDS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_theta"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters"),
    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "dtype"),
    *("mlp_bias", "hidden_act", "model_type", "sliding_window", "layer_types", "eos_token_id"),
    *("use_sliding_window", "max_window_layers", "partial_rotary_factor", "quantization_config"),
]
FAMILY = st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2"])
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["llama3", "linear", "default", "yarn", "longrope"])},
    optional=dict.fromkeys([*list(LLAMA3)[1:], *ORIGINAL, "rope_theta"], NUMBERS | JSON),
)
quick = settings(
    max_examples=int(os.environ.get("GENLORA_FUZZ", 60)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def refusal(call):
    """What something is refused with; "" if it is not."""
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def names_one(message, *names):
    """Whether a refusal names one of these, in three lines at most."""
    short = len(message.splitlines()) <= 3 and len(message) < 2000
    return not message or (short and any(name in message for name in names))


@quick
@pytest.mark.filterwarnings("ignore")
@given(
    st.dictionaries(st.sampled_from(FIELDS), NUMBERS | JSON | ROPES, min_size=1, max_size=3), FAMILY
)
def test_any_config_loads_or_is_refused_by_name(tmp_path, fields, family):
    base = tmp_path / "base"
    if not base.exists():
        write_base(base)
        shutil.copyfile(base / "config.json", tmp_path / "config.json")
    shutil.copyfile(tmp_path / "config.json", base / "config.json")
    edit_json(base / "config.json", **{"model_type": family} | fields)
    assert names_one(refusal(lambda: load(base)), str(base))
    assert names_one(refusal(lambda: checkpoint_dtype(base)), "config.json")


@quick
@given(JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(st.text(), st.text())}))
def test_any_index_loads_or_is_refused_by_name(tmp_path, content):
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        Checkpoint(tmp_path)


@quick
@given(st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()), st.booleans())
def test_any_safetensors_header_is_refused_by_name(tmp_path, content, framed):
    head = len(content).to_bytes(8, "little") if framed else b""
    (tmp_path / "model.safetensors").write_bytes(head + content)
    assert names_one(refusal(lambda: Checkpoint(tmp_path)), "model.safetensors")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "7", "{", b"\xff\xfe{\x00"])
def test_a_config_that_is_no_json_object_is_refused_by_name(base, content):
    content = content if isinstance(content, bytes) else content.encode()
    (base / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        load(base)


@pytest.mark.parametrize("count", [10**30, 10**9, 60_000])
def test_more_layers_than_there_can_be_are_refused_at_once(base, count):
    edit_json(base / "config.json", model_type="qwen3", num_hidden_layers=count)
    with pytest.raises(ValueError, match=r"config\.json: num_hidden_layers (is|must be)"):
        load(base)


def test_the_config_that_is_given_is_left_as_it_was(base):
    data = json.loads((base / "config.json").read_text()) | {"rope_scaling": dict(LLAMA3)}
    before = json.dumps(data)
    parse_config(base / "config.json", data)
    assert json.dumps(data) == before


@pytest.mark.parametrize("eps", [float("nan"), 0.0, -1e-6, float("inf")])
def test_a_norm_without_a_usable_epsilon_is_refused(eps):
    with pytest.raises(ValueError, match="rms_norm_eps"):
        LlamaConfig(**(TINY | {"rms_norm_eps": eps}))
