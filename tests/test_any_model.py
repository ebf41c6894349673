"""Linen models that are not ours: what counts as a Dense, and variables beside the parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_models import perturb

import genlora_jax as gl

CFG = gl.LoRAConfig(rank=2)
X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 6)), jnp.float32)


class Other(nn.Module):
    """A layer whose kernel is no matrix, between two of Dense."""

    make_layer: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="before")(x)
        x = self.make_layer()(x)
        return nn.Dense(3, name="after")(x.reshape(4, -1))


LAYERS = {
    "dense_general": lambda: nn.DenseGeneral((2, 3), name="other"),
    "dense_general_without_bias": lambda: nn.DenseGeneral((2, 3), use_bias=False, name="other"),
    "conv": lambda: nn.Conv(6, (3,), name="other"),
    "conv_without_bias": lambda: nn.Conv(6, (3,), use_bias=False, name="other"),
    "conv_of_two_dimensions": lambda: nn.Conv(6, (3, 3), name="other"),
}


class Siblings(nn.Module):
    """Kernels that share their first axis without a scan."""

    norm: bool
    make_layers: Callable[[], list[nn.Module]]

    @nn.compact
    def __call__(self, x):
        x = nn.RMSNorm(name="norm")(x) if self.norm else x
        first, second = self.make_layers()
        return first(x), second(x)


SIBLINGS = {
    "dense_general_after_a_norm": Siblings(
        True, lambda: [nn.DenseGeneral((2, 3), use_bias=False, name=n) for n in ("other", "value")]
    ),
    "dense_general_of_two_shapes": Siblings(
        False,
        lambda: [
            nn.DenseGeneral((2, 3), use_bias=False, name="other"),
            nn.DenseGeneral((4, 3), use_bias=False, name="value"),
        ],
    ),
    "conv_of_two_shapes": Siblings(
        False,
        lambda: [
            nn.Conv(n, (3,), use_bias=False, name=name) for name, n in (("other", 4), ("v", 8))
        ],
    ),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_kernels_that_share_their_first_axis_are_no_stack(name):
    params = SIBLINGS[name].init(jax.random.key(0), X)["params"]
    cfg = gl.LoRAConfig(rank=2, targets=["other"])
    with pytest.raises(ValueError, match=r"^other is no Dense"):
        gl.init_adapter(cfg, jax.random.key(0), params)


def test_modules_under_an_unrolled_layers_are_no_stack():
    kernel = jax.ShapeDtypeStruct((6, 2, 3), jnp.float32)
    params = {"layers": {str(i): {"query": {"kernel": kernel}} for i in range(2)}}
    with pytest.raises(ValueError, match=r"^layers\.0\.query is no Dense"):
        gl.init_adapter(CFG, jax.random.key(0), params)


def model_with(name):
    model = Other(LAYERS[name])
    return model, model.init(jax.random.key(0), X)["params"]


def moved_factors(cfg, params):
    return gl.generate_factors(cfg, perturb(gl.init_adapter(cfg, jax.random.key(1), params)))


def assert_merged_equals_adapted(model, params, factors, *inputs):
    adapted = np.asarray(gl.apply(model, params, factors, *inputs))
    merged = np.asarray(model.apply({"params": gl.merge(params, factors)}, *inputs))
    base = np.asarray(model.apply({"params": params}, *inputs))
    largest = np.abs(adapted).max()
    assert np.abs(adapted - base).max() > 1e-2 * largest
    np.testing.assert_allclose(merged, adapted, atol=1e-5 * largest)


# What is no Dense.


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("targets", ["all-linear", ["other"]])
def test_a_kernel_that_is_no_dense_s_is_refused_by_name(name, targets):
    _, params = model_with(name)
    cfg = gl.LoRAConfig(rank=2, targets=targets)
    with pytest.raises(ValueError, match=r"^other is no Dense"):
        gl.init_adapter(cfg, jax.random.key(0), params)


@pytest.mark.parametrize("name", [name for name in LAYERS if "two" not in name])
def test_factors_for_a_kernel_that_is_no_dense_s_are_not_merged(name):
    _, params = model_with(name)
    layers, d_in, d_out = params["other"]["kernel"].shape
    pair = {"a": jnp.ones((layers, d_in, 2)), "b": jnp.ones((layers, 2, d_out))}
    for operation in (gl.merge, gl.unmerge):
        with pytest.raises(ValueError, match="other is no Dense"):
            operation(params, {"other": pair})


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_is_excluded_does_no_harm(name):
    model, params = model_with(name)
    cfg = gl.LoRAConfig(rank=2, exclude=["other"])
    factors = moved_factors(cfg, params)
    assert set(factors) == {"before", "after"}
    assert_merged_equals_adapted(model, params, factors, X)


class Block(nn.Module):
    bias: bool
    norm: bool

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x) if self.norm else x
        return x + nn.tanh(nn.Dense(6, use_bias=self.bias, name="proj")(y)), None


class Stack(nn.Module):
    name_of_scan: str | None
    bias: bool = False
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Block, variable_axes={"params": 0, "genlora": 0}, split_rngs={"params": True}, length=3
        )
        return scan(self.bias, self.norm, name=self.name_of_scan)(x, None)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"name_of_scan": "layers"},
        {"name_of_scan": None},
        {"name_of_scan": "encoder", "bias": True},
        {"name_of_scan": "encoder", "norm": True},
        {"name_of_scan": "encoder", "bias": True, "norm": True},
    ],
)
def test_a_stack_is_known_by_its_scan(settings):
    model = Stack(**settings)
    params = model.init(jax.random.key(0), X)["params"]
    factors = moved_factors(CFG, params)
    ((name, leaves),) = factors.items()
    assert name == (settings["name_of_scan"] or "ScanBlock_0")
    assert leaves["proj"]["a"].shape == (3, 6, 2)
    assert_merged_equals_adapted(model, params, factors, X)


@pytest.mark.parametrize("cfg", [CFG, gl.GenLoRAConfig(rank=2, group_size=2)])
def test_factors_of_a_stack_are_compressed_without_its_base(cfg):
    params = Stack(name_of_scan="encoder", bias=True).init(jax.random.key(0), X)["params"]
    factors = moved_factors(CFG, params)
    adapter, _ = gl.compress(cfg, factors, steps=2)
    (target,) = adapter.spec.targets
    assert (target.name, target.depth, target.kernels[0].stack) == ("encoder.proj", 3, 3)


class Scale(nn.Module):
    """A parameter called `kernel` that is a vector."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("kernel", nn.initializers.ones, x.shape[-1:])
        return x * jnp.broadcast_to(scale, x.shape)


class ScaledBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Scale(name="scale")(nn.Dense(6, name="proj")(x)), None


class ScaledStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            ScaledBlock,
            variable_axes={"params": 0, "genlora": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(name="layers")(x, None)[0]


def test_a_stack_with_another_kernel_is_known_by_its_name():
    params = ScaledStack().init(jax.random.key(0), X)["params"]
    cfg = gl.LoRAConfig(rank=2, targets=["proj"])
    factors = moved_factors(cfg, params)
    assert_merged_equals_adapted(ScaledStack(), params, factors, X)


# Variables beside the parameters.


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="inner")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="out")(nn.tanh(x))


@pytest.fixture
def normed():
    variables = Normed().init(jax.random.key(0), X)
    assert set(variables) == {"params", "batch_stats"}
    factors = moved_factors(CFG, variables["params"])
    merged = {**variables, "params": gl.merge(variables["params"], factors)}
    return variables, factors, merged


def test_a_model_with_other_variables_is_adapted_as_it_is_merged(normed):
    variables, factors, merged = normed
    ours, theirs = gl.apply(Normed(), variables, factors, X), Normed().apply(merged, X)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))
    assert not np.allclose(ours, Normed().apply(variables, X), atol=1e-2)


def test_other_variables_that_a_model_changes_come_back(normed):
    variables, factors, merged = normed
    options = {"train": True, "mutable": ["batch_stats"]}
    ours, changed = gl.apply(Normed(), variables, factors, X, **options)
    theirs, expected = Normed().apply(merged, X, **options)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))
    assert set(changed) == {"batch_stats"}
    for one, other, before in zip(
        *map(jax.tree.leaves, (changed, expected, variables["batch_stats"])), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))
        assert not np.array_equal(one, before)


def test_the_context_manager_is_what_apply_is_around_a_call(normed):
    variables, factors, _ = normed

    @jax.jit
    def injected(variables, factors):
        with gl.inject(factors) as collection:
            assert set(collection) == {"genlora"}
            return Normed().apply({**variables, **collection}, X)

    expected = jax.jit(lambda v, f: gl.apply(Normed(), v, f, X))(variables, factors)
    np.testing.assert_array_equal(injected(variables, factors), expected)
    outside = Normed().apply({**variables, "genlora": factors}, X)
    np.testing.assert_array_equal(outside, Normed().apply(variables, X))


def test_factors_that_meet_no_dense_in_the_block_raise(normed):
    variables, factors, _ = normed
    with (
        pytest.raises(ValueError, match=r"met no Dense.*: inner, out\. "),
        gl.inject(factors) as _,
    ):
        Normed().apply(variables, X)


def test_an_error_in_the_block_is_not_hidden_by_factors_that_met_no_dense(normed):
    _, factors, _ = normed
    with pytest.raises(KeyError, match="of the block"), gl.inject(factors):
        raise KeyError("of the block")


def test_of_nested_blocks_the_innermost_injects(normed):
    variables, factors, _ = normed
    other = perturb(factors, seed=5)

    def applied(collection):
        return Normed().apply({**variables, **collection}, X)

    with gl.inject(factors) as outer:
        first = applied(outer)
        inside = gl.apply(Normed(), variables, other, X)
        with gl.inject(other) as inner:
            nested = applied(inner)
        last = applied(outer)
    expected = gl.apply(Normed(), variables, other, X)
    np.testing.assert_array_equal(inside, expected)
    np.testing.assert_array_equal(nested, expected)
    np.testing.assert_array_equal(first, gl.apply(Normed(), variables, factors, X))
    np.testing.assert_array_equal(last, first)
