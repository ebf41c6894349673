"""Every family against PyTorch: logits, export, PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import perturb, torch_logits

import genlora_jax as gl
from genlora_jax.generation.decoding import decode

SLIDING = {"use_sliding_window": True, "sliding_window": 7}
FAMILIES = {
    "mistral": {"family": "mistral", "sliding_window": 7, "head_dim": 12},
    "mistral_whole": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen2_sliding": {"family": "qwen2", "max_window_layers": 1} | SLIDING,
    "qwen3": {"family": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
    "qwen3_biases": {"family": "qwen3", "attention_bias": True, "max_window_layers": 0} | SLIDING,
    "phi3": {"family": "phi3", "sliding_window": 9},
    "phi3_partial": {"family": "phi3", "partial_rotary_factor": 0.5},
    "olmo2": {"family": "olmo2", "num_key_value_heads": 4},
    "olmo2_biases": {"family": "olmo2", "attention_bias": True},
}
CFG = gl.LoRAConfig(rank=3)
IDS = np.random.default_rng(0).integers(3, 61, (2, 40)).astype(np.int32)


def load(path, **options):
    return gl.load_llama(path, dtype=jnp.float32, param_dtype=jnp.float32, **options)


def run(model, params, factors=None):
    return np.asarray(jax.jit(lambda p, f: gl.apply(model, p, f, IDS))(params, factors or {}))


@pytest.fixture
def twin(torch_twin, request):
    """A model of a family in PyTorch's hands and in ours, and an adapter's factors."""
    return torch_twin(**FAMILIES[request.param])


every = pytest.mark.parametrize("twin", FAMILIES, indirect=True)


@every
@pytest.mark.parametrize("scan", [True, False])
def test_logits_of_a_family_are_those_of_pytorch(twin, scan):
    path, theirs = twin
    expected = torch_logits(theirs, IDS)
    assert np.abs(expected).max() > 0.5
    assert np.abs(run(*load(path, scan=scan)) - expected).max() <= 2e-4


@pytest.mark.parametrize("twin", ["mistral", "qwen2_sliding"], indirect=True)
def test_a_window_is_seen_and_decoding_keeps_to_it(twin):
    import torch

    path, theirs = twin
    model, params = load(path)
    prompt = IDS[0].tolist()
    (ours,) = decode(model, params, [prompt], max_new_tokens=12)
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    assert ours == expected[0, len(prompt) :].tolist()
    whole = model.clone(
        config=type(model.config)(**(vars(model.config) | {"sliding_window": None}))
    )
    assert np.abs(run(whole, params) - run(model, params))[:, 7:].max() > 1e-2


@every
def test_what_was_loaded_is_exported_byte_for_byte(twin, tmp_path):
    path, _ = twin
    gl.export_hf(tmp_path / "out", load(path)[1], base=path)
    before, after = (load_file(p / "model.safetensors") for p in (path, tmp_path / "out"))
    assert set(before) == set(after)
    assert all(after[name].tobytes() == value.tobytes() for name, value in before.items())


@every
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_merged_and_adapter_exports_give_the_logits_of_apply(twin, tmp_path):
    import transformers
    from peft import PeftModel

    path, theirs = twin
    model, params = load(path)
    factors = gl.generate_factors(CFG, perturb(gl.init_adapter(CFG, jax.random.key(0), params)))
    ours = run(model, params, factors)
    assert np.abs(ours - run(model, params)).max() > 1e-2
    gl.export_hf(tmp_path / "merged", gl.merge(params, factors), base=path)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert np.abs(torch_logits(merged, IDS) - ours).max() <= 2e-4
    gl.export_peft(tmp_path / "peft", CFG, factors, base=path)
    adapted = PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    assert np.abs(torch_logits(adapted, IDS) - ours).max() <= 2e-4


def test_a_tied_head_is_no_target_and_the_error_says_why(torch_twin):
    path, _ = torch_twin(family="qwen2", tie_word_embeddings=True)
    _, params = load(path)
    with pytest.raises(ValueError, match="lm_head is tied to the embedding"):
        gl.init_adapter(gl.LoRAConfig(rank=2, targets=["lm_head"]), jax.random.key(0), params)


@every
def test_a_bfloat16_merge_moves_logits_no_more_than_its_rounding_explains(twin):
    """|merged - adapted| <= sum over kernels of |d logit / d W| half a unit in W's last place.

    To first order, the logits computed in float32 so that nothing but the kernels is rounded; the
    second order gets a tenth of that.
    """
    path, _ = twin
    model, base = load(path)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    factors = gl.generate_factors(CFG, perturb(gl.init_adapter(CFG, jax.random.key(0), params)))
    exact, rounded = gl.merge(wide, factors), gl.merge(params, factors)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    chosen = (0, IDS.shape[1] - 1, jnp.array([5, 17, 40]))

    def logits(kernels, factors=None):
        return gl.apply(model, kernels, factors or {}, IDS[:1])[chosen]

    def half_unit(x):  # 8 bits of significand: 2^-8 of the power of two below, at most
        return jnp.exp2(jnp.floor(jnp.log2(jnp.maximum(jnp.abs(x), 1e-30))) - 8)

    @jax.jit
    def difference_and_bound(exact, rounded):
        bound = sum(
            (jnp.abs(slope) * jnp.where(moved, half_unit(x), 0)[None]).reshape(3, -1).sum(axis=1)
            for slope, x, moved in zip(
                jax.tree.leaves(jax.jacrev(logits)(exact)),
                jax.tree.leaves(exact),
                jax.tree.leaves(jax.tree.map(jnp.not_equal, exact, rounded)),
                strict=True,
            )
        )
        return jnp.abs(logits(rounded) - logits(wide, factors)), bound

    difference, bound = difference_and_bound(exact, rounded)
    assert (difference > 0).all()
    assert (difference <= 1.1 * bound).all()


@pytest.mark.parametrize("twin", ["qwen2"], indirect=True)
def test_merged_and_adapted_are_equally_near_to_float32_when_computed_in_bfloat16(twin):
    path, _ = twin
    model, params = gl.load_llama(path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    factors = gl.generate_factors(CFG, perturb(gl.init_adapter(CFG, jax.random.key(0), params)))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    exact = run(model.clone(dtype=jnp.float32), wide, factors)
    adapted = run(model, params, factors).astype(np.float32) - exact
    merged = run(model, gl.merge(params, factors)).astype(np.float32) - exact
    assert np.std(merged) <= 1.5 * np.std(adapted)
