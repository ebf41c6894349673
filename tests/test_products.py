"""Wide products of bfloat16: values, gradients, and that a model takes them where they are fast."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_models import random_llama

import genlora_jax as gl
from genlora_jax.base import products
from genlora_jax.base.products import keeping_float32, matrix_product, multiplies_wide, wide_product
from genlora_jax.base.quantise import Quantisation, quantise
from genlora_jax.models.layers import Blueprint
from genlora_jax.training.losses import cross_entropy
from genlora_jax.training.step_options import StepOptions

ROUNDING = float(jnp.finfo(jnp.bfloat16).eps) / 2
# What XLA compiles a product to depends on the machine.
on_such_a_cpu = pytest.mark.skipif(
    not multiplies_wide(jnp.bfloat16, "cpu"), reason="this CPU has no instructions for bfloat16"
)


def rounded(seed, *shape):
    """Random numbers that bfloat16 has, in float64."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


def in_bf16(*arrays):
    return [jnp.asarray(array, jnp.bfloat16) for array in arrays]


def assert_rounded_once(ours, exact, terms):
    """Within one rounding to bfloat16, and float32's in a sum of so many terms of size 1."""
    assert ours.dtype == jnp.bfloat16
    exact = np.asarray(exact)
    sums = 4 * terms * float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=ROUNDING, atol=sums)


def pull_back(axis):
    return lambda x, kernel, d_y: jax.vjp(lambda x, k: wide_product(x, k, axis), x, kernel)[1](d_y)


@pytest.mark.parametrize("sizes", [(96, 24), (24, 96)])
@pytest.mark.parametrize("axis", [0, 1])
def test_values_and_both_gradients_are_float64s_rounded_once(sizes, axis):
    inside, outside = sizes
    x, d_y = rounded(0, 3, 50, inside), rounded(1, 3, 50, outside)
    kernel = rounded(2, inside, outside)
    stored = kernel if axis == 0 else kernel.T
    y = jax.jit(lambda x, k: wide_product(x, k, axis))(*in_bf16(x, stored))
    assert_rounded_once(y, x @ kernel, inside)
    d_x, d_kernel = jax.jit(pull_back(axis))(*in_bf16(x, stored, d_y))
    assert_rounded_once(d_x, d_y @ kernel.T, outside)
    exact = np.einsum("rti,rto->io", x, d_y)
    assert_rounded_once(d_kernel, exact if axis == 0 else exact.T, 150)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_dtypes_have_their_gradients_too(dtype):
    x, kernel, d_y = (jnp.asarray(rounded(0, *shape), dtype) for shape in ((3, 8), (8, 4), (3, 4)))
    d_x, d_kernel = pull_back(0)(x, kernel, d_y)
    assert d_x.dtype == d_kernel.dtype == dtype
    tolerance = {"rtol": float(jnp.finfo(dtype).eps), "atol": 8 * float(jnp.finfo(dtype).eps)}
    np.testing.assert_allclose(d_x, np.float64(d_y) @ np.float64(kernel).T, **tolerance)
    np.testing.assert_allclose(d_kernel, np.float64(x).T @ np.float64(d_y), **tolerance)


@pytest.mark.parametrize("scanned", [True, False])
def test_second_derivatives_are_those_in_float32(scanned):
    x, kernel, v = in_bf16(rounded(0, 3, 8), rounded(1, 8, 8) / 4, rounded(2, 8, 8))

    def mixed(dtype):
        def loss(x, kernel):
            layer = lambda x, _: (keeping_float32(jnp.tanh)(wide_product(x, kernel)), None)  # noqa: E731
            y = jax.lax.scan(layer, x, length=2)[0] if scanned else layer(x, None)[0]
            return jnp.square(y.astype(jnp.float32)).sum()

        of_kernel = lambda x, kernel: (jax.grad(loss, 1)(x, kernel) * v.astype(dtype)).sum()  # noqa: E731
        found = jax.grad(of_kernel)(x.astype(dtype), kernel.astype(dtype))
        return np.asarray(found, np.float64)

    exact = mixed(jnp.float32)
    assert np.abs(mixed(jnp.bfloat16) - exact).max() < 16 * ROUNDING * np.abs(exact).max()


@pytest.mark.parametrize("shared", [True, False])
def test_a_sweep_of_products_is_each_of_them(shared):
    x, d_y = rounded(0, 4, 3, 5, 96), rounded(1, 4, 3, 5, 24)
    kernels = rounded(2, 1 if shared else 4, 96, 24)
    kernel, over = (kernels[0], (0, None)) if shared else (kernels, (0, 0))
    kernels = np.broadcast_to(kernels, (4, 96, 24))
    y = jax.vmap(wide_product, over)(*in_bf16(x, kernel))
    assert_rounded_once(y, np.einsum("mrti,mio->mrto", x, kernels), 96)
    d_x, d_kernel = jax.vmap(pull_back(0), (*over, 0))(*in_bf16(x, kernel, d_y))
    assert_rounded_once(d_x, np.einsum("mrto,mio->mrti", d_y, kernels), 24)
    assert_rounded_once(d_kernel, np.einsum("mrti,mrto->mio", x, d_y), 15)


