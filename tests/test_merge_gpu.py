"""The GPU's merge, interpreted on the CPU, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genlora_jax.merge_gpu import TILE, add_product, fits


@pytest.mark.parametrize("rank", [1, 16, 20, 48])
@pytest.mark.parametrize("shape", [(2, TILE, 3 * TILE), (2 * TILE, TILE)])
@pytest.mark.parametrize(("kind", "sign"), [(jnp.float32, -1.0), (jnp.bfloat16, 1.0)])
def test_adds_the_product_and_rounds_once(rank, shape, kind, sign):
    rng = np.random.default_rng(rank)
    *layers, n, m = shape
    kernel = jnp.asarray(rng.standard_normal(shape), kind)
    a = rng.standard_normal((*layers, n, rank)).astype(np.float32)
    b = rng.standard_normal((*layers, rank, m)).astype(np.float32)
    merged = add_product(kernel, jnp.asarray(a), jnp.asarray(b), sign=sign, interpret=True)
    assert merged.dtype == kind
    exact = np.asarray(kernel, np.float64) + sign * (a.astype(np.float64) @ b.astype(np.float64))
    # The product's float32 rounding, then one rounding to the kernel's dtype.
    terms = np.abs(a).astype(np.float64) @ np.abs(b) + np.abs(np.asarray(kernel, np.float64))
    bound = 4 * np.finfo(np.float32).eps * terms + 0.5 * float(jnp.finfo(kind).eps) * np.abs(exact)
    assert (np.abs(np.asarray(merged, np.float64) - exact) <= bound).all()


def test_says_what_it_can_cut():
    assert fits((3, TILE, 2 * TILE))
    assert fits((TILE, TILE))
    assert not fits((TILE, TILE + 1))
    assert not fits((2, 2, TILE, TILE))


def test_lowers_for_gpus():
    shapes = [(2, TILE, TILE), (2, TILE, 20), (2, 20, TILE)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    jax.jit(add_product).trace(*args).lower(lowering_platforms=("cuda",))
