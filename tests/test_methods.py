"""Leaves of factors other than A and B, on meshes and in part of a model, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from baseline_methods import EPS, METHODS, TARGETS, close
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from tiny_models import perturb, random_llama, unstack

import genlora_jax as gl
from genlora_jax import sharding
from genlora_jax.adapter import adapter_shapes, adapter_spec
from genlora_jax.factors.dora import adapted_column_norm
from genlora_jax.mesh import MeshConfig, make_mesh
from genlora_jax.methods import config_from_json, config_to_json
from genlora_jax.training.losses import cross_entropy
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.step_options import StepOptions

IDS = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)


# On a mesh.

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8}


def test_magnitudes_gains_and_deltas_on_a_mesh_are_those_of_one_device():
    model, params = random_llama(attention="xla", attention_bias=True, vocab_size=64, **WIDE)
    # All in one model, so that one program serves them.
    methods = [
        dataclasses.replace(METHODS["dora"], targets=["q_proj", "down_proj"]),
        dataclasses.replace(METHODS["full"], targets=["v_proj", "o_proj"]),
        dataclasses.replace(METHODS["hira"], targets=["k_proj", "gate_proj"]),
    ]
    adapters = [perturb(gl.init_adapter(cfg, jax.random.key(0), params)) for cfg in methods]
    batch = {
        "input_ids": IDS,
        "loss_mask": np.ones(IDS.shape, bool),
        "segment_ids": np.ones(IDS.shape, np.int32),
        "positions": np.tile(np.arange(IDS.shape[1], dtype=np.int32), (len(IDS), 1)),
    }
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])

    def loss(adapters, params, batch, where):
        flat = {}
        for cfg, adapter in zip(methods, adapters, strict=True):
            flat |= flatten_dict(gl.generate_factors(cfg, adapter))
        whole = unflatten_dict(flat)
        if where is not None:
            specs = sharding.named(where, sharding.factor_specs(whole))
            whole = jax.lax.with_sharding_constraint(whole, specs)
        options = StepOptions(chunk=16)
        return cross_entropy(model.clone(mesh=where), params, whole, batch, options)[0]

    step = jax.jit(jax.value_and_grad(loss), static_argnums=3)
    expected, theirs = step(adapters, params, batch, None)
    found, ours = step(
        jax.device_put(adapters, sharding.replicated(mesh)),
        jax.device_put(params, sharding.named(mesh, sharding.param_specs(params))),
        sharding.place_batch(mesh, batch),
        mesh,
    )
    np.testing.assert_allclose(found, expected, rtol=64 * EPS)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(other).max() > 0
        close(one, other, terms=256)


def test_magnitudes_and_deltas_lie_as_their_kernels_do():
    product = {"a": jnp.ones((2, 8, 1)), "b": jnp.ones((2, 1, 8)), "magnitude": jnp.ones((2, 8))}
    leaves = {"q_proj": product, "o_proj": {"delta": jnp.ones((2, 8, 8))}}
    specs = sharding.factor_specs({"layers": leaves})["layers"]
    assert specs["q_proj"]["magnitude"] == P(None, "tensor")
    assert specs["o_proj"]["delta"] == P(None, "tensor", "fsdp")


# One method each.


def test_the_norm_of_an_adapted_column_is_that_of_the_sum():
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(shape) for shape in ((2, 40, 30), (2, 40, 3), (2, 3, 30)))
    exact = np.linalg.norm(w + a @ b, axis=-2)
    leaves = {"a": jnp.float32(a), "b": jnp.float32(b)}
    np.testing.assert_allclose(adapted_column_norm(jnp.float32(w), leaves), exact, rtol=8 * EPS)


def test_dropout_drops_all_that_a_magnitude_changes():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 6)), jnp.float32)
    model = nn.Dense(5)
    params = model.init(jax.random.key(0), x)["params"] | {"bias": jnp.arange(5.0)}
    leaves = {
        "a": jnp.zeros((6, 2)),
        "b": jnp.zeros((2, 5)),
        "magnitude": 3 * jnp.linalg.norm(params["kernel"], axis=0),
    }

    @jax.jit
    @jax.vmap
    def dropped(key):
        return gl.apply(model, params, leaves, x, dropout=0.3, rngs={"dropout": key})

    samples = np.asarray(dropped(jax.random.split(jax.random.key(1), 4000)))
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert (error > 1e-3).all()
    whole = np.asarray(gl.apply(model, params, leaves, x))
    expected = 3 * np.float64(x) @ np.float64(params["kernel"]) + np.float64(params["bias"])
    # Six products, the norm's and the bias's roundings: each is relative to the largest term, not
    # to a sum in which terms cancel.
    largest = np.abs(3 * np.float64(x)) @ np.abs(np.float64(params["kernel"]))
    largest += np.abs(np.float64(params["bias"]))
    assert (np.abs(whole - expected) < 12 * EPS * largest).all()
    assert (np.abs(samples.mean(axis=0) - whole) < 5 * error).all()


@pytest.mark.parametrize("name", ["dora", "pissa", "hira", "full"])
def test_layers_that_are_not_adapted_stay_as_they_are(name):
    cfg = dataclasses.replace(METHODS[name], layers=[1])
    _, params = random_llama()
    both = []
    for tree in (params, unstack(params)):
        adapter = gl.init_adapter(cfg, jax.random.key(0), tree)
        moved = adapter.replace(trainable=perturb(adapter.trainable))
        both.append(gl.merge(tree, gl.generate_factors(cfg, moved)))
    scanned = flatten_dict(unstack(both[0]))
    for path, leaf in flatten_dict(both[1]).items():
        before = flatten_dict(unstack(params))[path]
        close(scanned[path], leaf)
        changed = "1" in path and path[-2] in TARGETS and path[-1] == "kernel"
        assert np.array_equal(scanned[path], before) != changed, path


def test_projections_of_vera_are_not_stored(tmp_path):
    cfg = METHODS["vera"]
    _, params = random_llama()
    adapter = gl.init_adapter(cfg, jax.random.key(0), params)
    gl.save_adapter(tmp_path / "adapter", cfg, adapter)
    stored = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert {name.split("/")[1] for name in stored} == {"vectors"}
    assert gl.count_parameters(adapter) == 3 * (3 * 5 + 32 + 16 + 32)


def test_gains_are_merged_and_taken_out_again_in_bfloat16():
    """To one rounding each way: the merge's, and that of the base."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((2, 40, 30)), jnp.bfloat16)
    leaves = {
        "gain_a": jnp.float32(rng.standard_normal((2, 40, 3))),
        "gain_b": jnp.float32(0.2 * rng.standard_normal((2, 3, 30))),
    }
    gain = 1 + np.float64(leaves["gain_a"]) @ np.float64(leaves["gain_b"])
    factors = {"layers": {"proj": leaves}}
    merged = gl.merge({"layers": {"proj": {"kernel": kernel}}}, factors)
    ours = np.float64(merged["layers"]["proj"]["kernel"])
    # One rounding to 8 bits, and five in float32 of terms of the gain (one, and three products).
    terms = np.abs(np.float64(leaves["gain_a"])) @ np.abs(np.float64(leaves["gain_b"]))
    slack = 5 * EPS * np.abs(np.float64(kernel)) * (1 + terms)
    expected = np.float64(kernel) * gain
    assert (np.abs(ours - expected) <= 2**-8 * np.abs(expected) + slack).all()
    back = np.float64(gl.unmerge(merged, factors)["layers"]["proj"]["kernel"])
    # Two roundings to 8 bits, and the product's and the quotient's in float32.
    np.testing.assert_allclose(back, np.float64(kernel), rtol=(1 + 2**-8) ** 2 - 1 + 2 * EPS)


