"""A base in FP8: values and products as ml_dtypes has them, training, files, meshes, devices."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_base import write_base, write_recipe
from tiny_models import TINY, perturb, random_llama

import genlora_jax as gl
from genlora_jax import cli
from genlora_jax.base.fp8 import Fp8, Fp8Backward
from genlora_jax.base.kernel import product, read_kernel
from genlora_jax.base.quantise import (
    Quantisation,
    compiler_options,
    quantisation_of,
    quantise,
)
from genlora_jax.base.stored import StoredKernel
from genlora_jax.data.config import DataConfig
from genlora_jax.hf.base_model import ModelConfig
from genlora_jax.hf.peft_base import BaseChanges, change_base
from genlora_jax.mesh import MeshConfig, make_mesh
from genlora_jax.models.config import LlamaConfig
from genlora_jax.plan.chips import parse_topology
from genlora_jax.plan.estimate import rank_meshes
from genlora_jax.sharding import named, param_specs
from genlora_jax.training import finetune
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.recipe import Recipe, TrainConfig
from genlora_jax.training.step import init_state, make_train_step
from genlora_jax.training.sweep.loop import run_sweep
from genlora_jax.training.sweep.members import Member
from genlora_jax.training.sweep.program import SweepProgram

FORM, BACKWARD = Quantisation("fp8"), Quantisation("fp8_backward")
IDS = jnp.arange(48).reshape(4, 12) % 61
BATCH = {
    "input_ids": np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % 61,
    "loss_mask": np.ones((2, 12), bool),
    "segment_ids": np.ones((2, 12), np.int32),
    "positions": np.tile(np.arange(12, dtype=np.int32), (2, 1)),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def in_numpy(x, dtype):
    """What a tensor is rounded to, in float64, by ml_dtypes' own conversion."""
    x = np.asarray(x, np.float64)
    largest = float(ml_dtypes.finfo(dtype).max)
    scale = 2.0 ** np.floor(np.log2(largest / np.abs(x).max()))
    return (x * scale).astype(np.float32).astype(dtype).astype(np.float64) / scale


def dequantised(params):
    is_stored = lambda leaf: isinstance(leaf, StoredKernel)  # noqa: E731
    return jax.tree.map(lambda x: read_kernel(x, jnp.float32), params, is_leaf=is_stored)


def cosine(tree, expected):
    a, b = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(each)])
        for each in (tree, expected)
    )
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


# Values.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1e-12, 1.0, 3e5])
def test_a_kernel_has_the_values_of_ml_dtypes(dtype, size):
    # Magnitudes over more decades than e4m3 has.
    kernel = (
        size * normal(0, 48, 20) * 10.0 ** (-6 * jax.random.uniform(jax.random.key(1), (48, 20)))
    )
    kernel = kernel.astype(dtype)
    stored = FORM.kernel(kernel)
    assert stored.codes.dtype == jnp.float8_e4m3fn
    assert stored.shape == (48, 20)
    np.testing.assert_array_equal(stored.dequantised(), in_numpy(kernel, ml_dtypes.float8_e4m3fn))
    # A power of two as a scale: what merges and products in bfloat16 read is exact.
    np.testing.assert_array_equal(stored.astype(jnp.bfloat16), stored.dequantised())


def test_a_stack_is_its_layers_and_zeros_stay():
    kernels = jnp.stack([normal(0, 33, 7), 1e4 * normal(1, 33, 7), jnp.zeros((33, 7))])
    stack = FORM.kernel(kernels)
    assert stack.scale.shape == (3,)
    for i in range(3):
        np.testing.assert_array_equal(stack[i].dequantised(), FORM.kernel(kernels[i]).dequantised())
    assert not np.asarray(stack[2].dequantised()).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_products_are_those_of_rounded_operands(dtype):
    kernel, x, gradient = 0.02 * normal(0, 40, 24), normal(1, 2, 5, 40), 1e-4 * normal(2, 2, 5, 24)
    x, gradient = x.astype(dtype), gradient.astype(dtype)
    stored = Fp8.of(kernel, jnp.float32)
    y, pull = jax.vjp(lambda x: product(x, stored), x)
    (dx,) = pull(gradient)
    assert y.dtype == dx.dtype == dtype
    w = in_numpy(kernel, ml_dtypes.float8_e4m3fn)
    for got, expected in (
        (y, in_numpy(x, ml_dtypes.float8_e4m3fn) @ w),
        (dx, in_numpy(gradient, ml_dtypes.float8_e5m2) @ w.T),
    ):
        eps = float(jnp.finfo(dtype).eps)
        atol = 4 * eps * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=atol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_only_the_backward_product_of_fp8_backward_has_rounded_operands(dtype):
    kernel, x, gradient = 0.02 * normal(0, 40, 24), normal(1, 2, 5, 40), 1e-4 * normal(2, 2, 5, 24)
    x, gradient = x.astype(dtype), gradient.astype(dtype)
    stored = Fp8Backward.of(kernel, dtype)
    y, pull = jax.vjp(lambda x: product(x, stored, prevent_cse=True), x)
    (dx,) = pull(gradient)
    np.testing.assert_array_equal(y, product(x, kernel.astype(dtype)))
    np.testing.assert_array_equal(stored.astype(dtype), kernel.astype(dtype))
    w = in_numpy(kernel.astype(dtype), ml_dtypes.float8_e4m3fn)
    expected = in_numpy(gradient, ml_dtypes.float8_e5m2) @ w.T
    assert dx.dtype == dtype
    atol = 4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, atol=atol)


