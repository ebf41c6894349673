"""Adapters: configs, targets, sizes, factors."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import perturb, random_llama, unstack

import genlora_jax as gl
from genlora_jax.analysis import parameters_by_target
from genlora_jax.generators import generate as generate_basis
from genlora_jax.methods import config_from_json, config_to_json
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes
from genlora_jax.targets import find_targets

L, D_IN, D_OUT = 5, 22, 30
SMALL = {"rank": 3, "group_size": 4, "kernels": 2}


def stacked(layers=L, d_in=D_IN, d_out=D_OUT):
    return {"layers": {"proj": {"kernel": jax.ShapeDtypeStruct((layers, d_in, d_out), np.float32)}}}


def count(cfg, params=None):
    def init():
        return gl.init_adapter(cfg, jax.random.key(0), params or stacked())

    return gl.count_parameters(jax.eval_shape(init))


def groups(n, g=4):
    return -(-n // g)


# Sizes.


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_groupwise_adapters_have_the_parameters_of_the_formula(shared, fixed):
    r, g, k, s = 3, 4, 2, 1 if shared else L
    cfg = gl.GenLoRAConfig(**SMALL, share_generators=shared, trainable_centers=not fixed)
    generators = r * (g * k + g * g) + (0 if fixed else k * (g + 1))
    assert count(cfg) == L * (D_IN + D_OUT) + 2 * s * generators


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_elementwise_adapters_have_the_parameters_of_the_formula(shared, fixed):
    r, k, s = 3, 2, 1 if shared else L
    cfg = gl.GenLoRAConfig(
        **SMALL, generator="elementwise", share_generators=shared, trainable_centers=not fixed
    )
    assert count(cfg) == L * (D_IN + D_OUT) + s * r * (k + 1) * (groups(D_IN) + groups(D_OUT))


def test_scalar_families_have_features_of_every_coordinate():
    r, g, k = 3, 4, 2
    cfg = gl.GenLoRAConfig(**SMALL, basis="fourier")
    assert count(cfg) == L * (D_IN + D_OUT) + 2 * r * (g * k * g + g * g)


def test_seeded_latents_are_not_parameters():
    whole = gl.GenLoRAConfig(**SMALL)
    seeded = dataclasses.replace(whole, latents="seeded")
    assert count(whole) - count(seeded) == L * (D_IN + D_OUT)


def test_shared_latents_are_one_row_a_side():
    one_each = gl.GenLoRAConfig(**SMALL, share_generators=False)
    shared = dataclasses.replace(one_each, share_latents=True)
    assert count(one_each) - count(shared) == (L - 1) * (D_IN + D_OUT)


def test_lora_stores_both_factors_or_b_alone():
    assert count(gl.LoRAConfig(rank=3)) == L * 3 * (D_IN + D_OUT)
    assert count(gl.LoRAConfig(rank=3, side_a="seeded")) == L * 3 * D_OUT


def test_nothing_of_a_seeded_side_a_is_a_parameter():
    r, g, k = 3, 4, 2
    cfg = gl.GenLoRAConfig(**SMALL, side_a="seeded")
    assert count(cfg) == L * D_OUT + r * (g * k + g * g) + k * (g + 1)


def test_gates_are_one_for_each_basis_vector_of_each_layer():
    cfg = gl.GenLoRAConfig(**SMALL)
    assert count(dataclasses.replace(cfg, gates=True)) - count(cfg) == L * 3


def test_llama_3_8b_has_the_parameters_that_the_design_states():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=500000.0,
    )
    shapes = parameter_shapes(LlamaForCausalLM(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 8_030_261_248
    cfg = gl.GenLoRAConfig(rank=32, group_size=16, kernels=8)
    generators = 7 * 2 * (32 * (16 * 8 + 16 * 16) + 8 * 17)
    assert count(cfg, shapes) == 2_621_440 + generators
    assert round(count(cfg, shapes) / 1e6, 2) == 2.80
    assert round(generators / 1e6, 2) == 0.17
    assert count(gl.LoRAConfig(rank=32), shapes) == 83_886_080
    assert count(gl.LoRAConfig(rank=1), shapes) == 2_621_440


# Factors. Compiled as a whole, which is far quicker than an operation at a time.

generate = jax.jit(gl.generate_factors, static_argnums=0)


def init(cfg, params):
    return jax.jit(lambda key: gl.init_adapter(cfg, key, params))(jax.random.key(0))


CONFIGS = {
    "groupwise": gl.GenLoRAConfig(**SMALL, rbf_init=0.5),
    "elementwise": gl.GenLoRAConfig(**SMALL, generator="elementwise", rbf_init=0.5),
    "unshared": gl.GenLoRAConfig(**SMALL, share_generators=False),
    "shared_latents": gl.GenLoRAConfig(**SMALL, share_generators=False, share_latents=True),
    "seeded": gl.GenLoRAConfig(**SMALL, latents="seeded", trainable_centers=False),
    "linear": gl.GenLoRAConfig(**SMALL | {"kernels": 0}),
    "fourier": gl.GenLoRAConfig(**SMALL, basis="fourier", rbf_init=0.5),
    "across_targets": gl.GenLoRAConfig(**SMALL, share_across_targets=True, rbf_init=0.5),
    "gates": gl.GenLoRAConfig(**SMALL, share_across_targets=True, gates=True),
    "lora": gl.LoRAConfig(rank=3),
    "random_a": gl.GenLoRAConfig(**SMALL, share_across_targets=True, side_a="seeded"),
    "random_a_elementwise": gl.GenLoRAConfig(**SMALL, generator="elementwise", side_a="seeded"),
    "lora_fa": gl.LoRAConfig(rank=3, side_a="seeded"),
}
every_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)


@every_config
def test_factors_have_the_shapes_of_their_kernels_and_a_delta_of_zero(cfg):
    adapter = init(cfg, stacked())
    factors = generate(cfg, adapter)["layers"]["proj"]
    assert factors["a"].shape == (L, D_IN, cfg.rank)
    assert factors["b"].shape == (L, cfg.rank, D_OUT)
    assert {leaf.dtype for leaf in jax.tree.leaves((adapter, factors))} == {jnp.dtype("float32")}
    assert np.abs(factors["a"]).max() > 0
    assert not np.asarray(factors["b"]).any()


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (gl.LoRAConfig(rank=3, alpha=2.0), "alpha is 2.0, not 16.0"),
        (gl.LoRAConfig(rank=2), "rank is 2, not 3"),
        (gl.LoRAConfig(rank=3, scaling="rslora"), "scaling is 'rslora', not 'lora'"),
        (gl.LoRAConfig(rank=3, hadamard=True), "hadamard is True, not False"),
        (gl.DoRAConfig(rank=3), "method is 'DoRAConfig', not 'LoRAConfig'"),
        (gl.GenLoRAConfig(rank=3), "method is 'GenLoRAConfig', not 'LoRAConfig'"),
    ],
)
def test_a_config_that_is_not_the_adapter_s_is_refused_by_its_field(cfg, message, tmp_path):
    adapter = gl.init_adapter(gl.LoRAConfig(rank=3), jax.random.key(0), stacked())
    with pytest.raises(ValueError, match=f"not the one that the adapter.*{message}"):
        gl.generate_factors(cfg, adapter)
    with pytest.raises(ValueError, match=f"not the one that the adapter.*{message}"):
        gl.save_adapter(tmp_path / "adapter", cfg, adapter)
    assert not (tmp_path / "adapter").exists()


def test_dropout_may_differ_from_the_adapter_s():
    adapter = perturb(gl.init_adapter(gl.LoRAConfig(rank=3), jax.random.key(0), stacked()))
    ours = gl.generate_factors(gl.LoRAConfig(rank=3, dropout=0.5), adapter)
    jax.tree.map(np.testing.assert_array_equal, ours, gl.generate_factors(adapter.config, adapter))


@every_config
def test_factors_under_jit_equal_those_without(cfg):
    adapter = perturb(init(cfg, stacked()))
    eager = gl.generate_factors(cfg, adapter)
    jitted = generate(cfg, adapter)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    for ours, theirs in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "cfg",
    [pytest.param(cfg, id=name) for name, cfg in CONFIGS.items() if cfg.side_a == "trained"],
)
def test_adapters_of_many_keys_under_vmap_equal_those_one_by_one(cfg):
    keys = jax.random.split(jax.random.key(4), 3)

    @jax.jit
    def side_a(key):
        adapter = gl.init_adapter(cfg, key, stacked())
        return generate(cfg, adapter)["layers"]["proj"]["a"]

    together = jax.jit(jax.vmap(side_a))(keys)
    assert together.shape == (3, L, D_IN, cfg.rank)
    for key, one in zip(keys, together, strict=True):
        np.testing.assert_allclose(one, side_a(key), rtol=1e-5, atol=1e-6)
    assert not np.allclose(together[0], together[1])


@every_config
def test_gradients_reach_every_trained_leaf_and_are_finite(cfg):
    adapter = perturb(init(cfg, stacked()))

    def loss(adapter):
        factors = generate(cfg, adapter)["layers"]["proj"]
        return jnp.square(factors["a"] @ factors["b"] - 1).sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(adapter)):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


@every_config
def test_rank_of_a_delta_is_at_most_that_of_the_config(cfg):
    adapter = perturb(init(cfg, stacked()))
    factors = generate(cfg, adapter)["layers"]["proj"]
    deltas = np.asarray(factors["a"], np.float64) @ np.asarray(factors["b"], np.float64)
    for delta in deltas:
        assert np.linalg.matrix_rank(delta, tol=1e-5 * np.linalg.norm(delta)) == cfg.rank


def test_the_scale_is_folded_into_b():
    cfg = gl.GenLoRAConfig(rank=4, group_size=4, kernels=2, alpha=6.0)
    plain = dataclasses.replace(cfg, alpha=4.0)
    rslora = dataclasses.replace(cfg, scaling="rslora")
    adapter = perturb(init(cfg, stacked()))
    unit, ours, theirs = (
        generate(c, adapter.with_config(c))["layers"]["proj"] for c in (plain, cfg, rslora)
    )
    np.testing.assert_allclose(ours["b"], 6 / 4 * unit["b"], rtol=1e-6)
    np.testing.assert_allclose(theirs["b"], 6 / 2 * unit["b"], rtol=1e-6)
    for factors in (ours, theirs):
        np.testing.assert_array_equal(factors["a"], unit["a"])


@pytest.mark.parametrize("name", ["seeded", "random_a", "lora_fa"])
def test_the_seed_alone_decides_what_is_rebuilt(name):
    cfg = CONFIGS[name]
    adapter = init(cfg, stacked())
    same = adapter.with_config(dataclasses.replace(cfg, seed=1))
    first, second = (generate(a.config, a)["layers"]["proj"]["a"] for a in (adapter, same))
    assert not np.allclose(first, second)


def test_a_random_side_a_has_the_variance_of_a_trained_one():
    """NumPy's moments: `1 / d_in` for GenLoRA, a third of that for LoRA (uniform)."""
    params = stacked(4, 256, 8)
    for cfg, expected in (
        (gl.GenLoRAConfig(rank=8, group_size=4, side_a="seeded"), 1 / 256),
        (gl.LoRAConfig(side_a="seeded"), 1 / (3 * 256)),
    ):
        a = np.asarray(generate(cfg, init(cfg, params))["layers"]["proj"]["a"], np.float64)
        assert a.mean() == pytest.approx(0, abs=5 * np.sqrt(expected / a.size))
        assert a.var() == pytest.approx(expected, rel=0.1)
        layers = a.reshape(4, -1)
        assert np.abs(np.corrcoef(layers) - np.eye(4)).max() < 0.1  # no two layers share one


