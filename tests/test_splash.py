"""Splash attention, interpreted on the CPU, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_llama

import genlora_jax as gl
from genlora_jax.mesh import MeshConfig, make_mesh
from genlora_jax.models.attention import attend
from genlora_jax.sharding import named, param_specs

MESHES = [None, MeshConfig(data=2, fsdp=2, tensor=2)]


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("sizes", MESHES)
def test_values_and_gradients_are_those_of_xla(sizes):
    mesh = sizes and make_mesh(sizes)
    q, k, v = draw((4, 256, 4, 64), 0), draw((4, 256, 2, 64), 1), draw((4, 256, 2, 64), 2)
    weight = draw(q.shape, 3)
    segments = jnp.repeat(jnp.array([[1, 2, 0]] * 4), jnp.array([100, 130, 26]), axis=1)
    seen = jnp.tril(jnp.ones((256, 256), bool))[None] & (segments[:, :, None] == segments[:, None])

    def total(implementation, q, k, v):
        out = attend(q, k, v, seen[:, None], implementation, segments=segments, mesh=mesh)
        return (out * weight).sum(), out

    (ours, theirs) = (
        jax.jit(jax.value_and_grad(total, (1, 2, 3), has_aux=True), static_argnums=0)(name, q, k, v)
        for name in ("splash", "xla")
    )
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5 * float(jnp.abs(other).max()))


def run(model, params, ids, inputs):
    return jax.jit(lambda params: gl.apply(model, params, {}, ids, **inputs))(params)


@pytest.mark.parametrize("sizes", MESHES)
def test_a_model_with_padding_and_packed_rows_has_the_same_logits(sizes):
    mesh = sizes and make_mesh(sizes)
    model, params = random_llama(vocab_size=64, num_hidden_layers=2)
    if mesh is not None:
        params = jax.device_put(params, named(mesh, param_specs(params)))
    ids = np.random.default_rng(0).integers(0, 64, (4, 128)).astype(np.int32)
    real = np.ones_like(ids)
    real[0, 100:], real[1, :20] = 0, 0
    packed = np.where(np.arange(128) < 50, 1, 2) * np.ones_like(ids)
    for inputs in ({}, {"attention_mask": real}, {"segment_ids": packed}):
        ours, theirs = (
            run(model.clone(attention=name, mesh=mesh), params, ids, inputs)
            for name in ("splash", "xla")
        )
        shown = inputs.get("attention_mask", np.ones_like(ids)).astype(bool)
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours[shown], theirs[shown], atol=5e-5 * scale)


def test_what_it_does_not_take_is_refused_by_name():
    model, params = random_llama(attention="splash")
    with pytest.raises(ValueError, match=r"splash takes no 1 rows of 60 tokens"):
        gl.apply(model, params, {}, np.zeros((1, 60), np.int32))
