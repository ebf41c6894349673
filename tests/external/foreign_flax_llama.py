"""FlaxLlamaForCausalLM of transformers 4: adapters in a Linen model that we did not write.

Not collected with the rest: it needs a transformers of its own, see the Makefile's `foreign`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformers import FlaxLlamaForCausalLM, LlamaConfig

import genlora_jax as gl

# The models of transformers promote dtypes and ranks.
jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_numpy_rank_promotion", "allow")

IDS = np.random.default_rng(0).integers(0, 97, (4, 24))


@pytest.fixture(scope="module")
def foreign():
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = FlaxLlamaForCausalLM(config, seed=0)
    inputs = (IDS, np.ones_like(IDS), np.broadcast_to(np.arange(24), IDS.shape))
    return model, inputs


@pytest.mark.parametrize(
    "cfg",
    [
        gl.GenLoRAConfig(rank=4, group_size=4, kernels=2),
        gl.LoRAConfig(rank=4, targets=["q_proj", "lm_head"]),
    ],
)
def test_injected_trained_ten_steps_and_merged(foreign, cfg):
    model, inputs = foreign
    params = model.params
    adapter = gl.init_adapter(cfg, jax.random.key(0), params)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(adapter.trainable)

    def apply(factors):
        return gl.apply(model.module, params, factors, *inputs)[0]

    def loss(trainable):
        logits = apply(gl.generate_factors(cfg, adapter.replace(trainable=trainable)))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, IDS[:, 1:]).mean()

    @jax.jit
    def step(trainable, state):
        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trainable, updates), state, value

    theirs = model(IDS).logits
    first = apply(gl.generate_factors(cfg, adapter))
    np.testing.assert_allclose(first, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))
    trainable, losses = adapter.trainable, []
    for _ in range(10):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.05
    factors = gl.generate_factors(cfg, adapter.replace(trainable=trainable))
    adapted = apply(factors)
    merged = model(IDS, params=gl.merge(params, factors)).logits
    np.testing.assert_allclose(merged, adapted, atol=2e-5 * float(jnp.abs(adapted).max()))
    assert not np.allclose(merged, theirs, atol=1e-2)
