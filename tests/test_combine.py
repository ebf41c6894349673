"""Combined factors against the sum of deltas, and adapters switched without a new trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import perturb, random_llama

import genlora_jax as gl

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)), jnp.int32)


def make_set(params, rank, seed, targets):
    cfg = gl.LoRAConfig(rank=rank, targets=targets)
    adapter = gl.init_adapter(cfg, jax.random.key(seed), params)
    return gl.generate_factors(cfg, perturb(adapter, seed=seed))


@pytest.fixture
def sets():
    _, params = random_llama()
    first = make_set(params, 2, 1, ["q_proj", "up_proj"])
    return params, first, make_set(params, 3, 2, ["q_proj", "o_proj"])


def test_merging_a_combination_is_merging_each_with_its_weight(sets):
    params, first, second = sets
    both = jax.jit(gl.combine)([first, second], [0.5, -2.0])
    merged = flatten_dict(gl.merge(params, both))
    expected = {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(params).items()}
    for weight, factors in ((0.5, first), (-2.0, second)):
        flat = flatten_dict(factors)
        for path in {path[:-1] for path in flat}:
            a, b = (np.asarray(flat[(*path, side)], np.float64) for side in "ab")
            expected[(*path, "kernel")] += weight * a @ b
    for path, leaf in merged.items():
        largest = np.abs(expected[path]).max()
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5 * largest)
    moved = {
        p[-2] for p, leaf in flatten_dict(params).items() if not np.array_equal(leaf, merged[p])
    }
    assert moved == {"q_proj", "up_proj", "o_proj"}


def test_what_is_added_and_subtracted_is_gone(sets):
    model, params = random_llama()
    _, first, second = sets
    both = gl.combine([first, second, second], [1.0, 3.0, -3.0])
    ours = gl.apply(model, params, both, IDS)
    alone = gl.apply(model, params, first, IDS)
    np.testing.assert_allclose(ours, alone, atol=3e-5 * float(jnp.abs(alone).max()))


def test_adapters_of_one_shape_are_switched_without_a_new_trace():
    model, params = random_llama()
    run = jax.jit(lambda factors: gl.apply(model, params, factors, IDS))
    one, other = (run(make_set(params, 2, seed, ["q_proj"])) for seed in (1, 2))
    assert run._cache_size() == 1
    assert np.abs(one - other).max() > 1e-2


def test_sets_that_do_not_fit_together_raise(sets):
    _, first, second = sets
    with pytest.raises(ValueError, match="2 sets, 1 weights"):
        gl.combine([first, second], [1.0])
    wrong = jax.tree.map(lambda leaf: leaf[:2], first)
    with pytest.raises(ValueError, match=r"_proj\.a differs between the sets in shape"):
        gl.combine([first, wrong], [1.0, 1.0])


@pytest.mark.parametrize("options", [{}, {"scan": False}, {"remat": "full"}])
def test_each_row_with_its_own_adapter_is_each_adapter_by_itself(options):
    model, params = random_llama(**options)
    sets = [
        make_set(params, 2, 1, ["q_proj", "up_proj"]),
        make_set(params, 3, 2, ["q_proj", "o_proj", "lm_head"]),
        make_set(params, 1, 3, ["down_proj"]),
    ]
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 61, (5, 9)), jnp.int32)
    index = jnp.array([2, 0, 1, 1, 0])
    stacked = gl.stack(sets)

    @jax.jit
    def run(stacked, index):
        return gl.apply(model, params, stacked, ids, adapter_index=index)

    together = run(stacked, index)
    for row, chosen in enumerate(index):
        alone = gl.apply(model, params, sets[chosen], ids[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=2e-5 * float(jnp.abs(alone).max()))
    assert not np.allclose(together, run(stacked, jnp.zeros(5, int)), atol=1e-2)
    assert run._cache_size() == 1  # a choice is no new program


def test_stacked_factors_and_an_index_go_together(sets):
    model, _ = random_llama()
    params, first, second = sets
    with pytest.raises(ValueError, match="the module maps"):
        gl.apply(model, params, gl.stack([first, second]), IDS)
    with pytest.raises(ValueError, match=r"adapter_index goes with factors of gl\.stack"):
        gl.apply(model, params, first, IDS, adapter_index=jnp.array([0, 0]))
    with pytest.raises(ValueError, match="at least one set"):
        gl.stack([])
