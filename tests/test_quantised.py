"""A base whose kernels are quantised: values, loading, training, merging, meshes, checkpoints."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from tiny_base import write_base, write_recipe
from tiny_models import TINY, perturb, random_llama, torch_logits

import genlora_jax as gl
from genlora_jax import cli
from genlora_jax.base.int4 import Int4
from genlora_jax.base.int8 import Int8
from genlora_jax.base.kernel import read_kernel
from genlora_jax.base.nf4 import NF4, SCALES
from genlora_jax.base.quantise import Quantisation, quantisation_of, quantise
from genlora_jax.base.stored import StoredKernel, block_absmax
from genlora_jax.hf.ready_made import STATE, open_checkpoint, stated_quantisation
from genlora_jax.mesh import MeshConfig, make_mesh
from genlora_jax.plan.chips import CHIPS
from genlora_jax.plan.compiled import build
from genlora_jax.plan.estimate import estimate
from genlora_jax.plan.sizes import shapes_of
from genlora_jax.settings import parse
from genlora_jax.sharding import check_params, named, param_specs
from genlora_jax.training import finetune
from genlora_jax.training.recipe import Recipe

FORMS = ("fp8_backward", "fp8", "int8", "nf4", "int4")
EACH = [("int8", True), ("nf4", False), ("int4", True)]  # form, and whether layers are scanned
LORA = gl.LoRAConfig(rank=2)
DOWN = "model.layers.0.mlp.down_proj.weight"
# 64 divides these, as it does all real models' sizes.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}


def is_stored(leaf):
    return isinstance(leaf, StoredKernel)


def dequantised(params):
    """The base that a quantised one stands for, in float32 arrays."""
    return jax.tree.map(lambda x: read_kernel(x, jnp.float32), params, is_leaf=is_stored)


def quantised_llama(form, **changes):
    model, params = random_llama(**changes)
    return model, quantise(params, Quantisation(form))


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def weight(d_out, d_in, dtype):
    """A weight `[d_out, d_in]` in PyTorch, and the kernel that it is."""
    torch.manual_seed(d_in)
    made = (torch.randn(d_out, d_in) * 0.05).to(dtype)
    kind = jnp.bfloat16 if dtype == torch.bfloat16 else jnp.float32
    return made, jnp.asarray(made.float().numpy().T).astype(kind)


# Values.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_has_the_values_of_bitsandbytes(dtype):
    made, kernel = weight(96, 192, dtype)
    packed, state = bnb.quantize_4bit(made, quant_type="nf4")
    expected = bnb.dequantize_4bit(packed, state).float().numpy().T
    plain = dataclasses.replace(
        NF4.of(kernel, kernel.dtype), absmax=block_absmax(kernel, 64)[1], nested=None, offset=None
    )
    got = np.asarray(jax.jit(lambda k: k.astype(k.dtype))(plain), np.float32)
    np.testing.assert_array_equal(got, expected)


def test_double_quantisation_has_the_values_of_bitsandbytes():
    assert np.array_equal(SCALES, bnb.create_dynamic_map().numpy())
    made, kernel = weight(128, 576, torch.float32)
    ours = jax.jit(lambda k: NF4.of(k, k.dtype))(kernel)
    packed, state = bnb.quantize_4bit(made, quant_type="nf4")
    offset = torch.tensor(float(ours.offset))  # a mean of float32, in whatever order
    assert abs(float(state.absmax.mean()) - float(offset)) <= np.spacing(np.float32(offset))
    # In float64 bitsandbytes compares with every level; in float32 on CPUs it looks codes up in a
    # coarse table, unlike on GPUs.
    quantise_blockwise = torch.ops.bitsandbytes.quantize_blockwise.default
    codes, nested = quantise_blockwise(
        (state.absmax - offset).double(), bnb.create_dynamic_map(), 256
    )
    np.testing.assert_array_equal(np.asarray(ours.absmax).T.reshape(-1), codes.numpy())
    np.testing.assert_array_equal(ours.nested, nested.numpy())
    levels = bnb.create_dynamic_map()
    state.absmax = (
        bnb.dequantize_blockwise(codes, absmax=nested, code=levels, blocksize=256) + offset
    )
    expected = bnb.dequantize_4bit(packed, state).numpy().T
    np.testing.assert_array_equal(jax.jit(lambda k: k.astype(jnp.float32))(ours), expected)


def test_int8_has_the_values_of_bitsandbytes():
    made, kernel = weight(96, 192, torch.float32)
    codes, absmax, _ = bnb.int8_vectorwise_quant(made)
    ours = Int8.of(kernel, kernel.dtype)
    np.testing.assert_array_equal(np.asarray(ours.codes).T, codes.numpy())
    np.testing.assert_array_equal(ours.absmax, absmax.numpy())
    expected = bnb.int8_vectorwise_dequant(codes, absmax).numpy().T
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=3e-7)


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("d_in", [128, 172])
def test_int4_is_nearest_in_each_group(group, d_in):
    kernel = np.random.default_rng(0).standard_normal((d_in, 12)).astype(np.float32)
    got = np.asarray(Int4.of(jnp.asarray(kernel), jnp.float32, group).astype(jnp.float32))
    for start in range(0, d_in, group):
        part = kernel[start : start + group].astype(np.float64)
        scale = (np.abs(part).max(0) / 7).astype(jnp.bfloat16).astype(np.float64)
        expected = np.clip(np.round(part / scale), -7, 7) * scale
        np.testing.assert_allclose(got[start : start + group], expected, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_of_zeros_and_one_of_odd_size_come_back(form):
    assert not largest(Quantisation(form).kernel(jnp.zeros((100, 6))).dequantised())
    kernel = jax.random.normal(jax.random.key(0), (2, 100, 6))
    stack = Quantisation(form).kernel(kernel)
    assert stack.shape == kernel.shape
    assert stack.size == kernel.size
    for i in range(2):  # a stack is its layers
        alone = Quantisation(form).kernel(kernel[i]).dequantised()
        np.testing.assert_array_equal(stack[i].dequantised(), alone)
    assert float(jnp.abs(stack.dequantised() - kernel).mean()) < 0.15


def test_a_setting_that_is_none_is_refused():
    for wrong, message in (
        ({"form": "nf5"}, "base_dtype must be one of"),
        ({"form": "int4", "group": 32}, "int4_group must be one of"),
        ({"form": "int8", "unquantised": (3,)}, "unquantised must be a list of patterns"),
    ):
        with pytest.raises(ValueError, match=message):
            Quantisation(**wrong)


# The model, adapters and merging on it.


@pytest.mark.parametrize(("form", "scan"), EACH)
def test_logits_are_those_of_the_dequantised_base(form, scan):
    model, params = quantised_llama(form, scan=scan)
    ids = jnp.arange(24).reshape(2, 12)
    logits = jax.jit(lambda params: model.apply({"params": params}, ids))
    np.testing.assert_allclose(logits(params), logits(dequantised(params)), atol=1e-5)
    assert quantisation_of(params) == Quantisation(form)


@pytest.mark.parametrize(
    ("cfg", "scan"),
    [
        (LORA, False),
        (gl.DoRAConfig(rank=2, dropout=0.1), True),
        (gl.LoRAConfig(rank=2, hadamard=True), False),
        (gl.PiSSAConfig(rank=2), True),
    ],
    ids=["lora", "dora", "hira", "pissa"],
)
def test_gradients_and_merges_are_those_on_the_dequantised_base(cfg, scan):
    options = {"remat": "none" if scan else "dots", "num_hidden_layers": 2}
    model, params = quantised_llama("nf4", scan=scan, **options)
    plain, ids = dequantised(params), jnp.arange(12).reshape(1, 12)
    adapter = perturb(gl.init_adapter(cfg, jax.random.key(0), params))

    def loss(adapter, params):
        factors = gl.generate_factors(cfg, adapter)
        rngs = {"dropout": jax.random.key(1)}
        logits = gl.apply(model, params, factors, ids, dropout=cfg.dropout, rngs=rngs)
        return jnp.square(logits).mean()

    gradients = [jax.jit(jax.grad(loss))(adapter, base) for base in (params, plain)]
    for got, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5 * float(jnp.abs(expected).max()))
    factors = gl.generate_factors(cfg, adapter)
    merged, expected = (jax.jit(gl.merge)(base, factors) for base in (params, plain))
    for path, leaf in flatten_dict(expected).items():
        np.testing.assert_allclose(flatten_dict(merged)[path], leaf, atol=1e-6)
    assert not any(map(is_stored, jax.tree.leaves(merged["model"], is_leaf=is_stored)))


@pytest.mark.parametrize("scan", [True, False])
def test_no_dequantised_kernel_is_kept_for_the_backward_pass(scan):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    model, params = quantised_llama("int8", scan=scan, **sizes)
    adapter = gl.init_adapter(LORA, jax.random.key(0), params)
    ids = jnp.ones((1, 4), jnp.int32)

    def loss(adapter, params):
        return gl.apply(model, params, gl.generate_factors(LORA, adapter), ids).sum()

    lowered = jax.jit(jax.grad(loss)).lower(adapter, params)
    products = 7 * sizes["num_hidden_layers"]
    if scan:
        kernels = sum(4 * x.size for x in jax.tree.leaves(dequantised(params["model"]["layers"])))
        assert lowered.compile().memory_analysis().temp_size_in_bytes < kernels / 3
    else:  # XLA for CPUs drops these barriers, and keeps what it finds to be computed twice
        assert lowered.as_text().count("optimization_barrier") >= 2 * products
        model = model.clone(remat="full")  # which has one for each layer
        lowered = jax.jit(jax.grad(loss)).lower(adapter, params)
        assert lowered.as_text().count("optimization_barrier") >= 3 * products


def test_sharded_parts_are_cut_as_kernels_are():
    model, params = quantised_llama("nf4", vocab_size=64, **WIDE)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check_params(mesh, params)
    specs = param_specs(params)["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert specs.codes == specs.absmax == jax.sharding.PartitionSpec(None, "tensor", "fsdp")
    assert specs.nested == jax.sharding.PartitionSpec(None, None)
    ids = jnp.arange(48).reshape(4, 12)
    expected = jax.jit(lambda p: model.apply({"params": p}, ids))(params)
    placed = jax.device_put(params, named(mesh, param_specs(params)))
    got = jax.jit(lambda p: model.clone(mesh=mesh).apply({"params": p}, ids))(placed)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"mesh.tensor=8 does not divide 4, .*down_proj.*absmax"):
        check_params(make_mesh(MeshConfig(tensor=8)), {"model": params["model"]})


# Files.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / "base"
    return write_base(path, num_hidden_layers=2, tie_word_embeddings=False)


@pytest.mark.parametrize(("form", "scan"), EACH)
def test_loading_quantises_what_is_read(base, form, scan):
    options = {"dtype": jnp.float32, "param_dtype": jnp.float32, "scan": scan}
    _, plain = gl.load_llama(base, **options)
    _, params = gl.load_llama(base, **options, base_dtype=form, unquantised=["lm_head", "o_proj"])
    expected = quantise(plain, Quantisation(form, ("lm_head", "o_proj")))
    assert quantisation_of(params) == Quantisation(form, ("lm_head", "o_proj"))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for got, part in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(part, np.float32), rtol=1e-6
        )


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """An adapter that was trained, so to speak, on the base in NF4."""
    tmp_path = tmp_path_factory.mktemp("trained")
    model, params = gl.load_llama(base, base_dtype="nf4")
    adapter = perturb(gl.init_adapter(LORA, jax.random.key(0), params))
    gl.save_adapter(tmp_path / "adapter", LORA, adapter, model=model)
    return tmp_path / "adapter", model, params, gl.generate_factors(LORA, adapter)


def test_an_adapter_remembers_its_base_and_a_mismatch_is_said(base, trained):
    path, model, params, _ = trained
    settings = json.loads((path / "adapter.json").read_text())
    assert settings["base"]["quantisation"]["form"] == "nf4"
    gl.load_adapter(path, params, model=model)
    other, plain = gl.load_llama(base)
    with pytest.warns(UserWarning, match="trained on a base in nf4; this one is in full precision"):
        gl.load_adapter(path, plain, model=other)


def test_merging_is_onto_the_dequantised_base(base, trained, run_main, tmp_path):
    path, _, _, factors = trained
    status, out, _ = run_main(
        cli.main, "merge", "--base", base, "--adapter", path, "--out", tmp_path / "merged"
    )
    assert status == 0, out
    assert "onto the kernels dequantised from nf4" in out
    _, merged = gl.load_llama(tmp_path / "merged", param_dtype=jnp.float32)
    _, params = gl.load_llama(base, param_dtype=jnp.float32, base_dtype="nf4")
    expected = flatten_dict(gl.merge(dequantised(params), factors))
    for leaf, value in flatten_dict(merged).items():
        np.testing.assert_allclose(value, expected[leaf], atol=1e-6)


def test_merging_onto_the_original_says_how_logits_differ(base, trained, run_main, tmp_path):
    path, _, _, factors = trained
    arguments = ("merge", "--base", base, "--adapter", path, "--out", tmp_path / "merged")
    message = (
        r"kernels in nf4 and is merged onto the original ones\. Logits of 64 random tokens differ"
    )
    with pytest.warns(UserWarning, match=message):
        status, _, err = run_main(cli.main, *arguments, "--onto", "original")
    assert status == 0, err
    _, merged = gl.load_llama(tmp_path / "merged", param_dtype=jnp.float32)
    _, plain = gl.load_llama(base, param_dtype=jnp.float32)
    expected = flatten_dict(gl.merge(plain, factors))
    for leaf, value in flatten_dict(merged).items():
        np.testing.assert_allclose(value, expected[leaf], atol=1e-6)


def test_onto_original_in_full_precision_compares_nothing(base, run_main, tmp_path, recwarn):
    model, params = gl.load_llama(base)
    adapter = perturb(gl.init_adapter(LORA, jax.random.key(0), params))
    gl.save_adapter(tmp_path / "adapter", LORA, adapter, model=model)
    paths = ("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged")
    options = ("--onto", "original", "--base_dtype", "bf16")
    status, _, err = run_main(cli.main, "merge", *paths, *options)
    assert status == 0, err
    assert not [w for w in recwarn if "is merged onto the original" in str(w.message)]


def test_onto_original_is_refused_where_the_checkpoint_is_quantised(
    ready_made, trained, run_main, tmp_path
):
    path, _ = ready_made(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    paths = ("--base", path, "--adapter", trained[0], "--out", tmp_path / "merged")
    status, _, err = run_main(cli.main, "merge", *paths, "--onto", "original")
    assert status
    assert "is itself quantised (quant_method 'bitsandbytes')" in err


def test_repeating_the_form_keeps_what_the_adapter_knows(base, run_main, tmp_path):
    options = {"base_dtype": "int4", "int4_group": 128, "unquantised": ["lm_head", "o_proj"]}
    model, params = gl.load_llama(base, **options)
    adapter = perturb(gl.init_adapter(LORA, jax.random.key(0), params))
    gl.save_adapter(tmp_path / "adapter", LORA, adapter, model=model)
    paths = ("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged")
    status, out, err = run_main(cli.main, "merge", *paths, "--base_dtype", "int4")
    assert status == 0, err
    assert "dequantised from int4 in groups of 128, not o_proj" in out


def test_a_peft_adapter_merges_onto_the_kernels_that_flags_name(base, run_main, tmp_path):
    options = {"base_dtype": "int4", "int4_group": 128, "unquantised": ["lm_head", "o_proj"]}
    _, params = gl.load_llama(base, param_dtype=jnp.float32, **options)
    factors = gl.generate_factors(LORA, perturb(gl.init_adapter(LORA, jax.random.key(0), params)))
    gl.export_peft(tmp_path / "peft", LORA, factors, base=base)
    paths = ("--base", base, "--adapter", tmp_path / "peft", "--out", tmp_path / "merged")
    flags = ("--int4_group", "128", "--unquantised", '["lm_head", "o_proj"]')
    status, _, err = run_main(cli.main, "merge", *paths, *flags)
    assert status
    assert "take --base_dtype: give that as well" in err
    status, out, err = run_main(cli.main, "merge", *paths, *flags, "--base_dtype", "int4")
    assert status == 0, err
    assert "dequantised from int4 in groups of 128, not o_proj" in out
    _, merged = gl.load_llama(tmp_path / "merged", param_dtype=jnp.float32)
    expected = flatten_dict(gl.merge(dequantised(params), factors))
    for leaf, value in flatten_dict(merged).items():
        np.testing.assert_allclose(value, expected[leaf], atol=1e-6)


def test_a_peft_export_without_a_base_has_a_card_without_front_matter(trained, run_main, tmp_path):
    arguments = ("--adapter", trained[0], "--out", tmp_path / "peft")
    status, _, err = run_main(cli.main, "export-peft", *arguments)
    assert status == 0, err
    assert (tmp_path / "peft" / "README.md").read_text().startswith("Trained on a base with")


def test_a_peft_export_says_how_the_base_was_quantised(trained, run_main, tmp_path):
    out = tmp_path / "peft"
    arguments = ("--adapter", trained[0], "--out", out, "--base", "some/base")
    status, _, err = run_main(cli.main, "export-peft", *arguments)
    assert status == 0, err
    card = (out / "README.md").read_text()
    assert "base_model: some/base" in card
    assert "quantised to nf4" in card


def test_exported_as_it_is_a_quantised_base_is_its_dequantised_one(base, trained, tmp_path):
    _, _, params, _ = trained
    gl.export_hf(tmp_path / "out", params, base=base, dtype=jnp.float32)
    _, read = gl.load_llama(tmp_path / "out", param_dtype=jnp.float32)
    expected = flatten_dict(dequantised(params))
    for path, leaf in flatten_dict(read).items():
        np.testing.assert_array_equal(leaf, expected[path])


RECIPE = ("--train.steps", "2", "--train.save_every", "1", "--train.progress", "false")


def test_a_run_resumes_on_the_same_form_alone_and_its_adapter_works(base, run_main, tmp_path):
    start = ("--config", write_recipe(tmp_path, base, "int8"), *RECIPE)
    status, _, err = run_main(finetune.main, *start)
    assert status == 0, err
    more = (*start, "--train.steps", "3", "--train.resume", "true")
    status, _, err = run_main(finetune.main, *more, "--model.base_dtype", "nf4")
    assert status == 1
    assert "was trained on a base in int8; the recipe's is in nf4" in err
    status, out, err = run_main(finetune.main, *more)
    assert status == 0, err
    assert "resumed at step 2" in out
    arguments = ("--model", base, "--adapter", tmp_path / "run" / "adapter", "--prompt", "one")
    options = ("--max_new_tokens", "4", "--dtype", "float32", "--base_dtype", "int8")
    status, _, err = run_main(cli.main, "generate", *arguments, *options)
    assert status == 0, err
    assert "trained on" not in err


# Checkpoints that are quantised already.


@pytest.fixture(scope="module")
def ready_made(tmp_path_factory):
    """A function that writes a model that transformers and bitsandbytes have quantised."""
    root = tmp_path_factory.mktemp("ready")
    torch.manual_seed(0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    sizes = TINY | WIDE | ids | {"initializer_range": 0.2}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.bfloat16)
    plain.save_pretrained(root / "plain")

    @functools.cache
    def make(**options):
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            root / "plain", quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
        )
        path = root / "-".join(["made", *map(str, options.values())])
        model.save_pretrained(path)
        return path, model

    return make


def peers_kernels(model):
    """The kernels of a model of bitsandbytes, dequantised to float32, by our path."""
    found = {}
    for name, module in model.named_modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            state.dtype = torch.float32
            value = bnb.dequantize_4bit(module.weight.data, state)
            found[(*name.split("."), "kernel")] = value.numpy().T
    return found


@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_of_bitsandbytes_is_read_to_the_bit(ready_made, double):
    path, peer = ready_made(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model, params = gl.load_llama(path, dtype=jnp.float32, scan=False)
    assert quantisation_of(params) == Quantisation("nf4")
    _, stacked = gl.load_llama(path)
    _, floats = gl.load_llama(path, scan=False, param_dtype=jnp.float32, base_dtype="bf16")
    expected = peers_kernels(peer)
    assert len(expected) == 14
    read = jax.jit(lambda k: k.astype(jnp.float32))
    for name, value in expected.items():
        leaf = flatten_dict(params)[name]
        assert isinstance(leaf, NF4)
        np.testing.assert_array_equal(read(leaf), value)
        np.testing.assert_array_equal(flatten_dict(floats)[name], value)
        whole = flatten_dict(stacked)[(*name[:2], *name[3:])]
        np.testing.assert_array_equal(read(whole[int(name[2])]), value)
    ids = np.arange(12).reshape(1, 12)
    logits = jax.jit(lambda params: model.apply({"params": params}, ids))(params)
    # bitsandbytes' products on CPUs are in bfloat16: its kernels in a model of float32 are exact.
    exact = transformers.LlamaForCausalLM.from_pretrained(
        path.parent / "plain", dtype=torch.float32
    )
    for (*name, _), value in expected.items():
        exact.get_submodule(".".join(name)).weight.data = torch.tensor(value.T)
    expected = torch_logits(exact, ids)
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(logits, expected, atol=128 * eps * np.abs(expected).max())


def test_fp8_is_read_as_it_is_scaled(tmp_path):
    """Blocks, rows and whole tensors, as their formats document them."""
    path = write_base(tmp_path / "base", hidden_size=32, intermediate_size=40, head_dim=8)
    config = json.loads((path / "config.json").read_text())
    arrays = load_file(path / "model.safetensors")
    torch.manual_seed(0)
    expected, tensors = {}, {}
    for name, value in arrays.items():
        if "proj" not in name:
            tensors[name] = torch.tensor(value)
            continue
        codes = torch.tensor(value).to(torch.float8_e4m3fn)
        down, across = value.shape
        blocks = torch.rand(-(-down // 16), -(-across // 16)) + 0.5
        scale = {"q_proj": torch.tensor(0.5), "k_proj": torch.rand(down, 1) + 0.5}
        given = scale.get(name.split(".")[-2], blocks)
        wide = given
        if given is blocks:
            wide = given.repeat_interleave(16, 0).repeat_interleave(16, 1)[:down, :across]
        expected[name] = (codes.float() * wide).numpy()
        suffix = "weight_scale_inv" if given is blocks else "weight_scale"
        tensors |= {name: codes, name.replace("weight", suffix): given}
    save_torch(tensors, path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    _, params = gl.load_llama(path, scan=False, param_dtype=jnp.float32)
    for name, value in expected.items():
        leaf = flatten_dict(params)[(*name.split(".")[:-1], "kernel")]
        np.testing.assert_array_equal(leaf, value.T)


def test_blocks_of_fp8_as_many_as_rows_are_blocks(tmp_path):
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    codes = torch.randn(16, 32).to(torch.float8_e4m3fn)  # 32 = 4 * 8: 4 x 4 blocks of 16 rows
    blocks = torch.rand(4, 4) + 0.5
    save_torch({"w": codes, "w_scale_inv": blocks}, tmp_path / "model.safetensors")
    wide = blocks.repeat_interleave(4, 0).repeat_interleave(8, 1)
    checkpoint = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.read("w"), codes.float() * wide)
    np.testing.assert_array_equal(checkpoint.read("w", slice(3, 9)), (codes.float() * wide)[3:9])


@pytest.mark.parametrize(("double", "part"), [(True, "nested_absmax"), (False, "absmax")])
def test_scales_of_nf4_that_are_not_finite_are_refused(ready_made, tmp_path, double, part):
    made, _ = ready_made(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    path = shutil.copytree(made, tmp_path / "damaged")
    tensors, name = load_file(path / "model.safetensors"), f"{DOWN}.{part}"
    tensors[name] = np.full_like(tensors[name], np.inf)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor {name} holds a NaN or an"):
        gl.load_llama(path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (f"{STATE}nf4", "is damaged: no 'nested_offset'"),
        (".absmax", "absmax is of dtype F32"),
        (".nested_absmax", "nested_absmax has 1 values"),
        ("", "is of dtype I8"),
    ],
)
def test_nf4_whose_parts_do_not_fit_is_refused(ready_made, tmp_path, part, message):
    made, _ = ready_made(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    path = shutil.copytree(made, tmp_path / "damaged")
    tensors, name = load_file(path / "model.safetensors"), f"{DOWN}{part}"
    if part == f"{STATE}nf4":
        state = json.loads(tensors[name].tobytes())
        del state["nested_offset"]
        tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    elif part == ".nested_absmax":
        tensors[name] = tensors[name][:1]
    else:
        tensors[name] = tensors[name].astype(np.float32 if part else np.int8)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {DOWN}.*{message}"):
        gl.load_llama(path)


def test_codes_are_not_taken_for_scales_of_fp8(tmp_path):
    config = {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    exponents = torch.full((4, 1), 127, dtype=torch.uint8)  # of E8M0: each stands for 1
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    save_torch({"w": codes, "w_scale": exponents}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tensor w_scale is of dtype U8"):
        open_checkpoint(tmp_path).read("w")
    with pytest.raises(ValueError, match="tensor w_scale is of dtype U8"):  # nor for a norm's
        open_checkpoint(tmp_path).read("w_scale")


@pytest.mark.parametrize("size", [5, [1], [0, 8], ["a", 1], {"a": 1}, [True, 1], [1, 2, 3]])
def test_sizes_of_blocks_that_are_none_are_refused(tmp_path, size):
    for method in ({"quant_method": "fp8"}, {"quant_method": "compressed-tensors"}):
        settings = method | {"format": "float-quantized", "weight_block_size": size}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
        with pytest.raises(ValueError, match=r"config\.json: weight_block_size"):
            open_checkpoint(tmp_path)


def test_the_size_of_a_tensor_in_nf4_is_that_of_its_floats(ready_made):
    made, _ = ready_made(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    checkpoint = open_checkpoint(made)
    assert checkpoint.size_of(DOWN) == checkpoint.read(DOWN).nbytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq', which is not read"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes in fp4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'pack-quantized'"),
        ({"bits": 4}, "quant_method None"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, settings, message):
    path = write_base(tmp_path / "base")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(ValueError, match=message):
        gl.load_llama(path)


# What it takes.

SHAPE = {"vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
PLANNED = {
    "model": {
        "path": "nowhere",
        "dtype": "float32",
        "param_dtype": "float32",
        "shape": SHAPE | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3},
    },
    "adapter": {"class_path": "genlora_jax.LoRAConfig", "init_args": {"rank": 2}},
    "data": {"train": "nowhere.jsonl", "length": 12, "batch_size": 8},
    "train": {"output": "nowhere", "steps": 10},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_plan_counts_the_parts_of_quantised_kernels(form, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(PLANNED))
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--model.base_dtype", form]
    recipe, mesh = parse(Recipe, arguments), MeshConfig(data=2, fsdp=2, tensor=2)
    program = build(recipe, make_mesh(mesh))
    found = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((program.state, program.params, program.batch))
    )
    assert estimate(recipe, CHIPS["v5e"], mesh).arguments == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("double", [True, False])
def test_the_plan_counts_a_checkpoint_of_bitsandbytes_as_it_is_read(ready_made, tmp_path, double):
    path, _ = ready_made(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = {"path": str(path), "param_dtype": "float32"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(PLANNED | {"model": model}))
    recipe = parse(Recipe, ["--config", str(tmp_path / "recipe.yaml")])
    _, params = gl.load_llama(path, param_dtype=jnp.float32)
    planned = shapes_of(recipe).params
    assert jax.tree.structure(planned) == jax.tree.structure(params)
    for got, read in zip(*map(jax.tree.leaves, (planned, params)), strict=True):
        assert (got.shape, got.dtype) == (read.shape, read.dtype)
    compiled = build(recipe, make_mesh(MeshConfig(data=8))).params
    assert [leaf.size for leaf in jax.tree.leaves(planned)] == [
        leaf.size for leaf in jax.tree.leaves(compiled)
    ]


@pytest.mark.parametrize(
    ("skipped", "left"),
    [
        (None, {"lm_head"}),
        (["lm_head", "model.layers.1.mlp"], {"lm_head", "up_proj", "down_proj"}),
        (["q_proj"], {"q_proj"}),
    ],
)
def test_the_modules_that_a_config_skips_are_left(skipped, left):
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    found = stated_quantisation(Path("config.json"), settings | {"llm_int8_skip_modules": skipped})
    ends = {"lm_head": "lm_head", "q_proj": "model.layers.self_attn.q_proj"}
    ends |= {name: f"model.layers.mlp.{name}" for name in ("up_proj", "down_proj")}
    assert found.quantises(ends.values()) == {ends[name] for name in ends.keys() - left}


def test_a_sweep_trains_several_adapters_over_one_quantised_base():
    model, params = quantised_llama("int8")
    stack = [gl.init_adapter(LORA, jax.random.key(seed), params) for seed in range(2)]
    ids = jnp.arange(12).reshape(1, 12)

    def loss(adapter, params):
        logits = gl.apply(model, params, gl.generate_factors(LORA, perturb(adapter)), ids)
        return jnp.square(logits).mean()

    together = jax.vmap(jax.grad(loss), in_axes=(0, None))
    got = jax.jit(together)(jax.tree.map(lambda *x: jnp.stack(x), *stack), params)
    for i, adapter in enumerate(stack):
        alone = jax.jit(jax.grad(loss))(adapter, params)
        for one, other in zip(*map(jax.tree.leaves, (got, alone)), strict=True):
            np.testing.assert_allclose(one[i], other, atol=1e-5)