def test_gates_weight_the_basis_vectors_of_their_kernel():
    cfg = CONFIGS["gates"]
    adapter = perturb(init(cfg, stacked()))
    open_gates = jax.tree.map(jnp.ones_like, adapter.trainable["gates"])
    plain = adapter.replace(trainable=adapter.trainable | {"gates": open_gates})
    ours, theirs = (generate(cfg, gated)["layers"]["proj"] for gated in (adapter, plain))
    (gates,) = adapter.trainable["gates"].values()
    np.testing.assert_array_equal(ours["a"], theirs["a"])
    np.testing.assert_allclose(
        ours["b"], np.asarray(gates)[:, :, None] * theirs["b"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("cfg", list(CONFIGS.values()), ids=list(CONFIGS))
@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_scanned_and_unrolled_bases_have_the_same_adapter(cfg, layers):
    # Two targets: one wide, one narrow. Each is a program of its own to compile.
    cfg = dataclasses.replace(cfg, layers=layers, targets=["k_proj", "down_proj"])
    (_, scanned), (_, unrolled) = random_llama(scan=True), random_llama(scan=False)
    ours = init(cfg, scanned)
    theirs = init(cfg, unrolled)
    jax.tree.map(np.testing.assert_array_equal, ours.trainable, theirs.trainable)
    assert ours.spec.fingerprint == theirs.spec.fingerprint
    moved = perturb(ours)
    theirs = dataclasses.replace(moved, spec=theirs.spec)
    # As users compile: the older emitters round by what surrounds a number.
    exactly = jax.jit(
        gl.generate_factors,
        static_argnums=0,
        compiler_options={"xla_cpu_use_fusion_emitters": True},
    )
    whole = flatten_dict(unstack(exactly(cfg, moved)))
    single = flatten_dict(exactly(cfg, theirs))
    for path, leaf in single.items():
        np.testing.assert_array_equal(leaf, whole.pop(path))
    # What an unrolled tree leaves out, a scanned one has as zeros.
    assert {path[2] for path in whole} == (set() if layers is None else {"1"})
    assert not any(np.asarray(leaf).any() for leaf in whole.values())


def test_unrolled_layers_share_their_generators():
    _, params = random_llama(scan=False)
    cfg = gl.GenLoRAConfig(**SMALL)
    adapter = init(cfg, params)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(adapter.trainable["generators"])} == {1}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(adapter.trainable["latents"])} == {3}


