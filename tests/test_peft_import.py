"""PEFT adapters in: against `peft`'s own forward, and out again."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import torch_logits

import genlora_jax as gl
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes

IDS = np.random.default_rng(0).integers(3, 61, (2, 11)).astype(np.int32)
ADAPTERS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "regex": {"target_modules": r".*\.(up|down)_proj"},
    "some_layers": {"target_modules": ["k_proj"], "layers_to_transform": [0, 2]},
    "patterns": {
        "target_modules": ["q_proj", "gate_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 5, r".*\.2\.mlp.gate_proj": 2},
        "alpha_pattern": {"gate_proj": 9},
    },
    "dora": {
        "target_modules": ["k_proj", "down_proj"],
        "use_dora": True,
        "layers_to_transform": [1],
    },
    "head": {"target_modules": ["lm_head", "o_proj"]},
    # Whose pattern peft 0.21 keeps in the settings and does not follow.
    "hira": {"hira": True, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 5}},
}
# Of peft itself, which the tests call.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def load(path, **options):
    return gl.load_llama(path, dtype=jnp.float32, param_dtype=jnp.float32, **options)


def run(model, params, factors=None):
    return np.asarray(jax.jit(lambda p, f: gl.apply(model, p, f, IDS))(params, factors or {}))


@pytest.fixture
def make_peft(tmp_path):
    """A function that saves a random PEFT adapter; returns its directory and the model."""
    import torch
    from peft import HiraConfig, LoraConfig, get_peft_model

    def make(twin, hira=False, **settings):
        torch.manual_seed(0)
        kind = HiraConfig if hira else functools.partial(LoraConfig, lora_alpha=7)
        config = kind(**({"r": 3, "task_type": "CAUSAL_LM"} | settings))
        model = get_peft_model(twin, config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "hira_B" in name:
                    parameter.normal_(std=0.3)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter", model

    return make


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_an_imported_adapter_applies_as_in_peft_and_goes_out_again(
    settings, torch_twin, make_peft, tmp_path
):
    path, twin = torch_twin()
    model, params = load(path)
    base = run(model, params)
    adapter, theirs = make_peft(twin, **settings)
    factors = gl.import_peft(adapter, jax.eval_shape(lambda: params))
    ours = run(model, params, factors)
    assert np.abs(ours - base).max() > 1e-2
    assert np.abs(ours - torch_logits(theirs, IDS)).max() <= 2e-4
    merged = run(model, gl.merge(params, factors))
    np.testing.assert_allclose(merged, ours, atol=1e-5 * np.abs(ours).max())
    gl.export_peft(tmp_path / "again", None, factors, base=path)
    again = run(model, params, gl.import_peft(tmp_path / "again", params))
    np.testing.assert_allclose(again, ours, atol=1e-6 * np.abs(ours).max())


def test_an_unrolled_base_takes_the_same_adapter(torch_twin, make_peft):
    path, twin = torch_twin()
    adapter, _ = make_peft(twin, **ADAPTERS["patterns"])
    both = []
    for scan in (True, False):
        model, params = load(path, scan=scan)
        both.append(run(model, params, gl.import_peft(adapter, params)))
    np.testing.assert_allclose(*both, atol=1e-5 * np.abs(both[0]).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"use_dora": True}, "q_proj has no lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, r"lacks lm_head\.weight, which modules_to_save names"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"bias": "some"}, "bias must be none, all or lora_only, got 'some'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"r": 4}, "gives model.layers.0.self_attn.q_proj rank 4, but its factors have 3"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(torch_twin, make_peft, changes, message):
    path, twin = torch_twin()
    adapter, _ = make_peft(twin, target_modules=["q_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        gl.import_peft(adapter, load(path)[1])


def test_an_adapter_for_another_base_or_in_pieces_is_refused(torch_twin, make_peft):
    path, twin = torch_twin()
    adapter, _ = make_peft(twin, target_modules=["q_proj"])
    params = load(path)[1]
    for changes, message in (
        ({"num_hidden_layers": 2}, r"adapts model\.layers\.2\.self_attn\.q_proj, which the base"),
        ({"hidden_size": 40, "head_dim": 10}, r"q_proj has factors \(32, 3\)"),
    ):
        other, _ = torch_twin("other", **changes)
        with pytest.raises(ValueError, match=message):
            gl.import_peft(adapter, load(other)[1])
    file = adapter / "adapter_model.safetensors"
    arrays = load_file(file)
    name = next(name for name in arrays if "lora_B" in name)
    save_file({n: v for n, v in arrays.items() if n != name}, file)
    with pytest.raises(ValueError, match="q_proj has no lora_B"):
        gl.import_peft(adapter, params)
    save_file(arrays | {"base_model.model.lm_head.weight": arrays[name]}, file)
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(32, 3\); the base's has"):
        gl.import_peft(adapter, params)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        gl.import_peft(adapter, params)


QWEN_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
}


def qwen_shapes(layers):
    config = LlamaConfig(vocab_size=151936, num_hidden_layers=layers, **QWEN_3B)
    return parameter_shapes(LlamaForCausalLM(config))


@pytest.mark.shared
def test_a_real_adapter_comes_in_and_goes_out(shared, tmp_path):
    source = shared / "adapters" / "qwen2.5-3b-lora-r4"
    factors = gl.import_peft(source, qwen_shapes(36))
    gl.export_peft(tmp_path / "out", None, factors, base="Qwen/Qwen2.5-3B-Instruct")
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(before) == set(after)
    for name, value in before.items():
        if "lora_A" in name:
            assert after[name].tobytes() == value.tobytes()
        else:  # lora_alpha 8 over rank 4, folded in
            np.testing.assert_allclose(after[name], 2.0 * value, rtol=2**-23)
    with pytest.raises(ValueError, match=r"adapts model\.layers\.2\..*which the base does not"):
        gl.import_peft(source, qwen_shapes(2))


@pytest.mark.shared
def test_two_layers_of_a_real_adapter_apply_as_in_peft(shared, torch_twin, tmp_path):
    from peft import PeftModel

    source = shared / "adapters" / "qwen2.5-3b-lora-r4"
    path, theirs = torch_twin(
        family="qwen2",
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        tie_word_embeddings=True,
        rope_theta=1e6,
        initializer_range=0.02,
    )
    tensors = load_file(source / "adapter_model.safetensors")
    kept = {k: v for k, v in tensors.items() if ".layers.0." in k or ".layers.1." in k}
    (tmp_path / "adapter").mkdir()
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = (source / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(settings)

    model, params = load(path)
    ours = run(model, params, gl.import_peft(tmp_path / "adapter", params))
    base = run(model, params)
    expected = torch_logits(PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval(), IDS)
    assert np.abs(ours - expected).max() <= 2e-4
    assert np.abs(ours - base).max() > 20 * np.abs(ours - expected).max()