@on_such_a_cpu
@pytest.mark.parametrize("wide", [True, False])
def test_xla_converts_no_operand_of_a_wide_product_and_all_of_a_plain_one(wide):
    x, kernel, d_y = in_bf16(*(rounded(0, *shape) for shape in ((64, 96), (96, 48), (64, 48))))

    def both(x, kernel, d_y):
        y, pull = jax.vjp(lambda x: matrix_product(x, kernel, wide=wide), x)
        return y, pull(d_y)

    compiled = jax.jit(both).lower(x, kernel, d_y).compile()
    kernels = [name for name in ("f32[96,48]", "f32[48,96]") if name in compiled.as_text()]
    assert (not kernels) == wide


def test_the_gradient_of_a_function_that_keeps_float32_is_its_own():
    x, y, d = in_bf16(*(rounded(seed, 3, 40) for seed in range(3)))
    gated = lambda x, y: jax.nn.silu(x) * y  # noqa: E731
    ours = jax.vjp(keeping_float32(gated), x, y)[1](d)
    wide_x, wide_y, wide_d = (np.asarray(value, np.float64) for value in (x, y, d))
    sigmoid = 1 / (1 + np.exp(-wide_x))
    exact = (wide_d * wide_y * sigmoid * (1 + wide_x * (1 - sigmoid)), wide_d * wide_x * sigmoid)
    for found, expected in zip(ours, exact, strict=True):
        size = np.abs(expected).max()
        np.testing.assert_allclose(
            np.asarray(found, np.float64), expected, rtol=8 * ROUNDING, atol=8 * ROUNDING * size
        )


@on_such_a_cpu
@pytest.mark.parametrize("wide", [True, False])
def test_what_wide_layers_keep_is_stacked_in_float32(wide):
    gated = lambda x, y: jax.nn.silu(x) * y  # noqa: E731
    gate = keeping_float32(gated) if wide else jax.checkpoint(gated)

    def loss(x, kernels):
        def layer(h, kernel):
            y = matrix_product(h, kernel, wide=wide)
            return gate(y, h), None

        return jax.lax.scan(layer, x, kernels)[0].astype(jnp.float32).sum()

    operands = in_bf16(rounded(0, 64, 96), rounded(1, 7, 96, 96) / 8)
    compiled = jax.jit(jax.grad(loss)).lower(*operands).compile()
    assert ("bf16[7,64,96]" not in compiled.as_text()) == wide


def products_of(jaxpr):
    """Dtypes of operands and result of products with bfloat16, of a program and all it calls."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(tuple(v.aval.dtype.name for v in (*equation.invars, *equation.outvars)))
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= products_of(inner)
    return {dtypes for dtypes in found if "bfloat16" in dtypes}


@pytest.fixture
def instructions(tmp_path, monkeypatch):
    """A function that names this machine's instructions."""

    def give(names):
        file = tmp_path / names.replace(" ", "-")
        file.write_text(f"model name\t: of a test\nflags\t\t: fpu {names} avx2\n")
        monkeypatch.setattr(products, "CPU_INFO", file)

    return give


@pytest.mark.parametrize("form", ["scanned", "unrolled", "remat", "int8", "own head"])
@pytest.mark.parametrize("config", [gl.LoRAConfig(rank=2), gl.FullConfig()], ids=["lora", "full"])
def test_all_products_of_a_step_on_such_a_cpu_are_wide(form, config, instructions):
    instructions("avx512_bf16")
    model, params = random_llama(
        dtype=jnp.bfloat16,
        scan=form != "unrolled",
        remat="dots" if form == "remat" else "none",
        tie_word_embeddings=form != "own head",
    )
    if form == "int8":
        params = quantise(params, Quantisation("int8"))
    adapter = gl.init_adapter(config, jax.random.key(0), params)
    factors = gl.generate_factors(config, adapter)
    ids = jnp.ones((2, 16), jnp.int32)
    batch = {"input_ids": ids, "segment_ids": ids, "positions": jnp.cumsum(ids, 1) - 1}
    batch["loss_mask"] = ids == 1

    def loss(factors, params):
        return cross_entropy(model, params, factors, batch, StepOptions())[0]

    found = products_of(jax.make_jaxpr(jax.grad(loss))(factors, params).jaxpr)
    assert found == {("bfloat16", "bfloat16", "float32")}
    instructions("avx512f")
    jax.clear_caches()
    assert ("bfloat16",) * 3 in products_of(jax.make_jaxpr(jax.grad(loss))(factors, params).jaxpr)


def test_only_bfloat16_on_a_cpu_with_the_instructions_is_multiplied_wide(instructions):
    for names, fast in (("avx512_bf16", True), ("amx_bf16", True), ("avx512f avx512_vnni", False)):
        instructions(names)
        for dtype in (jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"):
            assert multiplies_wide(dtype, "cpu") == fast
            assert not multiplies_wide(dtype, "tpu")
            assert not multiplies_wide(dtype, "gpu")
        assert not multiplies_wide(jnp.float32, "cpu")
        assert not multiplies_wide(jnp.dtype("float32"), "cpu")


def test_a_program_for_another_device_is_not_that_of_this_cpu(instructions):
    instructions("avx512_bf16")
    for platform, wide in (("cpu", True), ("tpu", False)):
        mesh: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
        blueprint = Blueprint(random_llama()[0].config, jnp.bfloat16, jnp.bfloat16, "auto", mesh)
        assert blueprint.wide == wide
        assert blueprint.dense(4, False).wide == wide
        assert blueprint.embed().wide == wide
