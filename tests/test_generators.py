"""Latents to basis vectors, against a reference in NumPy float64 written on its generator."""

import functools
import hashlib
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genlora_jax as gl
from genlora_jax import generators
from genlora_jax.basis_functions import FAMILIES, Family, gaussian_rbf
from genlora_jax.seeded_random import seeded_normal
from genlora_jax.settings import parse
from genlora_jax.training.recipe import Recipe
from train.benchmarks import rbf_linearity

few = settings(max_examples=15, deadline=None)


def scalar_features(family, x, count, bandwidth):
    """The values at x of `count` scalar basis functions of a family, by textbook formulas."""
    points = [0.0] if count == 1 else [-2 + 4 * k / (count - 1) for k in range(count)]
    width = bandwidth or (1.0 if count == 1 else 4 / (count - 1))
    if family == "rbf":
        return [math.exp(-(((x - point) / width) ** 2)) for point in points]
    if family == "fourier":
        waves = [math.sin, math.cos]
        return [waves[k % 2]((k // 2 + 1) * math.pi * x / 4) for k in range(count)]
    if family == "chebyshev":
        return [math.cos(k * math.acos(math.tanh(x))) for k in range(1, count + 1)]
    # The cubic B-spline as a sum of truncated powers.
    return [
        sum(
            (-1) ** i * math.comb(4, i) * max((x - point) / width + 2 - i, 0.0) ** 3
            for i in range(5)
        )
        / 6
        for point in points
    ]


def reference_groups(cfg, z):
    """Normalised groups; the last padded with zeros."""
    z, g = np.asarray(z, np.float64), cfg.group_size
    if cfg.normalize == "latent":
        z = (z - z.mean()) / np.sqrt(z.var() + cfg.eps)
    groups = []
    for start in range(0, len(z), g):
        part = z[start : start + g]
        if cfg.normalize == "group":
            part = (part - part.mean()) / np.sqrt(part.var() + cfg.eps)
        groups.append(np.pad(part, (0, g - len(part))))
    return groups


def reference_features(cfg, groups, exact):
    """The features of each group, `[J][F]`, for a groupwise generator."""
    if cfg.basis != "rbf":
        table = [
            [phi for x in t for phi in scalar_features(cfg.basis, x, cfg.kernels, cfg.bandwidth)]
            for t in groups
        ]
    else:
        columns = []
        for k in range(cfg.kernels):
            seen = [exact["projection"][k].T @ t for t in groups] if cfg.projection else groups
            distances = [((x - exact["centers"][k]) ** 2).sum() / len(x) for x in seen]
            squared = (
                np.std(distances) if cfg.bandwidth == "spread" else (cfg.bandwidth or 2**0.5) ** 2
            )
            squared = squared * np.exp(exact["log_width"][k]) ** 2
            columns.append([np.exp(-distance / squared) for distance in distances])
        table = np.transpose(columns)
    if cfg.standardize:
        table = (table - np.mean(table, axis=0)) / np.std(table, axis=0)
    return table


def reference(cfg, z, generator):
    """The basis `[n, r]`, a generator and a group at a time."""
    exact = {name: np.asarray(leaf, np.float64) for name, leaf in generator.items()}
    g, count, columns = cfg.group_size, cfg.kernels, []
    groups = reference_groups(cfg, z)
    if cfg.generator == "groupwise" and count:
        features = reference_features(cfg, groups, exact)
    for i in range(cfg.rank):
        column = []
        for j, t in enumerate(groups):
            out = np.zeros(g)
            if cfg.generator == "groupwise":
                for f, value in enumerate(features[j] if count else []):
                    out += value * exact["weights"][i, f]
                if cfg.residual:
                    for m in range(len(t)):
                        out += t[m] * exact["residual"][i, m]
            else:
                for m, x in enumerate(t):
                    if count:
                        phi = scalar_features(cfg.basis, x, count, cfg.bandwidth)
                        out[m] += np.dot(phi, exact["weights"][i, j])
                    if cfg.residual:
                        out[m] += x * exact["residual"][i, j]
            column.append(out)
        column = np.concatenate(column)[: len(z)]
        columns.append(column - column.mean() if cfg.center_basis else column)
    return np.stack(columns, axis=1)


# Compiled as a whole, which is far quicker than an operation at a time.
generate = jax.jit(generators.generate, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def init_generator(cfg, key, z, centers):
    """Side A's generators as they are at first."""
    shapes, shares = generators.weight_shapes(cfg, z.shape[1]), generators.init_shares(cfg)
    zeros = {part: jnp.zeros(shape) for part, shape in shapes.items()}
    normals = {
        part: jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, (part, shape) in enumerate(shapes.items())
        if shares[part] > 0
    }
    trained = centers if cfg.joint and cfg.trainable_centers else {}
    return trained | zeros | generators.init_weights(cfg, normals, z, centers)


def random_generator(cfg, n, seed=0):
    """A latent, and weights of the shapes that generators have, all random."""
    rng = np.random.default_rng(seed)
    z = jnp.asarray(rng.standard_normal(n) + 0.3, jnp.float32)
    centers = generators.fixed_centers(cfg, "test")
    init = init_generator(cfg, jax.random.key(0), z[None], centers)
    return z, {
        name: jnp.asarray(rng.standard_normal(leaf.shape) * 0.5, jnp.float32)
        for name, leaf in init.items()
    }


def check_against_reference(cfg, n=13):
    z, generator = random_generator(cfg, n)
    ours = generate(cfg, z, generator)
    theirs = reference(cfg, z, generator)
    assert ours.dtype == jnp.float32
    assert ours.shape == (n, cfg.rank)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


BASES = [*FAMILIES, None]  # None: no basis functions, the residual alone


def basis_settings(basis):
    return {"kernels": 0} if basis is None else {"kernels": 3, "basis": basis}


@pytest.mark.parametrize("form", ["groupwise", "elementwise"])
@pytest.mark.parametrize("normalize", ["latent", "group", "none"])
@pytest.mark.parametrize(
    ("basis", "residual"),
    [(basis, True) for basis in BASES] + [(family, False) for family in FAMILIES],
)
def test_generate_equals_the_reference(form, normalize, basis, residual):
    check_against_reference(
        gl.GenLoRAConfig(
            rank=3,
            group_size=4,
            generator=form,
            normalize=normalize,
            residual=residual,
            **basis_settings(basis),
        )
    )


@pytest.mark.parametrize("form", ["groupwise", "elementwise"])
@pytest.mark.parametrize("group_size", [1, 2, 5, 13, 16])
@pytest.mark.parametrize("kernels", [1, 4])
def test_generate_equals_the_reference_at_any_group_size(form, group_size, kernels):
    check_against_reference(
        gl.GenLoRAConfig(rank=2, group_size=group_size, kernels=kernels, generator=form)
    )


@pytest.mark.parametrize("form", ["groupwise", "elementwise"])
@pytest.mark.parametrize("changes", [{"bandwidth": 0.7}, {"center_basis": True}, {"eps": 0.5}])
@pytest.mark.parametrize("basis", ["rbf", "bspline"])
def test_generate_equals_the_reference_with_other_settings(form, changes, basis):
    check_against_reference(
        gl.GenLoRAConfig(rank=2, group_size=4, kernels=3, generator=form, basis=basis, **changes)
    )


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("bandwidth", [None, 0.5, "spread"])
@pytest.mark.parametrize("projection", [None, 1, 2])
def test_generate_equals_the_reference_with_well_conditioned_rbfs(
    standardize, bandwidth, projection
):
    cfg = gl.GenLoRAConfig(
        rank=2,
        group_size=4,
        kernels=3,
        bandwidth=bandwidth,
        standardize=standardize,
        projection=projection,
    )
    check_against_reference(cfg, n=30)


@pytest.mark.parametrize("basis", ["fourier", "bspline"])
def test_standardised_features_of_other_families_equal_the_reference(basis):
    cfg = gl.GenLoRAConfig(rank=2, group_size=4, kernels=3, basis=basis, standardize=True)
    check_against_reference(cfg, n=30)


def test_standardised_features_are_finite_where_all_groups_are_alike_or_far_from_the_centres():
    cfg = gl.GenLoRAConfig(
        rank=2, group_size=4, kernels=3, standardize=True, bandwidth=0.25, residual=False
    )
    for n, expected in ((4, 0.0), (40, None)):  # one group alone does not vary
        z, generator = random_generator(cfg, n)
        generator["centers"] = 3 + generator["centers"]
        generator["log_width"] = jnp.zeros(3)

        def power(z, generator=generator):
            return jnp.square(generate(cfg, z, generator)).mean()

        value, gradient = jax.jit(jax.value_and_grad(power))(z)
        assert np.isfinite(gradient).all()
        if expected is None:
            assert float(value) > 0.1
        else:
            assert float(value) == expected


@pytest.mark.parametrize("projection", [None, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_centres_start_at_groups_of_the_latents(shared, projection):
    cfg = gl.GenLoRAConfig(
        rank=2,
        group_size=4,
        kernels=3,
        centers="latents",
        projection=projection,
        share_generators=shared,
    )
    base = {"layers": {"proj": {"kernel": jax.ShapeDtypeStruct((2, 16, 12), np.float32)}}}
    adapter = jax.jit(lambda key: gl.init_adapter(cfg, key, base))(jax.random.key(0)).trainable
    for side in "ab":
        latents = adapter["latents"]["layers.proj"][side]
        weights = adapter["generators"]["layers.proj"][side]
        for s, centers in enumerate(np.asarray(weights["centers"])):
            served = latents if shared else latents[s : s + 1]
            groups = np.concatenate([reference_groups(cfg, z) for z in served])
            for k, center in enumerate(centers):
                seen = groups
                if projection:
                    seen = groups @ np.asarray(weights["projection"][s, k], np.float64)
                assert np.abs(seen - center).max(axis=1).min() < 1e-5
            assert len(np.unique(centers, axis=0)) == cfg.kernels


@pytest.mark.parametrize(
    ("fields", "expected"),
    [  # what is constant of the power, and what of the variance is no line and no norm of a group
        ({}, {"constant": (0.9, 1.0), "not_linear": (0.25, 0.4), "not_norm": (0.0, 0.05)}),
        ({"standardize": True}, {"constant": (0.0, 1e-9), "not_norm": (0.0, 0.05)}),
        ({"bandwidth": 0.5}, {"constant": (0.1, 0.3), "not_norm": (0.5, 0.75)}),
        ({"bandwidth": "spread"}, {"constant": (0.35, 0.65), "not_norm": (0.25, 0.5)}),
        (
            {"bandwidth": "spread", "standardize": True},
            {"constant": (0.0, 1e-9), "not_norm": (0.25, 0.5)},
        ),
        ({"projection": 1}, {"not_norm": (0.35, 0.65)}),
    ],
)
def test_well_conditioned_rbfs_are_no_constant_and_no_line(fields, expected):
    found = rbf_linearity.shares(32, groups=4000, **fields)
    for name, (low, high) in expected.items():
        assert low <= found[name] <= high, (name, found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projection": 5}, "projection must be at most group_size, 4"),
        ({"projection": 2, "basis": "fourier"}, "projection needs kernels"),
        ({"bandwidth": "spread", "generator": "elementwise"}, 'bandwidth="spread" needs'),
        ({"bandwidth": "wide"}, "bandwidth must be"),
        ({"centers": "latents", "kernels": 0}, 'centers="latents" needs kernels'),
        ({"centers": "latents", "trainable_centers": False}, "needs trainable_centers=True"),
        ({"centers": "middle"}, "centers must be"),
        ({"standardize": True, "kernels": 0}, "standardize means nothing without"),
        ({"standardize": True, "generator": "elementwise"}, 'standardize needs generator="group'),
    ],
)
def test_settings_of_rbfs_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        gl.GenLoRAConfig(**({"group_size": 4, "kernels": 3} | fields))


def test_more_centres_than_groups_of_latents_are_refused():
    cfg = gl.GenLoRAConfig(rank=2, group_size=4, kernels=9, centers="latents")
    base = {"layers": {"proj": {"kernel": jax.ShapeDtypeStruct((2, 16, 12), np.float32)}}}
    with pytest.raises(ValueError, match="has 8 groups for 9 centres"):
        jax.eval_shape(lambda: gl.init_adapter(cfg, jax.random.key(0), base))


def test_shared_centres_are_at_groups_of_the_first_target_alone():
    cfg = gl.GenLoRAConfig(
        rank=2, group_size=4, kernels=4, centers="latents", share_across_targets=True
    )

    def start(first, then):
        shapes = {"a_proj": (16, first), "b_proj": (16, then)}
        base = {m: {"kernel": jax.ShapeDtypeStruct(s, np.float32)} for m, s in shapes.items()}
        return gl.init_adapter(cfg, jax.random.key(0), base).trainable

    adapter = start(24, 8)  # whose two groups would be too few
    groups = np.asarray(reference_groups(cfg, adapter["latents"]["a_proj"]["b"][0]))
    for center in adapter["generators"]["shared"]["b"]["centers"][0].tolist():
        assert np.abs(groups - center).max(axis=1).min() < 1e-5
    with pytest.raises(ValueError, match="a_proj/b has 2 groups for 4 centres"):
        start(8, 24)


def test_features_that_one_group_cannot_vary_are_refused():
    cfg = gl.GenLoRAConfig(rank=2, group_size=12, kernels=3, standardize=True)
    base = {"layers": {"proj": {"kernel": jax.ShapeDtypeStruct((2, 16, 12), np.float32)}}}
    with pytest.raises(ValueError, match=r"layers\.proj/b of length 12 .*group_size 12"):
        jax.eval_shape(lambda: gl.init_adapter(cfg, jax.random.key(0), base))


def test_group_normalisation_of_a_lone_last_element_is_zero():
    cfg = gl.GenLoRAConfig(rank=1, group_size=4, normalize="group", eps=0.0)
    t = generators.normalize_latent(cfg, jnp.arange(5.0))
    np.testing.assert_array_equal(t[1], np.zeros(4))
    assert float(jnp.abs(t[0]).min()) > 0


@few
@given(
    g=st.integers(1, 8),
    width=st.floats(0.2, 3.0),
    distance=st.floats(0.0, 4.0),
    seed=st.integers(0, 10_000),
)
def test_gaussian_rbf_and_its_gradient_are_bounded(g, width, distance, seed):
    rng = np.random.default_rng(seed)
    center, direction = rng.standard_normal((2, g))
    # Distances in units of the width: at 1 / sqrt(2) of them the gradient is at its bound.
    reach = distance * width * math.sqrt(g) * direction / np.linalg.norm(direction)
    t = jnp.asarray(center + reach, jnp.float32)
    centers = jnp.asarray(center[None], jnp.float32)

    def phi(t):
        return gaussian_rbf(t, centers, jnp.array([width], jnp.float32))

    assert 0 <= float(phi(t)[0]) <= 1
    bound = math.sqrt(2 / (math.e * g)) / width
    assert np.linalg.norm(jax.jacobian(phi)(t)) <= bound * (1 + 1e-5)


def test_the_gradient_bound_of_gaussian_rbf_is_attained():
    g, width = 4, 0.8
    t = jnp.full(g, width / math.sqrt(2), jnp.float32)
    grad = jax.jacobian(lambda t: gaussian_rbf(t, jnp.zeros((1, g)), jnp.array([width])))(t)
    np.testing.assert_allclose(np.linalg.norm(grad), math.sqrt(2 / (math.e * g)) / width, rtol=1e-5)


@few
@given(
    shift=st.floats(-4, 4), seed=st.integers(0, 1000), scope=st.sampled_from(["latent", "group"])
)
def test_a_basis_does_not_change_with_a_shift_of_the_latent(shift, seed, scope):
    cfg = gl.GenLoRAConfig(rank=2, group_size=4, kernels=3, normalize=scope)
    z, generator = random_generator(cfg, 12, seed)
    before, after = (np.asarray(generate(cfg, row, generator)) for row in (z, z + shift))
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())


@few
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_a_basis_does_not_change_with_the_scale_of_the_latent_without_eps(scale, seed):
    cfg = gl.GenLoRAConfig(rank=2, group_size=4, kernels=3, eps=0.0)
    z, generator = random_generator(cfg, 12, seed)
    before, after = (np.asarray(generate(cfg, row, generator)) for row in (z, scale * z))
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())


@pytest.mark.parametrize(
    ("form", "rank", "n", "group_size", "kernels", "expected"),
    [
        ("groupwise", 20, 256, 4, 3, 20),  # r
        ("groupwise", 40, 18, 4, 3, 18),  # n
        ("groupwise", 40, 256, 4, 3, 4 * (4 + 3)),
        ("groupwise", 12, 256, 2, 2, 2 * (2 + 2)),
        ("elementwise", 6, 128, 32, 3, 6),  # r
        ("elementwise", 30, 10, 2, 3, 10),  # n
        ("elementwise", 24, 256, 64, 3, 4 * (3 + 1)),
        ("elementwise", 24, 256, 128, 2, 2 * (2 + 1)),
    ],
)
def test_rank_of_a_side_is_the_attainable_one(form, rank, n, group_size, kernels, expected):
    cfg = gl.GenLoRAConfig(
        rank=rank, group_size=group_size, kernels=kernels, generator=form, rbf_init=0.5
    )
    z = jax.random.normal(jax.random.key(1), (1, n))
    generator = init_generator(cfg, jax.random.key(2), z, generators.fixed_centers(cfg, "x"))
    if cfg.joint:
        generator = generators.fixed_centers(cfg, "x") | generator
    basis = np.asarray(generate(cfg, z[0], generator), np.float64)
    values = np.linalg.svd(basis, compute_uv=False)
    # Float32 rounding leaves about 1e-7 of the largest value where there is nothing.
    assert int((values > 3e-6 * values[0]).sum()) == expected


@pytest.mark.parametrize("form", ["groupwise", "elementwise"])
@pytest.mark.parametrize("normalize", ["latent", "group", "none"])
@pytest.mark.parametrize("rbf_init", [0.0, 0.5, 1.0])
def test_side_a_starts_with_variance_one_over_d_in_and_side_b_at_zero(form, normalize, rbf_init):
    n, layers = 256, 3
    cfg = gl.GenLoRAConfig(
        rank=32,
        group_size=8,
        kernels=4,
        generator=form,
        normalize=normalize,
        rbf_init=rbf_init,
    )
    base = {"layers": {"proj": {"kernel": jnp.zeros((layers, n, 80))}}}

    @jax.jit
    def init(key):
        return gl.generate_factors(cfg, gl.init_adapter(cfg, key, base))

    factors = init(jax.random.key(3))
    side_a, side_b = (np.asarray(factors["layers"]["proj"][side]) for side in "ab")
    # 32 generators of some 32 groups each (or 8 x 8 weights): a standard deviation of 5 % or so.
    assert n * np.square(side_a).mean() == pytest.approx(1.0, rel=0.25)
    assert not side_b.any()


def test_basis_functions_carry_their_share_of_the_initial_variance():
    z = jax.random.normal(jax.random.key(0), (1, 512))
    powers = []
    for part in ("weights", "residual"):
        cfg = gl.GenLoRAConfig(rank=256, group_size=8, kernels=4, rbf_init=0.25)
        centers = generators.fixed_centers(cfg, "x")
        generator = init_generator(cfg, jax.random.key(1), z, centers)
        generator[part] = jnp.zeros_like(generator[part])
        powers.append(512 * float(jnp.square(generate(cfg, z[0], generator)).mean()))
    assert powers == pytest.approx([0.75, 0.25], rel=0.15)


# What is rebuilt from the seed must be the same bits in every process. The script is run in this
# process's settings and in others; it prints digests of the bits.
REBUILT = """
import hashlib, json
import jax, numpy as np
import genlora_jax as gl
from genlora_jax.seeded_random import seeded_normal, seeded_uniform

digest = lambda x: [str(x.dtype), hashlib.sha256(np.asarray(x).tobytes()).hexdigest()]
base = {"layers": {"proj": {"kernel": jax.ShapeDtypeStruct((2, 12, 20), np.float32)}}}
out = {"normal": digest(seeded_normal(7, "name", (5, 9)))}
out["uniform"] = digest(seeded_uniform(7, "name", (5, 9), 0.5))
for form in ("groupwise", "elementwise"):
    cfg = gl.GenLoRAConfig(
        rank=4, group_size=4, kernels=3, generator=form, latents="seeded",
        trainable_centers=False, seed=11,
    )
    adapter = gl.init_adapter(cfg, jax.random.key(0), base)
    out[form + " leaves"] = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(adapter)})
    filled = jax.tree.map(
        lambda leaf: np.sin(np.arange(leaf.size)).reshape(leaf.shape).astype(np.float32), adapter
    )
    for side, value in gl.generate_factors(cfg, filled)["layers"]["proj"].items():
        out[form + " " + side] = digest(value)
print(json.dumps(out))
"""


def rebuilt_in_another_process(**environment):
    script = subprocess.run(
        [sys.executable, "-c", REBUILT],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(script.stdout)


@pytest.fixture(scope="module")
def rebuilt_by_default():
    return rebuilt_in_another_process()


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_DEFAULT_PRNG_IMPL": "rbg"},
        {"JAX_ENABLE_X64": "1"},
    ],
    ids=["random_bits", "x64"],
)
def test_what_is_rebuilt_from_the_seed_does_not_depend_on_settings(rebuilt_by_default, environment):
    assert rebuilt_in_another_process(**environment) == rebuilt_by_default


def test_seeded_numbers_are_those_of_this_process_too(rebuilt_by_default):
    here = np.asarray(seeded_normal(7, "name", (5, 9)))
    assert rebuilt_by_default["normal"][1] == hashlib.sha256(here.tobytes()).hexdigest()
    assert not np.array_equal(here, seeded_normal(8, "name", (5, 9)))
    assert not np.array_equal(here, seeded_normal(7, "other", (5, 9)))


def equations(jaxpr):
    """All equations of a jaxpr, those of inner ones as well."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def factor_equations(cfg, base):
    adapter = jax.eval_shape(lambda: gl.init_adapter(cfg, jax.random.key(0), base))
    traced = jax.make_jaxpr(lambda adapter: gl.generate_factors(cfg, adapter))(adapter)
    return list(equations(traced.jaxpr))


@pytest.mark.parametrize("form", ["groupwise", "elementwise"])
@pytest.mark.parametrize("share", [True, False])
def test_a_side_of_a_target_is_one_product_for_all_layers(form, share):
    cfg = gl.GenLoRAConfig(
        rank=3, group_size=4, kernels=3, generator=form, rbf_init=0.5, share_generators=share
    )
    found = factor_equations(cfg, {"layers": {"proj": {"kernel": jnp.zeros((5, 12, 20))}}})
    assert sum(e.primitive.name == "dot_general" for e in found) == 2


def test_features_of_shared_latents_are_computed_once_for_all_layers():
    cfg = gl.GenLoRAConfig(
        rank=3,
        group_size=4,
        kernels=3,
        generator="elementwise",
        share_generators=False,
        share_latents=True,
    )
    found = factor_equations(cfg, {"layers": {"proj": {"kernel": jnp.zeros((5, 12, 20))}}})
    exponentials = sum(e.outvars[0].aval.size for e in found if e.primitive.name == "exp")
    assert exponentials == (12 + 20) * cfg.kernels


@pytest.mark.parametrize("form", ["groupwise", "elementwise"])
@pytest.mark.parametrize("normalize", ["latent", "group", "none"])
@pytest.mark.parametrize("basis", BASES)
def test_gradients_are_finite_even_where_a_latent_is_constant(form, normalize, basis):
    cfg = gl.GenLoRAConfig(
        rank=2, group_size=4, generator=form, normalize=normalize, **basis_settings(basis)
    )
    z, generator = random_generator(cfg, 13)

    @jax.jit
    def grads(z, generator):
        return jax.grad(
            lambda z, generator: jnp.square(generate(cfg, z, generator) - 1).sum(), (0, 1)
        )(z, generator)

    for latent in (z, jnp.zeros(13), jnp.full(13, 0.7), z.at[4:8].set(0.5)):
        for leaf in jax.tree.leaves(grads(latent, generator)):
            assert np.isfinite(leaf).all()
    assert float(jnp.abs(grads(z, generator)[0]).max()) > 0


@pytest.mark.parametrize("form", ["groupwise", "elementwise"])
def test_a_family_that_is_registered_works_from_a_recipe(form, monkeypatch, tmp_path):
    def powers(t, count, bandwidth):
        return jnp.stack([t**k for k in range(1, count + 1)], axis=-1)

    monkeypatch.setitem(FAMILIES, "powers", Family(powers))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: base}\ndata: {train: rows.jsonl}\ntrain: {output: run}\n"
        "adapter: {rank: 2, group_size: 4, kernels: 3, basis: powers, residual: false, "
        f"rbf_init: 1.0, generator: {form}}}\n"
    )
    cfg = parse(Recipe, ["--config", str(recipe)]).adapter
    assert (type(cfg), cfg.basis, cfg.kernels) == (gl.GenLoRAConfig, "powers", 3)
    z, generator = random_generator(cfg, 12)
    exact = np.asarray(generator["weights"], np.float64)
    t = np.stack(reference_groups(cfg, z))
    phi = t[..., None] ** np.arange(1, 4)
    if form == "groupwise":
        expected = np.einsum("jf,rfm->jmr", phi.reshape(3, -1), exact).reshape(-1, 2)
    else:
        expected = np.einsum("jmk,rjk->jmr", phi, exact).reshape(-1, 2)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(
        generators.generate(cfg, z, generator), expected, atol=1e-5 * largest
    )