def test_an_element_that_a_gain_makes_0_stays_0():
    leaves = {"gain_a": jnp.array([[1.0], [0.5]]), "gain_b": jnp.array([[-1.0, 0.0]])}
    kernel = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    merged = gl.merge({"proj": {"kernel": kernel}}, {"proj": leaves})
    back = gl.unmerge(merged, {"proj": leaves})["proj"]["kernel"]
    np.testing.assert_array_equal(back, [[0, 2], [3, 4]])


def test_no_layer_keeps_a_delta_for_its_backward_pass():
    cfg = gl.LoRAConfig(rank=2, hadamard=True, targets=["down_proj"])
    model, params = random_llama(scan=False, attention="xla")
    flat = flatten_dict(params)
    kernels = [leaf for path, leaf in flat.items() if path[-2:] == ("down_proj", "kernel")]
    factors = gl.generate_factors(cfg, gl.init_adapter(cfg, jax.random.key(0), params))
    _, pull = jax.vjp(lambda leaves: gl.apply(model, params, leaves, IDS), factors)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == kernels[0].shape]
    assert len(kept) >= len(kernels)
    for leaf in kept:
        assert any(np.array_equal(leaf, kernel) for kernel in kernels)


@pytest.mark.parametrize("kind", [gl.LoRAConfig, gl.GenLoRAConfig])
def test_a_gain_is_as_large_for_kernels_of_any_width(kind):
    for width in (64, 1024):
        params = {"proj": {"kernel": jnp.zeros((width, 32))}}
        cfg = kind(rank=8, hadamard=True)
        leaves = gl.generate_factors(cfg, gl.init_adapter(cfg, jax.random.key(0), params))
        plain = dataclasses.replace(cfg, hadamard=False)
        theirs = gl.generate_factors(plain, gl.init_adapter(plain, jax.random.key(0), params))
        np.testing.assert_allclose(
            leaves["proj"]["gain_a"], theirs["proj"]["a"] * width**0.5, rtol=4 * EPS
        )
        expected = 1 / 3 if kind is gl.LoRAConfig else 1
        assert np.var(leaves["proj"]["gain_a"]) == pytest.approx(expected, rel=0.3)


# What is refused.


