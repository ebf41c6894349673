"""PEFT's adapters as people have them; the expected values are those of peft itself."""

import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import torch_logits

import genlora_jax as gl
from genlora_jax.cli import main
from genlora_jax.hf.peft_import import load_onto
from genlora_jax.hf.peft_settings import HARMLESS, READ, read_settings

IDS = np.random.default_rng(0).integers(3, 61, (2, 11)).astype(np.int32)
Q = {"target_modules": ["q_proj"]}
# Of peft itself, which the tests call.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]


def load(path, **options):
    return gl.load_llama(path, dtype=jnp.float32, param_dtype=jnp.float32, **options)


def logits(model, params, factors):
    return np.asarray(jax.jit(lambda p, f: gl.apply(model, p, f, IDS))(params, factors))


@pytest.fixture
def make_peft(torch_twin, tmp_path):
    """A function that saves a base and an adapter of it; returns the base's directory, the
    adapter's, and the logits of what peft loads from them."""
    import torch
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    def make(settings=Q, *, save_embedding_layers="auto", **changes):
        base, twin = torch_twin(**changes)
        torch.manual_seed(0)
        config = LoraConfig(**({"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM"} | settings))
        model = get_peft_model(twin, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" not in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        out = tmp_path / "adapter"
        model.save_pretrained(out, save_embedding_layers=save_embedding_layers)
        return base, out

    def expected(base, out):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fresh = transformers.AutoModelForCausalLM.from_pretrained(base)
            return torch_logits(PeftModel.from_pretrained(fresh, out).eval(), IDS)

    make.logits = expected
    return make


def edit(directory, **changes):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(directory, change):
    """Passes an adapter's tensors through a function."""
    file = directory / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def compare(make_peft, base, adapter, *, changes_base=None):
    """Our logits against peft's; with `changes_base`, the base's tensors that are to be named."""
    model, params = load(base)
    before = logits(model, params, {})
    theirs = make_peft.logits(base, adapter)
    if changes_base:
        with pytest.warns(UserWarning, match=rf"changes the base.s .*{changes_base}"):
            model, params, factors = gl.load_peft(adapter, model, params)
        with pytest.raises(ValueError, match=rf"{changes_base}.* beside its factors"):
            gl.import_peft(adapter, load(base)[1])
    else:
        factors = gl.import_peft(adapter, params)
    ours = logits(model, params, factors)
    assert np.abs(ours - before).max() > 1e-2
    assert np.abs(ours - theirs).max() <= 2e-4
    merged = logits(model, gl.merge(params, factors), {})
    assert np.abs(merged - theirs).max() <= 2e-4


# What peft writes into the adapter beside the factors.

WHOLE = {
    "head_of_a_target": ({"target_modules": ["lm_head", "q_proj"]}, {}, None),
    "embedding_of_a_target": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {},
        "model.embed_tokens.weight",
    ),
    "modules_to_save": (
        Q | {"modules_to_save": ["embed_tokens", "lm_head"]},
        {},
        "lm_head.weight, model.embed_tokens.weight",
    ),
    "norms": (
        Q | {"modules_to_save": ["input_layernorm", "model.norm"]},
        {},
        r"model.layers.0.input_layernorm.weight.* and 1 more",
    ),
    "a_kernel": (Q | {"modules_to_save": ["down_proj"]}, {}, "model.layers.0.mlp.down_proj.weight"),
    "tied_together": (
        Q | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"tie_word_embeddings": True},
        "model.embed_tokens.weight",
    ),
    "tokens": (Q | {"trainable_token_indices": [3, 5]}, {}, "model.embed_tokens.weight"),
    "tokens_tied": (
        Q | {"trainable_token_indices": [3, 5]},
        {"tie_word_embeddings": True},
        "model.embed_tokens.weight",
    ),
    "tokens_of_both": (
        Q | {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
        {},
        "lm_head.weight, model.embed_tokens.weight",
    ),
    "biases": (
        Q | {"bias": "all"},
        {"family": "qwen2"},
        r"model.layers.0.self_attn.k_proj.bias.* and 6 more",
    ),
    "biases_of_targets": (
        Q | {"bias": "lora_only"},
        {"family": "qwen2"},
        r"model.layers.0.self_attn.q_proj.bias",
    ),
    "biases_of_lora": (
        Q | {"lora_bias": True},
        {"family": "qwen2"},
        r"model.layers.0.self_attn.q_proj.bias",
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_an_adapter_changes_in_the_base_is_taken_over(case, make_peft):
    settings, changes, named = WHOLE[case]
    base, adapter = make_peft(settings, **changes)
    compare(make_peft, base, adapter, changes_base=named)


UNTIES = {
    "head_of_a_target": {"target_modules": ["lm_head", "q_proj"]},
    "embedding_of_a_target": {"target_modules": ["embed_tokens", "q_proj"]},
    "adapted_together": {
        "target_modules": ["embed_tokens", "q_proj"],
        "ensure_weight_tying": True,
    },
    "embedding_alone": Q | {"modules_to_save": ["embed_tokens"]},
    "head_alone": Q | {"modules_to_save": ["lm_head"]},
    "both_and_different": Q | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens_of_the_head": Q | {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
}


@pytest.mark.parametrize("case", UNTIES)
@pytest.mark.filterwarnings("ignore:Model (has|with).*tie_word_embeddings:UserWarning")
def test_an_adapter_may_part_a_tied_head_from_its_embedding(case, make_peft):
    base, adapter = make_peft(UNTIES[case], tie_word_embeddings=True)
    compare(make_peft, base, adapter, changes_base="lm_head")


@pytest.mark.filterwarnings("ignore:Model (has|with).*tie_word_embeddings:UserWarning")
def test_a_head_that_was_tied_is_in_the_merged_model(make_peft, tmp_path):
    import transformers

    base, adapter = make_peft(UNTIES["head_alone"], tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="lm_head, which was tied to the embedding"):
        main(["merge", "--base", str(base), "--adapter", str(adapter), "--out", f"{tmp_path}/out"])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not merged.config.tie_word_embeddings
    assert np.abs(torch_logits(merged, IDS) - make_peft.logits(base, adapter)).max() <= 2e-4


def test_whole_embeddings_that_are_the_base_s_own_change_nothing(make_peft):
    for tied in (False, True):
        base, adapter = make_peft(save_embedding_layers=True, tie_word_embeddings=tied)
        names = {
            name
            for name in load_file(adapter / "adapter_model.safetensors")
            if ".layers" not in name
        }
        assert len(names) == 2
        compare(make_peft, base, adapter)


def test_whole_embeddings_of_a_resized_vocabulary_are_refused(make_peft, tmp_path):
    base, adapter = make_peft(save_embedding_layers=True)

    def pad(arrays):
        return {
            n: np.pad(v, ((0, 3), (0, 0))) if "layers" not in n else v for n, v in arrays.items()
        }

    rewrite(adapter, pad)
    with pytest.raises(ValueError, match=r"has shape \(64, 32\); the base's has \(61, 32\)"):
        gl.load_peft(adapter, *load(base))


# Names of tensors.


def test_names_of_tensors_as_other_savers_write_them(make_peft):
    base, adapter = make_peft({"target_modules": ["q_proj", "lm_head"]})
    params = load(base)[1]
    expected = gl.import_peft(adapter, params)
    original = load_file(adapter / "adapter_model.safetensors")

    for adapter_name in ("default", "my_run"):
        named = {
            re.sub(r"lora_(.)\.", rf"lora_\1.{adapter_name}.", name): value
            for name, value in original.items()
        }
        assert named.keys() != original.keys()
        rewrite(adapter, lambda _, named=named: named)
        jax.tree.map(np.testing.assert_array_equal, gl.import_peft(adapter, params), expected)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    for extra, message in (
        ({f"{first}.default.weight": original[f"{first}.weight"]}, "are the same part of"),
        (
            {"model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((3, 32), np.float32)},
            "no part",
        ),
        ({f"{first}.weight_scale": np.zeros(1, np.float32)}, "damaged, or a shard"),
        ({first.replace("lora_A", "lora_C.weight"): np.zeros((3, 3), np.float32)}, "does not have"),
        ({"base_model.model.score.weight": np.zeros((2, 32), np.float32)}, r"score\.weight, which"),
    ):
        rewrite(adapter, lambda _, extra=extra: original | extra)
        with pytest.raises(ValueError, match=message):
            gl.import_peft(adapter, params)
    two = {n.replace("lora_A.", f"lora_A.{'ab'['layers.1' in n]}."): v for n, v in original.items()}
    rewrite(adapter, lambda _: two)
    with pytest.raises(ValueError, match="holds several adapters: a, b"):
        gl.import_peft(adapter, params)


# The settings against the tensors.


def test_missing_and_surplus_modules_are_named(make_peft):
    base, adapter = make_peft({"target_modules": ["q_proj", "v_proj"]})
    params = load(base)[1]
    original = load_file(adapter / "adapter_model.safetensors")
    for left_out in ("layers.1.self_attn.v_proj", "layers.2.", "q_proj"):
        rewrite(
            adapter, lambda _, out=left_out: {n: v for n, v in original.items() if out not in n}
        )
        with pytest.raises(
            ValueError, match=rf"no factors for .*{left_out}.*, which adapter_config"
        ):
            gl.import_peft(adapter, params)
        with pytest.warns(UserWarning, match="missing adapter keys"):  # of which peft makes zeros
            peft_loads(base, adapter)
    rewrite(adapter, lambda _: original)
    for change in (
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["v_proj"]},
        {"target_modules": None},
    ):
        edit(adapter, **change)
        with pytest.raises(ValueError, match=r"factors for .*v_proj.* does not select"):
            gl.import_peft(adapter, params)
        edit(adapter, target_modules=["q_proj", "v_proj"], exclude_modules=None)


def peft_loads(base, adapter):
    import transformers
    from peft import PeftModel

    return PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), adapter
    )