def test_generators_that_targets_share_are_counted_once():
    _, params = random_llama()
    r, g, k = 3, 4, 2
    cfg = gl.GenLoRAConfig(**SMALL, share_across_targets=True)
    sides = sum(t.depth * (t.d_in + t.d_out) for t in find_targets(cfg, params))
    assert count(cfg, params) == sides + 2 * (r * (g * k + g * g) + k * (g + 1))


def test_targets_that_share_generators_make_their_factors_with_them():
    _, params = random_llama()
    names = ["q_proj", "gate_proj", "down_proj"]
    cfg = gl.GenLoRAConfig(**SMALL, targets=names, share_across_targets=True)
    adapter = perturb(init(cfg, params))
    factors = {
        path[-2]: leaf
        for path, leaf in flatten_dict(generate(cfg, adapter)).items()
        if path[-1] == "a"
    }
    generators, latents = adapter.trainable["generators"], adapter.trainable["latents"]
    assert list(generators) == ["shared"]
    counts = parameters_by_target(adapter)
    assert sum(counts.values()) == gl.count_parameters(adapter)
    assert counts["shared"] == sum(leaf.size for leaf in jax.tree.leaves(generators))
    shared = jax.tree.map(lambda leaf: leaf[0], generators["shared"]["a"])
    for name, leaves in latents.items():
        # The generators are scaled for the first target by name.
        scale = np.sqrt(factors["down_proj"].shape[1] / leaves["a"].shape[1])
        basis = jax.vmap(lambda z: generate_basis(cfg, z, shared))(leaves["a"])
        np.testing.assert_allclose(
            factors[name.rsplit(".", 1)[1]], scale * basis, rtol=1e-5, atol=1e-6
        )