@pytest.mark.parametrize("form", [FORM, BACKWARD], ids=str)
def test_the_gradient_of_a_gradient_is_the_forward_product(form):
    x, gradient, v = normal(0, 5, 40), 1e-4 * normal(1, 5, 24), normal(2, 5, 40)
    kernel = 0.02 * normal(3, 40, 24)
    pull = jax.vjp(lambda x: product(x, form.kernel(kernel)), x)[1]
    (found,) = jax.vjp(lambda gradient: pull(gradient)[0], gradient)[1](v)
    operands = np.asarray(v, np.float64), np.asarray(kernel, np.float64)
    if form == FORM:
        operands = tuple(in_numpy(each, ml_dtypes.float8_e4m3fn) for each in operands)
    expected = operands[0] @ operands[1]
    atol = 4 * float(jnp.finfo(jnp.float32).eps) * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=atol)


@pytest.mark.parametrize("form", [FORM, BACKWARD], ids=str)
def test_what_is_not_finite_is_not_hidden(form):
    stored = form.kernel(normal(0, 8, 4))
    for bad in (jnp.nan, jnp.inf):
        x = normal(1, 3, 8).at[0, 0].set(bad)
        y, pull = jax.vjp(lambda x: product(x, stored), x)
        if form == FORM:  # one scale for all rows
            assert np.isnan(y).all()
        else:
            assert not np.isfinite(y[0]).any()
        assert np.isnan(pull(jnp.full((3, 4), bad))[0]).all()


def test_each_of_a_batch_has_its_own_scale():
    stored = FORM.kernel(normal(0, 16, 8))
    members = jnp.stack([normal(1, 3, 16), 1e5 * normal(2, 3, 16)])
    got = jax.vmap(lambda x: product(x, stored))(members)
    for member, y in zip(members, got, strict=True):
        np.testing.assert_allclose(y, product(member, stored), rtol=1e-6)


# The model and adapters.


@pytest.mark.parametrize("form", [FORM, BACKWARD], ids=str)
@pytest.mark.parametrize(
    ("cfg", "scan", "remat"),
    [
        (gl.LoRAConfig(rank=2), True, "none"),
        (gl.LoRAConfig(rank=2), False, "dots"),
        (gl.GenLoRAConfig(rank=2), True, "full"),
        (gl.DoRAConfig(rank=2), False, "none"),
        (gl.LoRAConfig(rank=2, hadamard=True), True, "none"),
        (gl.PiSSAConfig(rank=2), True, "none"),
    ],
    ids=["lora", "lora-dots", "genlora-full", "dora", "hira", "pissa"],
)
def test_gradients_point_where_those_on_the_dequantised_base_do(cfg, scan, remat, form):
    model, floats = random_llama(scan=scan, remat=remat)
    params = quantise(floats, form)
    assert quantisation_of(params) == form
    # Generators sum what 32 weights of theirs make: their deltas are as large as LoRA's with less.
    size = 0.002 if isinstance(cfg, gl.GenLoRAConfig) else 0.02
    adapter = perturb(gl.init_adapter(cfg, jax.random.key(0), params), size=size)

    def loss(adapter, params):
        logits = gl.apply(model, params, gl.generate_factors(cfg, adapter), IDS)
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    plain = dequantised(params)
    gradient = jax.jit(jax.grad(loss))
    assert cosine(gradient(adapter, params), gradient(adapter, plain)) > 0.98
    if form == BACKWARD:
        np.testing.assert_array_equal(*(jax.jit(loss)(adapter, each) for each in (params, plain)))
    factors = gl.generate_factors(cfg, adapter)
    merged, expected = (flatten_dict(gl.merge(base, factors)) for base in (params, plain))
    for path, leaf in expected.items():
        np.testing.assert_allclose(merged[path], leaf, atol=1e-6)