MODULES = [
    *(f"model.layers.{i}.self_attn.{side}_proj" for i in range(3) for side in "qkvo"),
    *(f"model.layers.{i}.mlp.{name}_proj" for i in range(3) for name in ("gate", "up", "down")),
    *("model.embed_tokens", "lm_head"),
]
NAMES = st.sampled_from(
    ["q_proj", "self_attn.v_proj", "mlp.up_proj", "lm_head", "proj", "model.layers.1.mlp.up_proj"]
)
REGEXES = st.sampled_from(
    [
        r".*\.(q|v)_proj",
        r"model\.layers\.[01]\..*_proj",
        "q_proj",
        r".*",
        r".*(?<!o)_proj",
    ]
)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "exclude_modules": st.lists(NAMES, max_size=2) | REGEXES,
            "layers_to_transform": st.lists(st.integers(0, 3), max_size=2) | st.integers(0, 3),
            "layers_pattern": st.sampled_from(["layers", ["h", "layers"], [], "", "lay.rs"]),
            "modules_to_save": st.lists(st.sampled_from(["lm_head", "mlp", "v_proj"]), max_size=2),
        },
    ),
    targets=st.lists(NAMES, max_size=3) | REGEXES,
)
def test_modules_are_selected_as_in_peft(fields, targets, tmp_path):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    fields = {"peft_type": "LORA", "target_modules": targets} | fields
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(fields))
    try:
        config = LoraConfig(**{k: v for k, v in fields.items() if k != "peft_type"})
    except ValueError:  # peft refuses layers beside a regular expression; so do we if they are on
        return
    found = {name: check_target_module_exists(config, name) for name in MODULES}
    theirs = {n for n, hit in found.items() if hit and not isinstance(hit, _ExcludedModule)}
    assert read_settings(file).selected(MODULES) == theirs