@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_a_method_that_reads_the_base_needs_its_values(name):
    cfg = METHODS[name]
    _, params = random_llama()
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match="starts at values of the base"):
        gl.init_adapter(cfg, jax.random.key(0), shapes)
    traced = jax.eval_shape(lambda p: gl.init_adapter(cfg, jax.random.key(0), p), shapes)
    known = adapter_shapes(adapter_spec(cfg, params))
    made = gl.init_adapter(cfg, jax.random.key(0), params)
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made)
    for other in (traced, known):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), other) == expected


def test_a_rank_above_the_number_of_singular_values_is_refused():
    _, params = random_llama()
    cfg = gl.PiSSAConfig(rank=17, targets=["v_proj"])
    message = r"rank 17 exceeds 16.*v_proj"
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match=message):
        gl.init_adapter(cfg, jax.random.key(0), params)


X = jnp.ones((2, 4))
ONES = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3))}
MORE = {
    "magnitude": ONES | {"magnitude": jnp.ones(3)},
    "gain_a": {"gain_a": ONES["a"], "gain_b": ONES["b"]},
    "delta": {"delta": jnp.ones((4, 3))},
}


@pytest.mark.parametrize("leaf", MORE)
def test_what_takes_products_alone_refuses_others_by_name(leaf):
    sets = [{"proj": ONES}, {"proj": MORE[leaf]}]
    with pytest.raises(ValueError, match=rf"combine takes A and B alone; proj has a {leaf}"):
        gl.combine(sets, [1.0, 1.0])
    with pytest.raises(ValueError, match=rf"stack takes A and B alone; proj has a {leaf}"):
        gl.stack(sets)
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match="adapter_index takes A and B alone"):
        gl.apply(model, params, MORE[leaf], X, adapter_index=jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        (ONES | {"magnitude": jnp.ones(4)}, r"have shapes \(4, 2\) and \(2, 3\) and \(4,\)"),
        ({"gain_a": jnp.ones((4, 2)), "gain_b": jnp.ones((3, 3))}, r"shapes \(4, 2\) and \(3, 3\)"),
        ({"delta": jnp.ones((3, 4))}, r"have shapes \(3, 4\)"),
        ({"magnitude": jnp.ones(3)}, r"hold \['magnitude'\]"),
        (ONES | MORE["delta"], "hold"),
    ],
)
def test_factors_that_do_not_fit_are_refused(leaves, message):
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match=message):
        gl.merge({"proj": params}, {"proj": leaves})
    with pytest.raises(ValueError, match=message):
        gl.apply(model, params, leaves, X)


@pytest.mark.parametrize(("leaf", "kind"), [("magnitude", "DoRA"), ("gain_a", "HiRA")])
def test_factors_of_several_kinds_are_not_exported(leaf, kind, tmp_path):
    sets = {"one": ONES, "two": MORE[leaf]}
    with pytest.raises(
        ValueError, match=rf"of one kind; these factors are LoRA \(one\) and {kind} \(two\)"
    ):
        gl.export_peft(tmp_path / "out", None, sets, base="base")
    assert not (tmp_path / "out").exists()


def test_settings_that_mean_nothing_are_refused():
    _, params = random_llama()
    adapter = gl.init_adapter(METHODS["vera"], jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"optim\.b_ratio: this adapter has no factor B"):
        make_optimizer(OptimConfig(b_ratio=4.0), 10).init(adapter.trainable)
    with pytest.raises(ValueError, match=r"optim\.b_ratio must be a finite number > 0"):
        OptimConfig(b_ratio=0.0)
    with pytest.raises(ValueError, match="d_initial"):
        gl.VeRAConfig(d_initial=0.0)
    with pytest.raises(TypeError, match="rank"):
        gl.FullConfig(rank=3)
    for kind in (gl.DoRAConfig, gl.PiSSAConfig):
        with pytest.raises(ValueError, match="hadamard out"):
            kind(hadamard=True)
    with pytest.raises(TypeError, match="hadamard"):
        gl.VeRAConfig(hadamard=True)
    with pytest.raises(ValueError, match="AdapterConfig is the config of no method"):
        gl.init_adapter(gl.AdapterConfig(), jax.random.key(0), params)


@pytest.mark.parametrize("cfg", METHODS.values(), ids=METHODS)
def test_a_config_goes_to_json_and_back(cfg):
    assert config_from_json(json.loads(json.dumps(config_to_json(cfg)))) == cfg


def test_latents_and_side_a_may_both_be_seeded():
    _, params = random_llama()
    cfg = gl.GenLoRAConfig(rank=4, group_size=8, latents="seeded", side_a="seeded")
    adapter = gl.init_adapter(cfg, jax.random.key(0), params)
    sides = [set(side) for side in adapter.trainable["generators"].values()]
    assert set(adapter.trainable) == {"generators"}
    assert all(side == {"b"} for side in sides)
    leaves = gl.generate_factors(cfg, perturb(adapter))["model"]["layers"]["mlp"]["up_proj"]
    assert jnp.abs(leaves["a"] @ leaves["b"]).max() > 0