def test_members_of_a_sweep_share_the_base_and_not_their_scales():
    model, floats = random_llama(num_hidden_layers=2, attention="xla")
    params, cfg, optim = quantise(floats, FORM), gl.LoRAConfig(rank=2), OptimConfig(warmup=0.5)
    rates = (0.01, 0.05)
    members = [Member(learning_rate=rate, generator_ratio=1.0, seed=0) for rate in rates]
    program = SweepProgram(model=model, cfg=cfg, optim=optim, steps=3)
    result = run_sweep(program, params, members, itertools.repeat(BATCH), [BATCH])
    for i, rate in enumerate(rates):
        optimizer = make_optimizer(dataclasses.replace(optim, learning_rate=rate), 3)
        step = make_train_step(model, cfg, optimizer)
        state, losses = init_state(gl.init_adapter(cfg, jax.random.key(0), params), optimizer), []
        for _ in range(3):
            state, metrics = step(state, params, BATCH)
            losses.append(float(metrics["loss"]))
        # Sums in another order may round to the neighbour in FP8.
        np.testing.assert_allclose(result.loss[:, i], losses, rtol=2e-3)
        final = jax.tree.map(lambda leaf, i=i: leaf[i], result.final.trainable)
        assert cosine(final, state.adapter.trainable) > 0.99


def test_a_mesh_changes_no_logits():
    model, params = random_llama(vocab_size=64, hidden_size=64, intermediate_size=128)
    params = quantise(params, FORM)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = param_specs(params)["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert specs.codes == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    placed = jax.device_put(params, named(mesh, param_specs(params)))
    got = jax.jit(lambda p: model.clone(mesh=mesh).apply({"params": p}, IDS))(placed)
    # Sums in another order may round to the neighbour in e4m3.
    assert cosine(got, model.apply({"params": params}, IDS)) > 0.999


# Files.


def test_a_run_in_fp8_resumes_exports_and_merges(run_main, tmp_path, monkeypatch):
    base = write_base(tmp_path / "base", num_hidden_layers=2, tie_word_embeddings=False)
    start = ("--config", write_recipe(tmp_path, base, "fp8"), "--train.progress", "false")
    start += ("--train.save_every", "1")
    asked, given = [], []

    def options(params, platform):
        asked.append((quantisation_of(params).form, platform))
        return {"xla_cpu_enable_fast_math": False}  # it is off anyway

    def recorded(make):
        def call(*args, **settings):
            given.append(settings["compiler_options"])
            return make(*args, **settings)

        return call

    for name in ("make_train_step", "make_eval_step"):
        monkeypatch.setattr(finetune, name, recorded(getattr(finetune, name)))
    monkeypatch.setattr(finetune, "compiler_options", options)
    status, _, err = run_main(finetune.main, *start, "--train.steps", "1")
    assert status == 0, err
    assert asked == [("fp8", "cpu")]
    assert given == [{"xla_cpu_enable_fast_math": False}] * 2
    more = (*start, "--train.steps", "2", "--train.resume", "true")
    status, _, err = run_main(finetune.main, *more, "--model.base_dtype", "int8")
    assert status == 1
    assert "was trained on a base in fp8; the recipe's is in int8" in err
    status, out, err = run_main(finetune.main, *more)
    assert status == 0, err
    assert "resumed at step 1" in out
    paths = ("--base", base, "--adapter", tmp_path / "run" / "adapter")
    status, out, err = run_main(cli.main, "merge", *paths, "--out", tmp_path / "merged")
    assert status == 0, err
    assert "onto the kernels dequantised from fp8" in out
    options = {"param_dtype": jnp.float32, "dtype": jnp.float32}
    _, params = gl.load_llama(base, **options, base_dtype="fp8")
    spec, adapter = gl.load_adapter(tmp_path / "run" / "adapter", params)
    expected = flatten_dict(gl.merge(dequantised(params), gl.generate_factors(spec, adapter)))
    _, merged = gl.load_llama(tmp_path / "merged", **options)
    for path, leaf in flatten_dict(merged).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6)
    with pytest.warns(UserWarning, match="in fp8 and is merged onto the original ones"):
        run_main(cli.main, "merge", *paths, "--out", tmp_path / "other", "--onto", "original")
    gl.export_hf(tmp_path / "exported", params, base=base, dtype=jnp.float32)
    _, read = gl.load_llama(tmp_path / "exported", **options)
    expected = flatten_dict(dequantised(params))
    for path, leaf in flatten_dict(read).items():
        np.testing.assert_array_equal(leaf, expected[path])