def test_all_linear_is_what_it_is_in_peft(make_peft):
    base, adapter = make_peft({"target_modules": "all-linear", "exclude_modules": ["down_proj"]})
    edit(adapter, target_modules="All-Linear")
    compare(make_peft, base, adapter)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ranks=st.dictionaries(
        NAMES | REGEXES | st.just("^model.*q_proj|up_proj"), st.integers(1, 9), max_size=4
    ),
    alphas=st.dictionaries(NAMES | REGEXES, st.integers(1, 9) | st.floats(0.5, 9), max_size=4),
    rslora=st.booleans(),
)
def test_ranks_and_scales_are_those_of_peft(ranks, alphas, rslora, tmp_path):
    from peft.utils.other import get_pattern_key

    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 5, "use_rslora": rslora}
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(fields | {"rank_pattern": ranks, "alpha_pattern": alphas}))
    rank = {name: ranks.get(get_pattern_key(ranks, name), 4) for name in MODULES}
    scales = read_settings(file).scales(rank)
    for name, scale in scales.items():
        alpha = alphas.get(get_pattern_key(alphas, name), 5)
        assert scale == pytest.approx(alpha / (rank[name] ** 0.5 if rslora else rank[name]))


SLOW = r"(\w|\w\w|.)+[A-Z]"


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 3}},
        {"alpha_pattern": {SLOW: 3}},
        {"layers_to_transform": [0], "layers_pattern": [SLOW]},
        {"modules_to_save": [SLOW]},
    ],
)
def test_patterns_that_backtrack_for_ever_are_refused(change, make_peft, monkeypatch):
    monkeypatch.setattr("genlora_jax.patterns.SECONDS", 0.1)
    base, adapter = make_peft()
    edit(adapter, **change)
    field = list(change)[-1]
    with pytest.raises(ValueError, match=rf"adapter_config.json: {field}: .* is too slow to match"):
        gl.import_peft(adapter, load(base)[1])