# The attainable rank.


@pytest.mark.parametrize(
    ("cfg", "limit"),
    [
        (gl.GenLoRAConfig(rank=25, group_size=4, kernels=2, targets="proj"), 4 * (4 + 2)),
        (gl.GenLoRAConfig(rank=17, group_size=4), 4 * 4),
        (gl.GenLoRAConfig(rank=49, group_size=4, kernels=2, basis="fourier"), 4 * (4 * 2 + 4)),
        (gl.GenLoRAConfig(rank=9, group_size=4, kernels=2, residual=False), 4 * 2),
        (gl.GenLoRAConfig(rank=13, group_size=16, kernels=2, generator="elementwise"), 4 * 3),
        (gl.LoRAConfig(rank=65), 64),
    ],
)
def test_a_rank_above_the_attainable_one_warns_and_one_at_it_does_not(cfg, limit):
    params = stacked(2, 64, 64)
    with pytest.warns(UserWarning, match=f"rank {cfg.rank} exceeds {limit}"):
        count(cfg, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count(dataclasses.replace(cfg, rank=limit), params)


def test_only_its_length_limits_the_rank_of_a_random_side_a():
    params = stacked(2, 16, 64)
    cfg = gl.GenLoRAConfig(rank=4, group_size=16, kernels=2, generator="elementwise")
    with pytest.warns(UserWarning, match="rank 4 exceeds 3, the rank that a side of length 16"):
        count(cfg, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count(dataclasses.replace(cfg, side_a="seeded"), params)


# Configs.


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("rank", {"rank": 0}),
        ("rank", {"rank": 2.0}),
        ("rank", {"rank": True}),
        ("alpha", {"alpha": 0.0}),
        ("alpha", {"alpha": float("nan")}),
        ("scaling", {"scaling": "sqrt"}),
        ("targets", {"targets": []}),
        ("targets", {"targets": [3]}),
        ("targets", {"targets": None}),
        ("exclude", {"exclude": [None]}),
        ("layers", {"layers": []}),
        ("layers", {"layers": [-1]}),
        ("layers", {"layers": ["1"]}),
        ("layers", {"layers": 2}),
        ("dropout", {"dropout": 1.0}),
        ("dropout", {"dropout": -0.1}),
        ("seed", {"seed": -1}),
        ("group_size", {"group_size": 0}),
        ("kernels", {"kernels": -1}),
        ("kernels", {"kernels": None}),
        ("kernels", {"kernels": 2.0}),
        ("generator", {"generator": "rowwise"}),
        ("basis", {"basis": "wavelet"}),
        ("basis", {"basis": None}),
        ("basis", {"basis": "auto"}),
        ("basis", {"basis": "fourier"}),
        ("residual", {"residual": False}),
        ("normalize", {"normalize": "batch"}),
        ("normalize", {"normalize": "group", "group_size": 1}),
        ("latents", {"latents": "frozen"}),
        ("share_latents", {"share_latents": True, "share_generators": True}),
        ("latent_std", {"latent_std": 0.0}),
        ("rbf_init", {"rbf_init": 1.5, "kernels": 2}),
        ("rbf_init", {"rbf_init": 0.5}),
        ("rbf_init", {"rbf_init": -0.5}),
        ("eps", {"eps": -1e-6}),
        ("eps", {"eps": "small"}),
        ("bandwidth", {"bandwidth": 0.0, "kernels": 2}),
        ("bandwidth", {"bandwidth": 1.0}),
        ("bandwidth", {"bandwidth": 1.0, "basis": "fourier", "kernels": 2}),
        ("side_a", {"side_a": "frozen"}),
        ("share_across_targets", {"share_across_targets": True, "share_generators": False}),
        ("share_across_targets", {"share_across_targets": True, "generator": "elementwise"}),
    ],
)
def test_a_value_that_a_field_does_not_take_raises_and_names_the_field(field, changes):
    with pytest.raises(ValueError, match=field):
        gl.GenLoRAConfig(**changes)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kernels": 4},
        {"kernels": 4, "rbf_init": 0.5},
        {"kernels": 4, "residual": False},
        {"kernels": 4, "basis": "fourier"},
    ],
)
def test_there_are_basis_functions_where_kernels_asks_for_them(fields):
    cfg = gl.GenLoRAConfig(rank=3, group_size=4, **fields)
    weights = init(cfg, stacked()).trainable["generators"]["layers.proj"]["a"]
    assert ("weights" in weights) == ("kernels" in fields)
    assert ("residual" in weights) == cfg.residual