def test_an_adapter_trained_with_fp8_backward_belongs_to_the_base_itself(run_main, tmp_path):
    base = write_base(tmp_path / "base", num_hidden_layers=2, tie_word_embeddings=False)
    mesh = "{data: 2, fsdp: 2, tensor: 2}"
    start = ("--config", write_recipe(tmp_path, base, "fp8_backward", mesh))
    settings = ("--train.steps", "2", "--train.progress", "false")
    status, _, err = run_main(finetune.main, *start, *settings)
    assert status == 0, err
    options = {"param_dtype": jnp.float32, "dtype": jnp.float32}
    _, params = gl.load_llama(base, **options)
    cfg, adapter = gl.load_adapter(tmp_path / "run" / "adapter", params)  # a warning would raise
    merged = flatten_dict(gl.merge(params, gl.generate_factors(cfg, adapter)))
    paths = ("--base", base, "--adapter", tmp_path / "run" / "adapter")
    for i, flags in enumerate(((), ("--base_dtype", "fp8_backward"))):
        status, out, err = run_main(cli.main, "merge", *paths, "--out", tmp_path / f"{i}", *flags)
        assert status == 0, err
        assert "dequantised" not in out
        _, read = gl.load_llama(tmp_path / f"{i}", **options)
        for path, leaf in flatten_dict(read).items():
            np.testing.assert_allclose(leaf, merged[path], atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_what_changes_the_base_changes_one_in_fp8_backward_too(scan, tmp_path):
    _, floats = random_llama(scan=scan)
    changes = BaseChanges(tmp_path, {})
    changes.made["model.layers.1.mlp.down_proj.weight"] = [lambda old: 5 * old]
    (expected, names), (got, found) = (
        change_base(quantise(floats, form), changes) for form in (Quantisation("bf16"), BACKWARD)
    )
    assert names == found == list(changes.made)
    jax.tree.map(np.testing.assert_array_equal, got, quantise(expected, BACKWARD))
    with pytest.raises(ValueError, match=r"down_proj\.weight, which is quantised here"):
        change_base(quantise(floats, FORM), changes)


# Devices.


@pytest.mark.parametrize(
    ("platform", "capability"), [("gpu", "8.0"), ("gpu", "gfx942"), ("tpu", None)]
)
def test_devices_without_fp8_are_refused(platform, capability):
    with pytest.raises(ValueError, match=r"base_dtype fp8 needs an NVIDIA GPU .* this is A100"):
        FORM.check_device(platform, capability, "A100")
    with pytest.raises(ValueError, match=r"base_dtype fp8_backward needs .* this is A100"):
        BACKWARD.check_device(platform, capability, "A100")
    dataclasses.replace(FORM, form="int8").check_device(platform, capability, "A100")


@pytest.mark.parametrize("capability", ["8.9", "9.0", "10.0"])
def test_devices_with_fp8_are_not(capability):
    FORM.check_device("gpu", capability, "H100")


def test_a_plan_refuses_what_a_run_would():
    model = ModelConfig(path="nowhere", base_dtype="fp8", shape=LlamaConfig(**TINY))
    data = DataConfig(train="nowhere", length=12, batch_size=8)
    train, adapter = TrainConfig(output="nowhere"), gl.LoRAConfig(rank=2)
    recipe = Recipe(model=model, data=data, train=train, adapter=adapter)
    with pytest.raises(ValueError, match=r"base_dtype fp8 needs .* this is v5e:1x1"):
        rank_meshes(recipe, parse_topology("v5e:1x1"))
    assert rank_meshes(recipe, parse_topology("gpu:1x80"))[0].fits


def test_a_step_is_compiled_with_the_options_that_it_is_given():
    model, params = random_llama(num_hidden_layers=1)
    cfg, optimizer = gl.LoRAConfig(rank=1), make_optimizer(OptimConfig(), 3)
    state = init_state(gl.init_adapter(cfg, jax.random.key(0), params), optimizer)
    step = make_train_step(model, cfg, optimizer, compiler_options={"no_such_option": True})
    with pytest.raises(Exception, match="no_such_option"):
        step.lower(state, params, BATCH).compile()


def test_products_are_cublas_on_gpus():
    kernel = {"q_proj": {"kernel": normal(0, 8, 4)}}
    stored = quantise(kernel, FORM)
    assert compiler_options(stored, "gpu") == {"xla_gpu_enable_triton_gemm": False}
    assert compiler_options(quantise(kernel, BACKWARD), "gpu") == compiler_options(stored, "gpu")
    assert compiler_options(stored, "cpu") == {}
    assert compiler_options(kernel, "gpu") == {}
    assert compiler_options(quantise(kernel, Quantisation("int8")), "gpu") == {}
