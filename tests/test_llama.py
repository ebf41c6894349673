"""The Linen LLaMA against PyTorch's, and against itself in other layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import perturb, random_llama, torch_logits

import genlora_jax as gl
from genlora_jax.generation.decoding import decode
from genlora_jax.models.attention import attend

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "mha": {"num_key_value_heads": 4},
    "gqa_tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 12, "num_key_value_heads": 1},
}


def tokens(*shape, seed=0, vocab=61):
    return np.random.default_rng(seed).integers(3, vocab, shape).astype(np.int32)


def load(path, **options):
    return gl.load_llama(path, dtype=jnp.float32, param_dtype=jnp.float32, **options)


def run(model, params, ids, **inputs):
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, ids, **inputs))(params))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_pytorch(changes, torch_twin):
    path, twin = torch_twin(**changes)
    ids = tokens(2, 48)  # three times the original length of the scaled rotary embeddings
    theirs = torch_logits(twin, ids)
    assert np.abs(theirs).max() > 0.5
    assert np.abs(run(*load(path), ids) - theirs).max() <= 2e-4


def test_unrolled_layers_equal_scanned_ones():
    ids = tokens(2, 20)
    scanned, unrolled = (run(*random_llama(scan=scan), ids) for scan in (True, False))
    np.testing.assert_allclose(unrolled, scanned, atol=1e-5 * np.abs(scanned).max())


@pytest.mark.parametrize("length", [1, 63, 65, 128, 150])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_blocks_equals_that_of_xla_and_so_do_its_gradients(length, masked):
    rng = np.random.default_rng(length)
    q, k, v, weights = (
        jnp.asarray(rng.standard_normal((2, length, heads, 8)), jnp.float32)
        for heads in (4, 2, 2, 4)
    )
    mask = None
    if masked:
        seen = np.tril(rng.random((2, 1, length, length)) < 0.7) | np.eye(length, dtype=bool)
        mask = jnp.asarray(seen)

    def both(implementation):
        def value(q, k, v):
            out = attend(q, k, v, mask, implementation)
            return (out * weights).sum(), out

        return jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(q, k, v)

    ours, theirs = jax.tree.leaves(both("blocks")), jax.tree.leaves(both("xla"))
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(other).max()))


@pytest.mark.parametrize("attention", ["xla", "blocks"])
def test_padding_on_either_side_changes_nothing(attention):
    model, params = random_llama(attention=attention)
    ids, pad = tokens(2, 10), np.zeros((2, 5), np.int32)
    plain = run(model, params, ids)
    on, off = np.ones_like(ids), np.zeros_like(pad)
    left = run(
        model, params, np.hstack([pad, ids]), attention_mask=jnp.asarray(np.hstack([off, on]))
    )
    right = run(
        model, params, np.hstack([ids, pad]), attention_mask=jnp.asarray(np.hstack([on, off]))
    )
    assert np.isfinite(left).all()
    largest = np.abs(plain).max()
    np.testing.assert_allclose(left[:, 5:], plain, atol=1e-5 * largest)
    np.testing.assert_allclose(right[:, :10], plain, atol=1e-5 * largest)
    unmasked = run(model, params, np.hstack([pad, ids]))
    assert np.abs(unmasked[:, 5:] - plain).max() > 1e-2 * largest


@pytest.mark.parametrize("attention", ["xla", "blocks"])
def test_packed_rows_equal_separate_ones(attention):
    model, params = random_llama(attention=attention)
    first, second = tokens(1, 7), tokens(1, 12, seed=1)
    segments = jnp.asarray([[1] * 7 + [2] * 12])
    positions = jnp.asarray([[*range(7), *range(12)]])
    both = np.hstack([first, second])
    packed = run(model, params, both, segment_ids=segments, positions=positions)
    apart = np.hstack([run(model, params, first), run(model, params, second)])
    np.testing.assert_allclose(packed, apart, atol=1e-5 * np.abs(apart).max())
    assert np.abs(run(model, params, both) - apart).max() > 1e-2 * np.abs(apart).max()


@pytest.mark.parametrize("scan", [True, False])
def test_recomputation_changes_no_gradient(scan):
    ids, grads = tokens(2, 12), {}
    unlike = () if scan else (("full", "dots", "none"),)  # a policy for each layer
    for remat in ("none", "full", "dots", *unlike):
        model, params = random_llama(scan=scan, remat=remat)

        def loss(params, model=model):
            return jnp.square(model.apply({"params": params}, ids)).mean()

        grads[remat] = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    for remat in ("full", "dots", *unlike):
        for one, other in zip(grads[remat], grads["none"], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    ("scan", "remat", "message"),
    [
        (False, ("dots",), "remat has 1 policies, the model 3 layers"),
        (True, ("dots", "full", "full"), "a tuple needs scan=False"),
        (False, "dot", "remat must be one of"),
    ],
)
def test_a_policy_that_no_layer_can_have_is_refused(scan, remat, message):
    model, params = random_llama(scan=scan, remat=remat)
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, tokens(1, 2))


# Decoding.


def generate(twin, prompts, count, eos=None):
    """PyTorch's greedy continuations of prompts padded on the left."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = twin.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=eos,
    )
    return out[:, width:].tolist()