def test_an_empty_group_of_settings_is_on_as_in_peft(make_peft):
    from peft import LoraConfig

    adapter = make_peft()[1]
    for field in ("kasa_config", "velora_config", "arrow_config", "use_bdlora"):
        edit(adapter, **{field: {}})
        assert getattr(LoraConfig.from_pretrained(adapter), field)  # its defaults
        with pytest.raises(ValueError, match=rf"\.json: {field} = {{}} is not supported"):
            read_settings(adapter / "adapter_config.json")
        edit(adapter, **{field: None})


def test_our_own_patterns_are_bounded_as_well(make_peft, monkeypatch):
    monkeypatch.setattr("genlora_jax.patterns.SECONDS", 0.1)
    params = load(make_peft()[0])[1]
    for fields in ({"targets": [SLOW]}, {"exclude": [SLOW]}):
        with pytest.raises(ValueError, match=rf"{next(iter(fields))}: .* is too slow to match"):
            gl.init_adapter(gl.LoRAConfig(**fields), jax.random.key(0), params)


# Presence is not meaning.


def test_every_setting_of_peft_is_accepted_at_its_default(tmp_path):
    import dataclasses

    from peft import HiraConfig, LoraConfig

    for config in (LoraConfig(), HiraConfig()):
        config.save_pretrained(tmp_path)
        read_settings(tmp_path / "adapter_config.json")
        fields = {field.name for field in dataclasses.fields(config)}
        assert fields & HARMLESS
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        on = {name for name, value in written.items() if value} - HARMLESS - set(READ)
        assert not on
    assert set(READ) <= fields | {field.name for field in dataclasses.fields(LoraConfig())}


