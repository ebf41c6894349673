"""Every kind of factors that the table has, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from baseline_methods import EPS
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from tiny_models import random_llama

import genlora_jax as gl
from genlora_jax import sharding
from genlora_jax.factors import KINDS, kind_of, low_rank, refuse_uncombinable

L, D_IN, D_OUT, RANK = 3, 16, 12, 2
SIZES = {"in": D_IN, "out": D_OUT, "rank": RANK}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)

# By a kind's leaves, its kernel in float64. A new kind needs one line here.
EXACT = {
    ("a", "b"): lambda w, a, b: w + a @ b,
    ("a", "b", "magnitude"): lambda w, a, b, magnitude: (
        (w + a @ b) * (magnitude / np.linalg.norm(w + a @ b, axis=-2))[..., None, :]
    ),
    ("gain_a", "gain_b"): lambda w, a, b: w * (1 + a @ b),
    ("delta",): lambda w, delta: w + delta,
}


def random_leaves(kind, seed=0, lead=(L,), rank=RANK):
    """Leaves of the sizes that a kind's axes say, away from zero."""
    rng, sizes = np.random.default_rng(seed), SIZES | {"rank": rank}
    return {
        leaf: jnp.asarray(rng.uniform(0.1, 0.4, (*lead, *(sizes[axis] for axis in axes))), "f4")
        for leaf, axes in kind.axes.items()
    }


def random_kernel(lead=(L,)):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((*lead, D_IN, D_OUT)), jnp.float32)


def exact(kind, kernel, leaves):
    sides = (np.asarray(leaves[leaf], np.float64) for leaf in kind.axes)
    return EXACT[tuple(kind.axes)](np.asarray(kernel, np.float64), *sides)


def assert_close(ours, theirs, terms):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=terms * EPS * np.abs(theirs).max())


def test_the_table_tells_kinds_apart_by_their_leaves():
    assert {frozenset(kind.axes) for kind in KINDS} == {frozenset(leaves) for leaves in EXACT}
    for kind in KINDS:
        assert kind_of(random_leaves(kind), "proj") is kind
        assert kind.scaled is None or kind.scaled in kind.axes
    with pytest.raises(ValueError, match="factors of proj hold"):
        kind_of({"a": 0, "delta": 0}, "proj")


@every_kind
@pytest.mark.parametrize("lead", [(), (L,)])
def test_a_merge_is_that_of_float64_and_is_undone_or_refused(kind, lead):
    kernel, leaves = random_kernel(lead), random_leaves(kind, lead=lead)
    params, factors = {"layers": {"kernel": kernel}}, {"layers": leaves}
    merged = gl.merge(params, factors)["layers"]["kernel"]
    # Sums of RANK terms; DoRA's norms are sums over the inputs.
    expected = exact(kind, kernel, leaves)
    assert_close(merged, expected, D_IN + RANK)
    assert np.abs(merged - kernel).max() > 0.1
    if "magnitude" in kind.axes:  # its columns have lost their norms
        with pytest.raises(ValueError, match=r"unmerge: layers was merged"):
            gl.unmerge({"layers": {"kernel": merged}}, factors)
        return
    back = gl.unmerge({"layers": {"kernel": merged}}, factors)["layers"]["kernel"]
    # The merged kernel was rounded once, and is once more; a gain here is above 1.
    largest = max(np.abs(kernel).max(), np.abs(merged).max())
    np.testing.assert_allclose(back, kernel, rtol=0, atol=4 * EPS * largest)


@every_kind
@pytest.mark.parametrize("use_bias", [True, False])
def test_an_adapted_output_is_that_of_the_merged_kernel(kind, use_bias):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((5, D_IN)), jnp.float32)
    params = {"kernel": random_kernel(())}
    if use_bias:
        params["bias"] = jnp.asarray(rng.standard_normal(D_OUT), jnp.float32)
    leaves = random_leaves(kind, lead=())
    ours = gl.apply(nn.Dense(D_OUT, use_bias=use_bias), params, leaves, x)
    theirs = np.asarray(x, np.float64) @ exact(kind, params["kernel"], leaves)
    theirs = theirs + np.asarray(params.get("bias", 0.0), np.float64)
    assert_close(ours, theirs, 2 * D_IN + RANK)
    base = nn.Dense(D_OUT, use_bias=use_bias).apply({"params": params}, x)
    assert np.abs(ours - base).max() > 0.1


@every_kind
@pytest.mark.parametrize(
    ("module", "rows", "columns"), [("q_proj", "fsdp", "tensor"), ("o_proj", "tensor", "fsdp")]
)
def test_leaves_are_sharded_by_their_axes_as_the_kernel_is(kind, module, rows, columns):
    mesh_axes = {"in": rows, "out": columns, "rank": None}
    factors = {"layers": {module: random_leaves(kind)}}
    kernel = sharding.param_specs({"layers": {module: {"kernel": random_kernel()}}})
    assert kernel["layers"][module]["kernel"] == P(None, rows, columns)
    specs = sharding.factor_specs(factors)["layers"][module]
    expected = {leaf: P(None, *map(mesh_axes.get, axes)) for leaf, axes in kind.axes.items()}
    assert specs == expected
    one_layer = jax.tree.map(lambda leaf: leaf[0], factors)
    specs = sharding.factor_specs(one_layer)["layers"][module]
    assert specs == {leaf: P(*spec[1:]) for leaf, spec in expected.items()}


