"""A mesh of one device is as good as none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import genlora_jax as gl
from genlora_jax.mesh import MeshConfig, make_mesh, one_device
from genlora_jax.models.attention import attend
from genlora_jax.sharding import named, param_specs


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_checkpoint_is_loaded_as_without_a_mesh(torch_twin, scan, dtype):
    path, _ = torch_twin()
    mesh = one_device()
    _, plain = gl.load_llama(path, param_dtype=dtype, scan=scan)
    model, params = gl.load_llama(path, param_dtype=dtype, scan=scan, mesh=mesh)
    assert model.mesh == mesh
    shardings = named(mesh, param_specs(params))
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    for expected, leaf, sharding in zip(
        *map(jax.tree.leaves, (plain, params, shardings)), strict=True
    ):
        assert leaf.dtype == expected.dtype == dtype
        assert isinstance(leaf.sharding, NamedSharding)
        assert leaf.sharding == sharding
        np.testing.assert_array_equal(leaf, expected)


def attention_jaxpr(mesh):
    q, k = jnp.zeros((8, 64, 8, 8)), jnp.zeros((8, 64, 8, 8))
    return str(jax.make_jaxpr(lambda q, k: attend(q, k, k, None, "auto", mesh=mesh))(q, k))


def test_attention_is_chosen_as_without_a_mesh():
    assert attention_jaxpr(one_device()) == attention_jaxpr(None)
    assert attention_jaxpr(make_mesh(MeshConfig(fsdp=8))) != attention_jaxpr(None)