def test_replacing_a_field_keeps_nothing_that_was_guessed():
    cfg = gl.GenLoRAConfig(kernels=4)
    assert dataclasses.replace(cfg, kernels=0) == gl.GenLoRAConfig()
    assert dataclasses.replace(gl.GenLoRAConfig(), kernels=4) == cfg
    assert (gl.GenLoRAConfig().kernels, gl.GenLoRAConfig().basis) == (0, "rbf")


@pytest.mark.parametrize(
    "cfg",
    [
        gl.GenLoRAConfig(),
        gl.GenLoRAConfig(
            rank=5,
            alpha=3.5,
            scaling="rslora",
            targets=["q_proj", r".*\.mlp\..*"],
            exclude=["up_proj"],
            layers=[2, 0, 2],
            dropout=0.25,
            kernels=4,
            basis="chebyshev",
            share_generators=False,
            share_latents=True,
            bandwidth=None,
            seed=9,
        ),
        gl.LoRAConfig(rank=2, targets="v_proj"),
    ],
)
def test_configs_come_back_from_json_equal_and_hashable(cfg):
    back = config_from_json(json.loads(json.dumps(config_to_json(cfg))))
    assert back == cfg
    assert type(back) is type(cfg)
    assert hash(back) == hash(cfg)


def test_json_with_an_unknown_field_or_method_raises_and_names_it():
    data = config_to_json(gl.GenLoRAConfig())
    with pytest.raises(ValueError, match="GenLoRAConfig has no field depth, width"):
        config_from_json(data | {"width": 1, "depth": 2})
    with pytest.raises(ValueError, match="unknown method 'adalora'"):
        config_from_json(data | {"method": "adalora"})
    with pytest.raises(ValueError, match="rank"):
        config_from_json(data | {"rank": 0})