def test_settings_that_are_off_are_accepted_and_unknown_ones_that_are_on_refused(make_peft):
    base, adapter = make_peft()
    params = load(base)[1]
    expected = gl.import_peft(adapter, params)
    unread = ("layer_replication", "use_qalora", "alora_invocation_tokens", "kasa_config", "new")
    for field in (*unread, "modules_to_save", "rank_pattern", "layers_pattern", "use_dora"):
        for off in (None, False, {}, [], 0, ""):
            if off == {} and field == "kasa_config":
                continue
            edit(adapter, **{field: off})
            jax.tree.map(np.testing.assert_array_equal, gl.import_peft(adapter, params), expected)
    for field in unread:
        for on in (True, "x", [1], {"a": None}, 0.5, *([{}] if field == "kasa_config" else [])):
            edit(adapter, **{field: on})
            with pytest.raises(
                ValueError, match=rf"adapter_config\.json: {field} = .* not support"
            ):
                gl.import_peft(adapter, params)
        edit(adapter, **{field: None})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", True),
        ("r", 3.0),
        ("r", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 10**400),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("rank_pattern", {"q_proj": "3"}),
        ("rank_pattern", [3]),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("alpha_pattern", {"q_proj": None}),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [["q_proj"]]),
        ("target_modules", "q_proj("),
        ("exclude_modules", "*"),
        ("layers_to_transform", ["0"]),
        ("layers_to_transform", [-1]),
        ("modules_to_save", "lm_head"),
        ("trainable_token_indices", {"embed_tokens": 3}),
        ("trainable_token_indices", [1.5]),
        ("use_rslora", "false"),
        ("bias", "some"),
        ("base_model_name_or_path", 3),
        ("init_lora_weights", 2),
    ],
)
def test_a_setting_of_another_type_is_named(make_peft, field, value):
    base, adapter = make_peft()
    edit(adapter, **{field: value})
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {field}") as error:
        gl.import_peft(adapter, load(base)[1])
    assert len(str(error.value)) < 300


def test_settings_that_change_nothing_change_nothing(make_peft):
    base, adapter = make_peft(
        Q | {"lora_dropout": 0.3, "init_lora_weights": "gaussian", "lora_alpha": 0.7}
    )
    compare(make_peft, base, adapter)
    edit(adapter, fan_in_fan_out=True)  # which peft warns of, and takes as false
    with pytest.warns(UserWarning, match="fan_in_fan_out is for Conv1D"):
        compare(make_peft, base, adapter)


def test_another_base_than_the_adapter_names_is_said(make_peft):
    base, adapter = make_peft()
    model, params = load(base)
    hub = "/cache/models--Org--Base-7B/snapshots/0123abcd"
    for named, at in (("Org/Base-7B", "/models/base-7b/"), ("org/base-7b", hub), (None, base)):
        edit(adapter, base_model_name_or_path=named)
        load_onto(adapter, model, params, at)
    edit(adapter, base_model_name_or_path="Org/Base-7B")
    with pytest.warns(UserWarning, match="was made for the base Org/Base-7B, not Org/Base-13B"):
        load_onto(adapter, model, params, "Org/Base-13B")


# Numbers.


def test_dtypes_may_be_mixed_and_others_than_floats_are_named(make_peft):
    base, adapter = make_peft()
    kinds = ("float16", jnp.bfloat16, "float32", "float64", "float16", jnp.bfloat16)
    rewrite(
        adapter,
        lambda arrays: {
            n: v.astype(kind) for (n, v), kind in zip(sorted(arrays.items()), kinds, strict=True)
        },
    )
    compare(make_peft, base, adapter)
    rewrite(adapter, lambda arrays: {n: v.astype(np.int32) for n, v in arrays.items()})
    with pytest.raises(ValueError, match=r"tensor base_model\.model.* is of dtype I32"):
        gl.import_peft(adapter, load(base)[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_a_number_that_is_not_finite_is_named(make_peft, bad):
    base, adapter = make_peft({"target_modules": ["q_proj", "lm_head"]})
    params = load(base)[1]
    original = load_file(adapter / "adapter_model.safetensors")
    for name in original:
        broken = original[name].astype(np.float64)
        broken[1, 2] = bad
        rewrite(adapter, lambda _, name=name, broken=broken: original | {name: broken})
        with pytest.raises(ValueError, match=rf"tensor {re.escape(name)} holds a NaN or an inf"):
            gl.import_peft(adapter, params)


def test_a_file_that_ends_early_is_called_damaged(make_peft):
    base, adapter = make_peft()
    params = load(base)[1]
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
            gl.import_peft(adapter, params)


# Damage of any kind: an error that names the file, and nothing else.

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 10**30, -(10**400), 0.5, float("nan"), float("inf"), 1e300]),
    st.text(max_size=5),
    st.sampled_from([[], {}, [[]], ["q_proj"], {"q_proj": 3}, [1, 2], "(", "q_proj", SLOW]),
)


