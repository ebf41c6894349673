"""Adapters fitted to factors, against the formed deltas in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_llama

import genlora_jax as gl
from genlora_jax import compression

BASE = {"layers": {"q": {"kernel": jnp.zeros((4, 64, 48))}}}
CFG = gl.GenLoRAConfig(rank=4, alpha=8.0, group_size=8, normalize="none")


def make_factors(cfg, base=BASE):
    adapter = gl.init_adapter(cfg, jax.random.key(1), base)
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), adapter.trainable
    )
    return gl.generate_factors(cfg, adapter.replace(trainable=trainable))


def random_factors(rank=4, layers=4):
    rng = np.random.default_rng(2)
    sides = {"a": (layers, 64, rank), "b": (layers, rank, 48)}
    return {
        "layers": {
            "q": {s: jnp.asarray(rng.standard_normal(x), jnp.float32) for s, x in sides.items()}
        }
    }


def formed(factors):
    a, b = (np.asarray(factors["layers"]["q"][side], np.float64) for side in "ab")
    return a @ b


def relative_error(cfg, adapter, factors):
    delta, ours = formed(factors), formed(gl.generate_factors(cfg, adapter))
    squares = np.square(ours - delta).sum((1, 2)) / np.square(delta).sum((1, 2))
    return np.sqrt(squares.mean())


@pytest.mark.parametrize(
    ("cfg", "limit"),
    [(CFG, 1e-3), (dataclasses.replace(CFG, basis="rbf", kernels=4, normalize="latent"), 0.1)],
    ids=["linear", "rbf"],
)
def test_what_a_config_generated_is_found_again(cfg, limit):
    factors = make_factors(cfg, {"layers": {"q": {"kernel": jnp.zeros((6, 128, 96))}}})
    adapter, report = gl.compress(cfg, factors, key=jax.random.key(1), steps=600)
    error = relative_error(cfg, adapter, factors)
    assert error < limit
    assert report.error == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert report.errors == {"layers.q": report.error}
    assert report.parameters == gl.count_parameters(adapter)
    assert gl.compress(gl.LoRAConfig(rank=1), factors)[1].error > 0.3  # no easy target


def test_lora_of_a_lower_rank_is_the_truncated_delta():
    factors = random_factors()
    s = np.linalg.svd(formed(factors), compute_uv=False)[:, :4]
    for rank in (1, 4, 5):
        cfg = gl.LoRAConfig(rank=rank, alpha=3.0)
        adapter, report = gl.compress(cfg, factors)
        expected = np.sqrt((np.square(s[:, rank:]).sum(1) / np.square(s).sum(1)).mean())
        assert report.error == pytest.approx(expected, abs=1e-6)
        assert relative_error(cfg, adapter, factors) == pytest.approx(expected, abs=1e-6)


def test_more_parameters_fit_better():
    factors = random_factors()
    reports = [
        gl.compress(dataclasses.replace(CFG, group_size=g), factors, steps=200)[1] for g in (2, 16)
    ]
    errors = [report.error for report in reports]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] - errors[-1] > 0.2
    assert reports[-1].losses[-1] < reports[-1].losses[0]
    # A generator that passes the latent on is LoRA of rank 1.
    assert errors[0] < gl.compress(gl.LoRAConfig(rank=1), factors)[1].error + 0.01


def test_the_result_depends_on_the_delta_alone():
    factors = random_factors()
    mixing = np.random.default_rng(3).standard_normal((4, 4, 4))
    mixing[0] = -5 * np.eye(4)
    a, b = (np.asarray(factors["layers"]["q"][side], np.float64) for side in "ab")
    other = {
        "a": jnp.asarray(a @ mixing, jnp.float32),
        "b": jnp.asarray(np.linalg.inv(mixing) @ b, jnp.float32),
    }
    one, _ = gl.compress(CFG, factors, steps=50)
    two, _ = gl.compress(CFG, {"layers": {"q": other}}, steps=50)
    ours, theirs = (formed(gl.generate_factors(CFG, adapter)) for adapter in (one, two))
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(ours).max())


@pytest.mark.parametrize(
    "changes",
    [
        {"share_generators": False, "share_latents": True},
        {"latents": "seeded", "share_generators": False},
        {"basis": "fourier", "residual": False, "kernels": 4, "generator": "elementwise"},
    ],
    ids=["shared_latents", "seeded", "elementwise"],
)
def test_every_form_of_the_generator_can_be_fitted(changes):
    cfg = dataclasses.replace(CFG, **changes)
    factors = random_factors()
    adapter, report = gl.compress(cfg, factors, steps=100)
    assert report.losses[-1] < min(0.95, report.losses[0])
    assert report.error == pytest.approx(relative_error(cfg, adapter, factors), rel=1e-3)


def test_the_first_latent_is_the_first_singular_pair(monkeypatch):
    monkeypatch.setattr(compression, "_NOISE", 0.0)
    cfg = dataclasses.replace(CFG, rank=1, group_size=1)
    factors = random_factors(rank=4)
    first = gl.compress(cfg, factors, steps=1)[1].losses[0]
    truncated = gl.compress(gl.LoRAConfig(rank=1), factors)[1].error ** 2
    assert first == pytest.approx(truncated, rel=1e-4, abs=1e-9)


def test_centres_start_at_groups_of_the_latents_that_are_fitted(monkeypatch):
    started = []
    monkeypatch.setattr(
        compression, "minimise", lambda _, start, *a, **k: (started.append(start) or start, 0.0)
    )
    cfg = dataclasses.replace(CFG, kernels=5, centers="latents")
    gl.compress(cfg, random_factors())
    for side in "ab":
        latents = started[0]["latents"]["layers.q"][side]
        groups = np.asarray(latents).reshape(-1, cfg.group_size)  # normalize="none"
        for center in started[0]["generators"]["layers.q"][side]["centers"][0].tolist():
            assert np.abs(groups - center).max(axis=1).min() < 1e-6


def test_the_name_of_version_0_1_is_kept():
    assert gl.fit is gl.compress


def test_a_fitted_adapter_serves_its_base(tmp_path):
    for scan in (True, False):
        _, params = random_llama(scan=scan)
        lora = gl.LoRAConfig(rank=2, targets=["q_proj", "down_proj"])
        factors = gl.generate_factors(lora, gl.init_adapter(lora, jax.random.key(0), params))
        factors = jax.tree.map(
            lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), factors
        )
        cfg = dataclasses.replace(lora, rank=2, alpha=4.0)
        adapter, report = gl.compress(cfg, factors, params=jax.eval_shape(lambda p=params: p))
        assert report.error < 1e-5
        gl.save_adapter(tmp_path / str(scan), cfg, adapter)
        again = gl.generate_factors(*gl.load_adapter(tmp_path / str(scan), params))
        ours, theirs = gl.merge(params, again), gl.merge(params, factors)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ours, theirs)


def test_lora_with_room_takes_the_factors_as_they_are():
    q = random_factors(rank=4)["layers"]["q"]
    q = {"a": q["a"].at[1, :, 3].set(0.0), "b": q["b"].at[1, 3].set(0.0).at[2].set(0.0)}
    cfg = gl.LoRAConfig(rank=6, alpha=3.0)
    adapter, report = gl.compress(cfg, {"layers": {"q": q}})
    ((found),) = adapter.trainable["factors"].values()
    used = np.ones((4, 6), bool)
    used[:, 4:] = used[1, 3] = False
    a, b = (np.asarray(found[side]) for side in "ab")
    np.testing.assert_array_equal(a[:, :, :4] * used[:, None, :4], q["a"])
    np.testing.assert_allclose(b[:, :4] * cfg.scale, q["b"], rtol=1e-6)
    assert not b[:, 4:].any()
    # What no factor uses is drawn as in any LoRA, so that it can be trained.
    start = gl.init_adapter(cfg, jax.random.key(0), BASE).trainable["factors"]
    ((drawn),) = start.values()
    np.testing.assert_array_equal(a[:, :, 4:], drawn["a"][:, :, 4:])
    np.testing.assert_array_equal(a[1, :, 3], drawn["a"][1, :, 3])
    assert a.any(axis=1).all()
    assert report.error < 1e-6


def test_a_rank_above_a_side_is_kept_or_truncated_all_the_same():
    factors = random_factors(rank=60)  # of kernels 64 x 48
    for rank in (50, 60, 70):
        with pytest.warns(UserWarning, match="parameters are wasted"):
            adapter, report = gl.compress(gl.LoRAConfig(rank=rank), factors)
        assert {leaf.shape for leaf in jax.tree.leaves(adapter.trainable)} == {
            (4, 64, rank),
            (4, rank, 48),
        }
        assert report.error < 1e-5


def test_lora_begins_layers_anew_that_an_unrolled_base_has_and_the_factors_have_not():
    q = random_factors()["layers"]["q"]
    factors = {"layers": {str(i): {"q": {s: q[s][i] for s in "ab"}} for i in (0, 2)}}
    base = {"layers": {str(i): {"q": {"kernel": jnp.zeros((64, 48))}} for i in range(3)}}
    cfg = gl.LoRAConfig(rank=4)
    adapter, report = gl.compress(cfg, factors, params=base)
    found = gl.generate_factors(cfg, adapter)["layers"]
    for i in (0, 2):
        np.testing.assert_array_equal(found[str(i)]["q"]["a"], q["a"][i])
    assert found["1"]["q"]["a"].any()
    assert not found["1"]["q"]["b"].any()
    assert report.error < 1e-6
    with pytest.raises(ValueError, match=r"no factors for layers\.1\.q"):
        gl.compress(CFG, factors, params=base)


@pytest.mark.parametrize("scan", [True, False])
def test_layers_without_a_delta_are_left_out(scan):
    q = random_factors()["layers"]["q"]
    q = q | {"b": q["b"].at[2].set(0.0)}
    stacked = {"layers": {"q": q}}
    factors = stacked
    if not scan:
        factors = {"layers": {str(i): {"q": {s: q[s][i] for s in "ab"}} for i in range(4)}}
    with pytest.raises(ValueError, match="is zero"):
        gl.compress(CFG, factors)
    cfg = gl.LoRAConfig(rank=4, layers=[0, 1, 3])
    adapter, report = gl.compress(cfg, factors)
    assert report.error < 1e-6
    found = gl.generate_factors(cfg, adapter)
    if not scan:
        zeros = jax.tree.map(jnp.zeros_like, found["layers"]["0"])
        layers = [found["layers"].get(str(i), zeros)["q"] for i in range(4)]
        found = {"layers": {"q": jax.tree.map(lambda *x: jnp.stack(x), *layers)}}
    ours, theirs = formed(found), formed(stacked)
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


def test_wrong_inputs_are_named():
    factors = random_factors()
    q = factors["layers"]["q"]
    kernel = {"kernel": jnp.zeros((4, 64, 48))}
    with pytest.raises(ValueError, match="steps"):
        gl.compress(CFG, factors, steps=0)
    for changes in ({"share_across_targets": True}, {"gates": True}):
        with pytest.raises(ValueError, match="needs share_across_targets=False and gates=False"):
            gl.compress(dataclasses.replace(CFG, **changes), factors)
    for cfg in (gl.LoRAConfig(side_a="seeded"), dataclasses.replace(CFG, side_a="seeded")):
        with pytest.raises(ValueError, match='needs side_a="trained"'):
            gl.compress(cfg, factors)
    with pytest.raises(ValueError, match="needs hadamard=False"):
        gl.compress(dataclasses.replace(CFG, hadamard=True), factors)
    for cfg in (gl.AdapterConfig(), gl.VeRAConfig(), gl.DoRAConfig(), gl.PiSSAConfig()):
        with pytest.raises(ValueError, match=f"makes GenLoRA and LoRA.*not {type(cfg).__name__}"):
            gl.compress(cfg, factors)
    with pytest.raises(ValueError, match=r"factors of layers\.q hold \['a'\]; there are"):
        gl.compress(CFG, {"layers": {"q": {"a": q["a"]}}})
    with pytest.raises(ValueError, match=r"targets: 'v' matches no kernel"):
        gl.compress(dataclasses.replace(CFG, targets=["v"]), factors)
    two = {"layers": {"q": q, "lm_head": q}}
    with pytest.raises(ValueError, match=r"leave out factors of layers\.lm_head"):
        gl.compress(CFG, two)
    with pytest.raises(ValueError, match=r"factors of layers\.q, layer 1; layers\.q, layer 2$"):
        gl.compress(dataclasses.replace(CFG, layers=[0, 3]), factors)
    with pytest.raises(ValueError, match=r"no factors for layers\.v: leave it out"):
        gl.compress(CFG, factors, params={"layers": {"q": kernel, "v": kernel}})
    with pytest.raises(ValueError, match=r"the kernel has \(4, 32, 48\)"):
        gl.compress(CFG, factors, params={"layers": {"q": {"kernel": jnp.zeros((4, 32, 48))}}})
    with pytest.raises(ValueError, match=r"delta of layers\.q, layer 2, is zero"):
        gl.compress(CFG, {"layers": {"q": {"a": q["a"], "b": q["b"].at[2].set(0.0)}}})
    with pytest.raises(ValueError, match=r"layers\.q, layer 1, are not finite"):
        gl.compress(CFG, {"layers": {"q": {"a": q["a"].at[1].set(jnp.nan), "b": q["b"]}}})