@every_kind
def test_padding_to_a_rank_keeps_the_delta(kind):
    kernel, leaves = random_kernel(), random_leaves(kind)
    padded = kind.padded(leaves, RANK + 3)
    assert kind.fits(leaves, kernel.shape)
    assert kind.fits(padded, kernel.shape)
    if "rank" not in {axis for axes in kind.axes.values() for axis in axes}:
        assert kind.rank(leaves) is None
        jax.tree.map(np.testing.assert_array_equal, padded, leaves)
    else:
        assert (kind.rank(leaves), kind.rank(padded)) == (RANK, RANK + 3)
    np.testing.assert_array_equal(exact(kind, kernel, padded), exact(kind, kernel, leaves))


@every_kind
def test_leaves_of_another_kernel_do_not_fit(kind):
    for lead in ((), (L,)):
        leaves = random_leaves(kind, lead=lead)
        assert kind.fits(leaves, (*lead, D_IN, D_OUT))
        for shape in ((*lead, D_OUT, D_IN), (*lead, D_IN, D_OUT + 1), (L, *lead, D_IN, D_OUT)):
            assert not kind.fits(leaves, shape)


@every_kind
def test_what_does_not_combine_is_refused_by_the_option_that_made_it(kind):
    factors = {"layers": {"q_proj": random_leaves(kind)}}
    if kind.combines:
        refuse_uncombinable(factors, "summing")
        both = gl.combine([factors, factors], [1.0, -0.5])
        kernel = random_kernel()
        delta = exact(kind, kernel, factors["layers"]["q_proj"]) - np.asarray(kernel, np.float64)
        ours = exact(kind, kernel, both["layers"]["q_proj"]) - np.asarray(kernel, np.float64)
        assert_close(ours, 0.5 * delta, 4)
        return
    assert kind.option
    with pytest.raises(ValueError, match=r"summing takes A and B alone; layers\.q_proj") as caught:
        refuse_uncombinable(factors, "summing")
    assert kind.option in str(caught.value)


@every_kind
def test_a_peft_adapter_comes_back_as_it_went_out(kind, tmp_path):
    _, params = random_llama()
    layers, d_in, d_out = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"].shape
    rng, sizes = np.random.default_rng(3), {"in": d_in, "out": d_out, "rank": RANK}
    leaves = {
        leaf: jnp.asarray(rng.standard_normal((layers, *map(sizes.get, axes))), jnp.float32)
        for leaf, axes in kind.axes.items()
    }
    factors = {"model": {"layers": {"self_attn": {"q_proj": leaves}}}}
    if not kind.peft:
        with pytest.raises(ValueError, match=kind.option):
            gl.export_peft(tmp_path / "out", None, factors, base="base")
        assert not (tmp_path / "out").exists()
        return
    assert set(kind.peft) == set(kind.axes)
    gl.export_peft(tmp_path / "out", None, factors, base="base")
    back = gl.import_peft(tmp_path / "out", params)
    assert jax.tree.structure(back) == jax.tree.structure(factors)
    jax.tree.map(np.testing.assert_array_equal, back, factors)


@every_kind
def test_singular_values_are_those_of_the_delta_or_of_the_gain(kind):
    leaves = random_leaves(kind)
    # HiRA's gain does not depend on the kernel: it is the delta of a kernel of ones.
    kernel = np.ones((L, D_IN, D_OUT)) if "gain_a" in leaves else np.zeros((L, D_IN, D_OUT))
    sides = {leaf: value for leaf, value in leaves.items() if leaf != "magnitude"}
    exact_sides = (np.asarray(value, np.float64) for value in sides.values())
    delta = EXACT[tuple(sides)](kernel, *exact_sides) - kernel
    ours = np.asarray(kind.singular_values(leaves))
    theirs = np.linalg.svd(delta, compute_uv=False)[:, : ours.shape[-1]]
    assert_close(ours, theirs, 2 * (D_IN + D_OUT))


def test_the_gradient_of_b_transposes_no_array_as_wide_as_the_output():
    rng = np.random.default_rng(0)
    x, b, d_y = (
        rng.standard_normal(shape) for shape in ((2, 5, RANK), (RANK, D_OUT), (2, 5, D_OUT))
    )
    pull_back = lambda x, b, d_y: jax.vjp(low_rank.times, x, b)[1](d_y)  # noqa: E731
    operands = [jnp.asarray(array, jnp.float32) for array in (x, b, d_y)]
    d_x, d_b = pull_back(*operands)
    np.testing.assert_allclose(d_x, d_y @ b.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_b, np.einsum("nti,nto->io", x, d_y), rtol=1e-5, atol=1e-5)
    products = [
        equation.outvars[0].aval.shape
        for equation in jax.make_jaxpr(pull_back)(*operands).eqns
        if equation.primitive.name == "dot_general"
    ]
    assert (RANK, D_OUT) in products
    assert (D_OUT, RANK) not in products