def places(node, at=()):
    """Paths of all nodes in a JSON value."""
    yield at
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(child, (*at, key))


def replaced(node, at, value):
    if not at:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[at[0]] = replaced(node[at[0]], at[1:], value)
    return copy


def damaged(data, settings):
    """A JSON value with some of its nodes replaced."""
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.sampled_from([at for at in places(settings) if at]))
        settings = replaced(settings, at, data.draw(JUNK))
    return settings


FUZZ = settings(
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(call, *names):
    """Calls; an error has to be the user's, to name a file, and to be short."""
    try:
        return call()
    except (ValueError, OSError) as error:
        text = str(error)
    assert any(name in text for name in names), text
    assert len(text) < 600
    return None


def test_damaged_settings_of_peft_are_the_user_s_error(make_peft, monkeypatch):
    monkeypatch.setattr("genlora_jax.patterns.SECONDS", 0.05)
    base, adapter = make_peft(
        {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"q_proj": 3}}
    )
    model, params = load(base)
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    original = gl.import_peft(adapter, params)

    @FUZZ
    @given(st.data())
    def run(data):
        file.write_text(json.dumps(damaged(data, settings)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = outcome(lambda: load_onto(adapter, model, params, base), "adapter_", "adapts")
        if found:
            assert jax.tree.structure(found[2]) == jax.tree.structure(original)

    run()
    for text in ("", "[]", "null", "3", '"x"', "{", "[" * 100_000, "\ufeff{}", "\udcff"):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises((ValueError, OSError), match="adapter_config"):
            gl.import_peft(adapter, params)


def test_damaged_names_of_tensors_are_the_user_s_error(make_peft):
    base, adapter = make_peft({"target_modules": ["q_proj", "lm_head"]})
    params = load(base)[1]
    original = load_file(adapter / "adapter_model.safetensors")
    expected = gl.import_peft(adapter, params)
    words = (
        "default lora_A lora_B weight bias base_layer lora_embedding_A lora_magnitude_vector "
        "modules_to_save token_adapter hira_A lm_head trainable_tokens_delta model layers 0 3 "
        "q_proj embed_tokens é"
    )
    parts = st.sampled_from(["", *words.split()])
    shapes = st.sampled_from([(), (0,), (3,), (3, 32), (32, 3), (0, 32), (61, 32), (1, 1, 1)])

    @FUZZ
    @given(st.data())
    def run(data):
        arrays = dict(original)
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(sorted(arrays)))
            pieces = name.split(".")
            at = data.draw(st.integers(0, len(pieces)))
            pieces[at : at + data.draw(st.integers(0, 2))] = data.draw(st.lists(parts, max_size=2))
            value = arrays.pop(name) if data.draw(st.booleans()) else arrays[name]
            if data.draw(st.booleans()):
                value = np.full(data.draw(shapes), 0.5, np.float32)
            arrays[".".join(pieces)] = value
        rewrite(adapter, lambda _: arrays)
        factors = outcome(lambda: gl.import_peft(adapter, params), "adapter")
        if factors is not None:
            assert jax.tree.structure(factors) == jax.tree.structure(expected)

    run()
