"""What of cuDNN's attention needs no GPU to test; `train.benchmarks.attention` has the rest."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from tiny_models import random_llama

from genlora_jax.models import cudnn
from genlora_jax.models.llama import keeps_products


def test_runs_are_those_of_numpy():
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 6, (5, 40)), axis=1)
    runs = cudnn.find_runs(jnp.asarray(segments), 8)
    assert runs.fit
    for row, lengths, starts in zip(segments, runs.lengths, runs.starts, strict=True):
        _, at, counts = np.unique(row, return_index=True, return_counts=True)
        assert lengths.tolist() == [*counts, *[-1] * (8 - len(counts))]
        assert starts.tolist() == [*at, *[-1] * (9 - len(at))]


def test_more_segments_than_expected_give_no_numbers():
    model, params = random_llama()
    ids = jnp.ones((2, 8), jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 3, 3], [1] * 8])

    def hidden(most):
        return model.apply(
            {"params": params},
            ids,
            segment_ids=segments,
            max_segments=most,
            method="hidden_states",
        )

    assert jnp.isnan(hidden(2)).all()
    expected = model.apply({"params": params}, ids, segment_ids=segments, method="hidden_states")
    assert (hidden(3) == expected).all()


def test_jax_still_has_the_packed_layout_under_the_names_that_are_used():
    parameters = inspect.signature(fused_attention_stablehlo.dot_product_attention).parameters
    used = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type"}
    assert used | {"sliding_window_length"} <= parameters.keys()
    assert fused_attention_stablehlo.MaskType.PADDING_CAUSAL


class Device:
    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "expected"),
    [
        (jnp.bfloat16, 128, "8.0", True),
        (jnp.float16, 64, "9.0", True),
        (jnp.float32, 64, "9.0", False),
        (jnp.bfloat16, 64, "7.5", False),
        (jnp.bfloat16, 100, "9.0", False),
        (jnp.bfloat16, 256, "8.9", False),
        (jnp.bfloat16, 256, "10.0", True),
    ],
)
def test_what_cudnn_takes(dtype, head_dim, capability, expected):
    assert cudnn.supports(dtype, head_dim, Device(capability)) is expected


def test_masks_of_odd_lengths_show_no_query_the_position_that_was_added(monkeypatch):
    attention = jax.nn.dot_product_attention
    monkeypatch.setattr(  # XLA's, which takes what cuDNN takes
        jax.nn,
        "dot_product_attention",
        lambda *qkv, implementation, **options: attention(*qkv, implementation="xla", **options),
    )
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 7, 2, 8)), jnp.float32) for _ in range(3))
    mask = (jnp.tril(jnp.ones((7, 7), bool)) & (jnp.arange(7) != 2)[None])[None, None]
    mask |= jnp.eye(7, dtype=bool)[None, None]
    for given in (mask, None):
        expected = attention(q, k, v, mask=given, is_causal=given is None)
        found = cudnn.attend_masked(q, k, v, given)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_products_and_attention_are_kept_and_nothing_else(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(
        fused_attention_stablehlo, "check_is_flash_attention", lambda *_, **__: None
    )

    def layer(x):
        q = jnp.sin(x)
        out = cudnn.attend_masked(q, q, q, None)
        return jnp.sin(out).astype(jnp.float32).sum()

    x = jnp.ones((2, 64, 4, 64), jnp.bfloat16)
    _, pull_back = jax.eval_shape(
        lambda x: jax.vjp(jax.checkpoint(layer, policy=keeps_products), x), x
    )
    kept = sorted((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pull_back))
    assert kept == [((2, 4, 64), "float32"), (x.shape, "bfloat16"), (x.shape, "bfloat16")]
