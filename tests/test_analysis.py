"""What deltas look like, against NumPy's SVD of the formed delta in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import perturb, random_llama

import genlora_jax as gl
from genlora_jax.analysis import (
    count_above,
    decompose,
    parameters_by_target,
    stable_rank,
    subspace_overlap,
    target_factors,
)


def random_factors(seed, rank, layers=2, d_in=24, d_out=17):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((layers, d_in, rank)).astype(np.float32)
    b = rng.standard_normal((layers, rank, d_out)).astype(np.float32)
    return a, b


def reference(a, b):
    delta = a.astype(np.float64) @ b.astype(np.float64)
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return u[..., : a.shape[-1]], s[..., : a.shape[-1]], vt.swapaxes(-1, -2)[..., : a.shape[-1]]


def test_a_decomposition_is_that_of_the_delta_however_it_is_split():
    a, b = random_factors(0, 4)
    u, s, v = decompose(a, b)
    expected_u, expected_s, expected_v = reference(a, b)
    np.testing.assert_allclose(s, expected_s, rtol=1e-5)
    for ours, theirs in ((u, expected_u), (v, expected_v)):
        cosines = np.abs((np.asarray(ours) * theirs).sum(-2))
        np.testing.assert_allclose(cosines, 1.0, atol=1e-5)
    np.testing.assert_allclose((u * s[:, None]) @ v.swapaxes(-1, -2), a @ b, atol=1e-4)
    mixing = np.random.default_rng(1).standard_normal((2, 4, 4)).astype(np.float32)
    again = decompose(a @ mixing, np.linalg.inv(mixing) @ b)
    for one, other in zip((u, s, v), again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())


def test_counts_and_stable_rank():
    a, b = random_factors(2, 6)
    a[..., 3:] *= 1e-4
    _, s, _ = decompose(a, b)
    expected = reference(a, b)[1]
    above = (expected > 0.01 * expected[:, :1]).sum(-1)
    assert above.tolist() == [3, 3]
    assert count_above(s).tolist() == [3, 3]
    assert count_above(s, 0.0).tolist() == [6, 6]
    np.testing.assert_allclose(
        stable_rank(s), (expected**2).sum(-1) / expected[:, 0] ** 2, rtol=1e-5
    )
    assert count_above(jnp.zeros(3)) == 0
    assert stable_rank(jnp.zeros(3)) == 0


def test_overlap_of_subspaces():
    first, second = random_factors(3, 4), random_factors(4, 3)
    overlap = subspace_overlap(first, second)
    bases = zip("ab", reference(*first)[::2], reference(*second)[::2], strict=True)
    for side, one, other in bases:
        assert overlap[side].shape == (2, 4, 3)
        for i in range(1, 5):
            for j in range(1, 4):
                product = one[..., :i].swapaxes(-1, -2) @ other[..., :j]
                expected = np.square(product).sum((-1, -2)) / min(i, j)
                np.testing.assert_allclose(overlap[side][:, i - 1, j - 1], expected, atol=1e-5)
    same = subspace_overlap(first, first)["a"]
    np.testing.assert_allclose(np.asarray(same), 1.0, atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_a_target_s_factors_are_its_layers_in_order(scan):
    _, params = random_llama(scan=scan)
    cfg = gl.LoRAConfig(rank=2, targets=["q_proj"], layers=[0, 2])
    adapter = perturb(gl.init_adapter(cfg, jax.random.key(0), params))
    (target,) = adapter.spec.targets
    a, b = target_factors(gl.generate_factors(cfg, adapter), target)
    np.testing.assert_array_equal(a, adapter.trainable["factors"][target.name]["a"])
    np.testing.assert_allclose(
        b, cfg.scale * adapter.trainable["factors"][target.name]["b"], rtol=1e-6
    )


def test_every_parameter_is_counted_once():
    _, params = random_llama()
    cfg = gl.GenLoRAConfig(rank=4, group_size=4, kernels=2, targets=["q_proj", "up_proj"])
    adapter = gl.init_adapter(cfg, jax.random.key(0), params)
    counts = parameters_by_target(adapter)
    generators = 2 * (4 * (4 * 2 + 16) + 2 * 5)
    assert counts == {
        "model.layers.mlp.up_proj": 3 * (32 + 48) + generators,
        "model.layers.self_attn.q_proj": 3 * (32 + 32) + generators,
    }
    adapter = adapter.replace(trainable=adapter.trainable | {"bank": jnp.zeros((5, 2))})
    assert parameters_by_target(adapter) == counts | {"shared": 10}
    assert sum(parameters_by_target(adapter).values()) == gl.count_parameters(adapter)