# Targets.

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]


@pytest.fixture
def llama_shapes():
    return random_llama()[1]


def names(params, **changes):
    found = find_targets(gl.LoRAConfig(rank=2, **changes), params)
    return [target.name.rsplit(".", 1)[-1] for target in found]


def test_all_linear_is_every_dense_but_the_head(llama_shapes):
    assert sorted(names(llama_shapes)) == sorted(ATTENTION + MLP)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"targets": ["q_proj", "v_proj"]}, ["q_proj", "v_proj"]),
        ({"targets": "q_proj"}, ["q_proj"]),
        ({"targets": ["self_attn.q_proj"]}, ["q_proj"]),
        ({"targets": ["model.layers.self_attn.q_proj"]}, ["q_proj"]),
        ({"targets": [r".*\.self_attn\.[qk]_proj"]}, ["k_proj", "q_proj"]),
        ({"targets": [r".*\.mlp\..*"]}, MLP),
        ({"targets": ["lm_head"]}, ["lm_head"]),
        ({"exclude": [r".*\.mlp\..*"]}, ATTENTION),
        ({"exclude": "o_proj", "targets": [r".*self_attn.*"]}, ["k_proj", "q_proj", "v_proj"]),
    ],
)
def test_patterns_are_names_or_regular_expressions(llama_shapes, changes, expected):
    assert sorted(names(llama_shapes, **changes)) == expected


@pytest.mark.parametrize("field", ["targets", "exclude"])
@pytest.mark.parametrize("pattern", ["proj", "q", "layers.0.self_attn.q_proj", "w1"])
def test_a_pattern_that_matches_nothing_raises_and_lists_what_there_is(
    llama_shapes, field, pattern
):
    with pytest.raises(ValueError, match=f"{field}: '{pattern}'.*model.layers.mlp.up_proj"):
        names(llama_shapes, **{field: [pattern]})


def test_what_is_no_regular_expression_raises(llama_shapes):
    with pytest.raises(ValueError, match=r"targets.*no regular expression"):
        names(llama_shapes, targets=["*proj"])


def test_excluding_every_target_raises(llama_shapes):
    with pytest.raises(ValueError, match="exclude"):
        names(llama_shapes, targets=["q_proj"], exclude=["q_proj"])


@pytest.mark.parametrize("scan", [True, False])
def test_layers_that_the_base_does_not_have_raise(scan):
    _, params = random_llama(scan=scan)
    with pytest.raises(ValueError, match=r"layers: 3, 7 not in the base.*0 to 2$"):
        names(params, layers=[1, 3, 7])


def test_a_base_without_kernels_raises():
    with pytest.raises(ValueError, match="no kernel"):
        find_targets(gl.LoRAConfig(), {"norm": {"scale": jnp.ones(3)}})


def test_kernels_of_one_name_and_two_shapes_share_nothing():
    params = {
        f"layers_{i}": {"proj": {"kernel": jax.ShapeDtypeStruct((8, width), np.float32)}}
        for i, width in enumerate((12, 16, 12))
    }
    adapter = init(gl.LoRAConfig(rank=2), params)
    assert [(t.d_out, t.depth) for t in adapter.spec.targets] == [(12, 2), (16, 1)]
    factors = generate(gl.LoRAConfig(rank=2), adapter)
    assert {k: v["proj"]["b"].shape for k, v in factors.items()} == {
        "layers_0": (2, 12),
        "layers_1": (2, 16),
        "layers_2": (2, 12),
    }


def test_layers_ten_and_more_stay_in_their_order():
    params = {
        f"layers_{i}": {"proj": {"kernel": jax.ShapeDtypeStruct((6, 8), np.float32)}}
        for i in range(12)
    }
    cfg = gl.LoRAConfig(rank=2)
    adapter = init(cfg, params)
    factors = generate(cfg, adapter)
    (stack,) = adapter.trainable["factors"].values()
    for i in range(12):
        np.testing.assert_array_equal(factors[f"layers_{i}"]["proj"]["a"], stack["a"][i])