def test_greedy_decoding_is_that_of_pytorch_and_ends_at_a_stop_token(torch_twin):
    path, twin = torch_twin()
    model, params = load(path)
    prompts = [tokens(n, seed=n).tolist() for n in (3, 18, 9)]
    ours = decode(model, params, prompts, max_new_tokens=14)
    assert ours == generate(twin, prompts, 14)
    stop = ours[1][5]
    stopped = decode(model, params, prompts, max_new_tokens=14, stop=[stop])
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in ours]
    assert len(stopped[1]) <= 5
    theirs = generate(twin, prompts, 14, eos=stop)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in theirs]


def test_sampling_from_the_likeliest_token_alone_is_greedy():
    model, params = random_llama()
    prompts = [tokens(4).tolist(), tokens(6, seed=1).tolist()]
    options = {"max_new_tokens": 10, "temperature": 2.0, "key": jax.random.key(0)}
    greedy = decode(model, params, prompts, max_new_tokens=10)
    assert decode(model, params, prompts, top_p=1e-9, **options) == greedy
    assert decode(model, params, prompts, **options) != greedy


def test_decoding_refuses_empty_prompts_and_sampling_without_a_key():
    model, params = random_llama()
    with pytest.raises(ValueError, match="at least one token"):
        decode(model, params, [[1], []])
    with pytest.raises(ValueError, match="key"):
        decode(model, params, [[1]], temperature=1.0)


def test_decoding_with_factors_is_that_of_the_merged_model():
    model, params = random_llama()
    cfg = gl.LoRAConfig(rank=2)
    factors = gl.generate_factors(cfg, perturb(gl.init_adapter(cfg, jax.random.key(0), params)))
    prompts = [tokens(5).tolist()]
    adapted = decode(model, params, prompts, factors=factors, max_new_tokens=10)
    assert adapted == decode(model, gl.merge(params, factors), prompts, max_new_tokens=10)
    assert adapted != decode(model, params, prompts, max_new_tokens=10)


# Real models.


@pytest.mark.shared
@pytest.mark.parametrize("name", ["stories260k", "babyllama-char"])
def test_logits_of_real_models_are_those_of_pytorch(shared, name):
    import transformers

    path = shared / "models" / name
    twin = transformers.LlamaForCausalLM.from_pretrained(path).eval()
    ids = tokens(2, 64, vocab=100)
    assert np.abs(run(*load(path), ids) - torch_logits(twin, ids)).max() <= 2e-4


@pytest.mark.shared
def test_greedy_text_of_a_real_model_is_that_of_pytorch(shared):
    import transformers

    path = shared / "models" / "stories260k"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    prompt = tokenizer("Once upon a time")["input_ids"]
    twin = transformers.LlamaForCausalLM.from_pretrained(path).eval()
    (ours,) = decode(*load(path), [prompt], max_new_tokens=200)
    (theirs,) = generate(twin, [prompt], 200)
    assert len(ours) == 200
    assert tokenizer.decode(ours) == tokenizer.decode(theirs)
