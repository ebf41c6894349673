"""Injection and merging: two ways to the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from tiny_models import perturb, random_llama

import genlora_jax as gl

CFG = gl.GenLoRAConfig(rank=4, alpha=4.0, group_size=4, kernels=2, rbf_init=0.5)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)), jnp.int32)


@pytest.fixture(scope="module")
def make_factors():
    """A function that gives the factors of a new adapter on a base, moved unless told."""

    def make(params, cfg=CFG, moved=True):
        @jax.jit
        def init(key):
            return gl.init_adapter(cfg, key, params)

        adapter = init(jax.random.key(1))
        return jax.jit(gl.generate_factors, static_argnums=0)(
            cfg, perturb(adapter) if moved else adapter
        )

    return make


def run(model, params, factors=None):
    if factors is None:
        return np.asarray(jax.jit(lambda p: model.apply({"params": p}, IDS))(params))
    return np.asarray(jax.jit(lambda p, f: gl.apply(model, p, f, IDS))(params, factors))


@pytest.mark.parametrize(
    "options",
    [
        {"scan": True},
        {"scan": False, "tie_word_embeddings": True},
        {"scan": True, "remat": "full"},
        {"scan": False, "remat": "dots"},
    ],
)
def test_injection_is_the_base_at_first_and_the_merged_model_ever_after(options, make_factors):
    model, params = random_llama(**options)
    base = run(model, params)
    np.testing.assert_array_equal(run(model, params, make_factors(params, moved=False)), base)
    factors = make_factors(params)
    adapted = run(model, params, factors)
    merged = run(model, gl.merge(params, factors))
    assert np.abs(adapted - base).max() > 0.01 * np.abs(base).max()
    np.testing.assert_allclose(merged, adapted, atol=1e-5 * np.abs(adapted).max())


def test_unmerge_returns_a_float32_base_to_rounding(make_factors):
    _, params = random_llama()
    factors = make_factors(params)
    merged = gl.merge(params, factors)
    back = flatten_dict(gl.unmerge(merged, factors))
    for path, leaf in flatten_dict(params).items():
        largest = max(np.abs(leaf).max(), np.abs(flatten_dict(merged)[path]).max())
        # Four roundings: of the delta and of the sum, once each way.
        np.testing.assert_allclose(back[path], leaf, atol=4 * 2**-24 * largest, rtol=0)


def eighths(rng, shape, most=8):
    """Numbers whose products and sums are exact in float32."""
    return (rng.integers(-most, most + 1, shape) / 8).astype(np.float32)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_bfloat16_merge_is_the_float32_sum_rounded_once(lead):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((*lead, 16, 24)).astype(ml_dtypes.bfloat16)
    a, b = eighths(rng, (*lead, 16, 4), 500) / 64, eighths(rng, (*lead, 4, 24), 500) / 64
    merged = gl.merge({"layers": {"kernel": jnp.asarray(kernel)}}, {"layers": {"a": a, "b": b}})
    ours = np.asarray(merged["layers"]["kernel"])
    once = (kernel.astype(np.float32) + a @ b).astype(ml_dtypes.bfloat16)
    twice = kernel + (a @ b).astype(ml_dtypes.bfloat16)
    assert ours.dtype == kernel.dtype
    np.testing.assert_array_equal(ours.view(np.uint16), once.view(np.uint16))
    assert not np.array_equal(once, twice)


def test_donation_deletes_adapted_kernels_and_nothing_else(make_factors):
    _, params = random_llama()
    cfg = dataclasses.replace(CFG, targets=["q_proj", "up_proj"])
    factors = make_factors(params, cfg)
    kept = jax.tree.map(np.array, gl.merge(params, factors))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    merged = gl.merge(params, factors, donate=True)
    deleted = {path[-2] for path, leaf in flatten_dict(params).items() if leaf.is_deleted()}
    assert deleted == {"q_proj", "up_proj"}
    jax.tree.map(np.testing.assert_array_equal, kept, merged)


def test_merge_works_under_an_outer_jit_and_vmap():
    rng = np.random.default_rng(1)
    params = {"proj": {"kernel": jnp.asarray(eighths(rng, (6, 8)))}}
    a, b = jnp.asarray(eighths(rng, (5, 6, 2))), jnp.asarray(eighths(rng, (5, 2, 8)))
    expected = np.asarray(params["proj"]["kernel"]) + np.asarray(a) @ np.asarray(b)

    @jax.jit
    def together(params, a, b):
        return jax.vmap(lambda a, b: gl.merge(params, {"proj": {"a": a, "b": b}}))(a, b)

    np.testing.assert_array_equal(together(params, a, b)["proj"]["kernel"], expected)


def test_gradients_of_apply_equal_those_through_merge(make_factors):
    model, params = random_llama()
    factors = make_factors(params)

    def loss(logits):
        return jnp.square(jax.nn.log_softmax(logits)).mean()

    ours = jax.jit(jax.grad(lambda f: loss(gl.apply(model, params, f, IDS))))(factors)
    theirs = jax.jit(jax.grad(lambda f: loss(model.apply({"params": gl.merge(params, f)}, IDS))))(
        factors
    )
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, atol=3e-5 * np.abs(other).max())


# Models that are not ours.


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.tanh(nn.Dense(8, name="inner")(x)))


X = jnp.asarray(np.random.default_rng(2).standard_normal((4, 6)), jnp.float32)


@pytest.fixture(scope="module")
def mlp(make_factors):
    params = Mlp().init(jax.random.key(0), X)["params"]
    return params, make_factors(params, gl.GenLoRAConfig(rank=2, group_size=4, kernels=2))


def test_injection_into_another_model_equals_merging(mlp):
    params, factors = mlp
    adapted = gl.apply(Mlp(), params, factors, X)
    merged = Mlp().apply({"params": gl.merge(params, factors)}, X)
    np.testing.assert_allclose(adapted, merged, atol=1e-5 * float(jnp.abs(merged).max()))
    assert not np.allclose(adapted, Mlp().apply({"params": params}, X), atol=1e-3)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(6, name="proj")(x)), None


class Stack(nn.Module):
    collections: tuple

    @nn.compact
    def __call__(self, x):
        axes = dict.fromkeys(self.collections, 0)
        layers = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


def test_a_scan_that_does_not_name_the_collection_raises(make_factors):
    cfg = gl.LoRAConfig(rank=2)
    params = Stack(("params",)).init(jax.random.key(0), X)["params"]
    factors = make_factors(params, cfg)
    with pytest.raises(ValueError, match=r"met no Dense.*layers\.proj.*genlora"):
        gl.apply(Stack(("params",)), params, factors, X)
    named = gl.apply(Stack(("params", "genlora")), params, factors, X)
    merged = Stack(("params",)).apply({"params": gl.merge(params, factors)}, X)
    np.testing.assert_allclose(named, merged, atol=1e-5 * float(jnp.abs(merged).max()))


def test_factors_that_hit_no_dense_raise_and_name_the_path(mlp):
    params, factors = mlp
    with pytest.raises(ValueError, match=r"met no Dense.*: other\. "):
        gl.apply(Mlp(), params, factors | {"other": factors["out"]}, X)
    with pytest.raises(ValueError, match="other, which has no kernel"):
        gl.merge(params, factors | {"other": factors["out"]})


@pytest.mark.parametrize("side", ["a", "b"])
def test_factors_of_wrong_shapes_raise_and_name_the_module(mlp, side):
    params, factors = mlp
    pair = factors["out"]
    grown = jnp.zeros([n + 1 if n != 2 else n for n in pair[side].shape])
    wrong = factors | {"out": pair | {side: grown}}
    with pytest.raises(ValueError, match="factors of out have shapes"):
        gl.apply(Mlp(), params, wrong, X)
    with pytest.raises(ValueError, match="factors of out have shapes"):
        gl.merge(params, wrong)


def test_half_a_pair_of_factors_raises_in_merge(mlp):
    params, factors = mlp
    with pytest.raises(ValueError, match="factors of out hold"):
        gl.merge(params, {"out": {"a": factors["out"]["a"]}})


def test_dropout_keeps_the_mean_and_needs_a_key():
    model, rng = nn.Dense(5), np.random.default_rng(3)
    params = model.init(jax.random.key(0), X)["params"]
    factors = {
        "a": jnp.asarray(rng.standard_normal((6, 2)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal((2, 5)), jnp.float32),
    }

    @jax.jit
    @jax.vmap
    def dropped(key):
        return gl.apply(model, params, factors, X, dropout=0.3, rngs={"dropout": key})

    samples = np.asarray(dropped(jax.random.split(jax.random.key(1), 4000)))
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert (error > 1e-3).all()
    whole = gl.apply(model, params, factors, X)
    assert (np.abs(samples.mean(axis=0) - whole) < 5 * error).all()
    with pytest.raises(Exception, match="dropout"):
        gl.apply(model, params, factors, X, dropout=0.3)
