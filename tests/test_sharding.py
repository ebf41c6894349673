"""Meshes of eight CPU devices: what lies where, and that numbers are those of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from tiny_models import perturb

import genlora_jax as gl
from genlora_jax import sharding
from genlora_jax.mesh import MeshConfig, make_mesh
from genlora_jax.training.step import init_state, make_eval_step, make_train_step
from genlora_jax.training.step_options import StepOptions

MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(fsdp=1, tensor=8),
    "fsdp-tensor": MeshConfig(tensor=2),
    "data-fsdp-tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
}
CFG = gl.GenLoRAConfig(rank=4, alpha=8.0, group_size=8, kernels=2, rbf_init=0.5)
CONFIGS = {"genlora": CFG, "full": gl.FullConfig()}


@pytest.fixture(params=MESHES)
def mesh(request):
    return make_mesh(MESHES[request.param])


@pytest.fixture
def base(torch_twin):
    path, _ = torch_twin(**SHAPE)
    return path


def load(path, **options):
    return gl.load_llama(path, dtype=jnp.float32, param_dtype=jnp.float32, **options)


def batch_of(rows=16, length=16):
    rng = np.random.default_rng(0)
    segments = np.ones((rows, length), np.int32)
    segments[:, 7:], segments[::2, 10:] = 2, 0
    return {
        "input_ids": rng.integers(0, 64, (rows, length)).astype(np.int32),
        "loss_mask": rng.random((rows, length)) < 0.7,
        "segment_ids": segments,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }


def start(path, mesh, *, cfg=CFG, accumulate=1, rows=16, length=16, optimizer=None):
    """A step, by plain gradient descent if no optimizer is given, and its arguments.

    On a mesh or on one device.
    """
    # The attention of meshes on one device, too: that of CPUs rounds otherwise.
    model, params = load(path, mesh=mesh, attention="xla")
    adapter = perturb(gl.init_adapter(cfg, jax.random.key(0), params))
    optimizer = optimizer or optax.sgd(1.0)
    step = make_train_step(
        model, cfg, optimizer, StepOptions(accumulate=accumulate, chunk=32), mesh=mesh
    )
    state, batch = init_state(adapter, optimizer), batch_of(rows, length)
    if mesh is not None:
        state = jax.device_put(state, sharding.state_shardings(mesh, state))
        batch = sharding.place_batch(mesh, batch)
    return step, (state, params, batch)


def step_on(path, mesh, **options):
    """The adapter before and after a step, loss and norm of the gradient."""
    step, (state, params, batch) = start(path, mesh, **options)
    before = jax.device_get(state.adapter.trainable)
    state, metrics = step(state, params, batch)
    after = jax.device_get(state.adapter.trainable)
    step(state, params, batch)
    assert step._cache_size() == 1
    return before, after, float(metrics["loss"]), float(metrics["grad_norm"])


@pytest.fixture(scope="module")
def on_one_device():
    """The step of each method on one device, for all meshes; filled as tests ask for it."""
    return {}


# Every mesh, method and way to accumulate, but not all of their products: each is a compilation.
STEPS = [(name, *rest) for name in MESHES for rest in (("genlora", 2), ("full", 1))]


@pytest.mark.parametrize(
    ("mesh", "method", "accumulate"),
    [*STEPS, ("data-fsdp-tensor", "genlora", 1)],
    indirect=["mesh"],
)
def test_a_step_on_a_mesh_is_that_of_one_device(base, mesh, method, accumulate, on_one_device):
    cfg = CONFIGS[method]
    before, ours, loss, norm = step_on(base, mesh, cfg=cfg, accumulate=accumulate)
    if method not in on_one_device:
        on_one_device[method] = step_on(base, None, cfg=cfg)
    _, theirs, expected, expected_norm = on_one_device[method]
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-4)
    # A sum of n terms is exact to n eps; these go over tokens and over what a head holds.
    rounding = 16 * 16 * SHAPE["head_dim"] * np.finfo(np.float32).eps
    before, theirs = flatten_dict(before), flatten_dict(theirs)
    for path, leaf in flatten_dict(ours).items():
        gradient = np.abs(theirs[path] - before[path]).max()  # the rate is 1
        assert gradient > 0
        added = 2 * np.finfo(np.float32).eps * np.abs(theirs[path]).max()
        assert np.abs(leaf - theirs[path]).max() <= rounding * gradient + added, path


@pytest.fixture(scope="module")
def programs():
    """What `compiled` has compiled."""
    return {}


@pytest.fixture
def compiled(base, mesh, programs):
    """A function that compiles a method's step on the mesh, once for all tests."""

    def compile_step(method):
        if (mesh, method) not in programs:
            # So few tokens that activations are smaller than a kernel.
            step, arguments = start(base, mesh, cfg=CONFIGS[method], rows=8, length=8)
            programs[mesh, method] = step.lower(*arguments).compile()
        return programs[mesh, method]

    return compile_step


def test_the_program_has_its_arguments_where_the_rules_say(compiled, mesh):
    (state, params, batch), _ = compiled("genlora").input_shardings
    kernels = flatten_dict(params)
    layers = ("model", "layers")
    for module, spec in {
        ("self_attn", "q_proj"): P(None, "fsdp", "tensor"),
        ("self_attn", "o_proj"): P(None, "tensor", "fsdp"),
        ("mlp", "up_proj"): P(None, "fsdp", "tensor"),
        ("mlp", "down_proj"): P(None, "tensor", "fsdp"),
    }.items():
        found = kernels[(*layers, *module, "kernel")]
        assert found.is_equivalent_to(jax.NamedSharding(mesh, spec), 3), (module, found)
    assert kernels[("lm_head", "kernel")].is_equivalent_to(
        jax.NamedSharding(mesh, P("fsdp", "tensor")), 2
    )
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
    for leaf in batch.values():
        assert leaf.is_equivalent_to(jax.NamedSharding(mesh, P(("data", "fsdp"))), 2)


def test_whole_deltas_and_their_moments_lie_like_their_kernels(base, mesh):
    step, arguments = start(base, mesh, cfg=gl.FullConfig(), optimizer=optax.adam(1e-3))
    after, metrics = step(*arguments)
    kernels = {path[-2]: leaf for path, leaf in flatten_dict(arguments[1]).items()}
    before = arguments[0]
    for state in (before, after):
        adam = state.opt_state[0]
        for tree in (state.adapter.trainable, adam.mu, adam.nu):
            for name, delta in tree["deltas"].items():
                kernel = kernels[name.split(".")[-1]]
                assert delta.sharding.is_equivalent_to(kernel.sharding, 3), name
                assert not delta.is_fully_replicated
    assert all(leaf.is_fully_replicated for leaf in (after.step, *metrics.values()))


def test_whole_deltas_are_read_to_where_they_lie(base, mesh, tmp_path):
    _, params = load(base, mesh=mesh)
    cfg = gl.FullConfig(layers=[0, 2])
    adapter = perturb(gl.init_adapter(cfg, jax.random.key(0), params))
    gl.save_adapter(tmp_path / "adapter", cfg, adapter)
    _, loaded = gl.load_adapter(tmp_path / "adapter", params, mesh=mesh)
    specs = sharding.state_specs(loaded).trainable["deltas"]
    assert specs["model.layers.mlp.down_proj"] == P(None, "tensor", "fsdp")
    for name, delta in loaded.trainable["deltas"].items():
        assert delta.sharding.is_equivalent_to(jax.NamedSharding(mesh, specs[name]), 3), name
        np.testing.assert_array_equal(delta, adapter.trainable["deltas"][name])


SIZES = {"f32": 4, "s32": 4, "pred": 1}


@pytest.mark.parametrize("method", CONFIGS)
def test_no_more_than_a_layer_of_the_base_is_ever_put_together(compiled, mesh, method):
    text = compiled(method).as_text()
    gathered = [
        int(np.prod([int(n) for n in shape.split(",")])) * SIZES[kind]
        for kind, shape in re.findall(r"= \(?(\w+)\[([\d,]+)\][^=]* all-gather(?:-start)?\(", text)
    ]
    largest = 64 * 128 * 4  # a kernel of one layer; the whole base has three of each
    assert all(size <= largest for size in gathered), gathered
    if mesh.shape["fsdp"] > 1:
        assert gathered  # or the expression finds nothing


def test_evaluation_and_logits_are_those_of_one_device(base, mesh):
    model, params = load(base, mesh=mesh)
    alone, whole = load(base)
    factors = gl.generate_factors(CFG, perturb(gl.init_adapter(CFG, jax.random.key(0), whole)))
    batch = batch_of()
    ours = make_eval_step(model, StepOptions(chunk=16), mesh=mesh)(
        params, factors, sharding.place_batch(mesh, batch)
    )
    theirs = make_eval_step(alone, StepOptions(chunk=16))(whole, factors, batch)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)
    ids = batch["input_ids"][:3]  # rows that the mesh does not divide
    np.testing.assert_allclose(
        jax.jit(lambda p: gl.apply(model, p, factors, ids))(params),
        jax.jit(lambda p: gl.apply(alone, p, factors, ids))(whole),
        atol=1e-4,
    )


@pytest.mark.parametrize("scan", [True, False])
def test_each_device_holds_its_part_and_the_parts_are_the_whole(base, mesh, scan):
    params, whole = load(base, mesh=mesh, scan=scan)[1], load(base, scan=scan)[1]
    flat = flatten_dict(whole)
    specs = flatten_dict(sharding.param_specs(whole))
    for path, leaf in flatten_dict(params).items():
        np.testing.assert_array_equal(leaf, flat[path])
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, specs[path]), leaf.ndim)
    kernel = params["model"]["layers"]["0"] if not scan else params["model"]["layers"]
    kernel = kernel["mlp"]["up_proj"]["kernel"]
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert kernel.addressable_data(0).size * parts == kernel.size


def test_merged_and_exported_bytes_are_those_of_one_device(torch_twin, mesh, tmp_path):
    # Kernels large enough for XLA to use the same product for a part as for the whole.
    wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_hidden_layers": 1}
    base, _ = torch_twin(**SHAPE | wide)
    params, whole = load(base, mesh=mesh)[1], load(base)[1]
    cfg = gl.LoRAConfig(rank=16)
    factors = gl.generate_factors(cfg, perturb(gl.init_adapter(cfg, jax.random.key(0), whole)))
    merged = gl.merge(params, factors, donate=True)
    up = merged["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert up.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(None, "fsdp", "tensor")), 3)
    gl.export_hf(tmp_path / "spread", merged, base=base)
    gl.export_hf(tmp_path / "alone", gl.merge(whole, factors), base=base)
    ours, theirs = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("spread", "alone")
    )
    assert ours == theirs


@pytest.fixture
def bytes_read(monkeypatch):
    """The bytes of each read of a matrix; norms are read by every device."""
    from genlora_jax.hf.tensorfile import TensorFile

    read, found = TensorFile.read, []

    def counting(self, name, rows=slice(None)):
        value = read(self, name, rows)
        if value.ndim == 2:
            found.append(value.nbytes)
        return value

    monkeypatch.setattr(TensorFile, "read", counting)
    return found


def test_every_tensor_is_read_once_in_all(base, bytes_read):
    _, params = load(base, mesh=make_mesh(MeshConfig()))
    matrices = [x for path, x in flatten_dict(params).items() if path[-1] != "scale"]
    assert sum(bytes_read) == sum(leaf.nbytes for leaf in matrices)


def test_rows_that_devices_do_not_divide_are_read_as_few_times_as_they_allow(
    torch_twin, bytes_read
):
    path, _ = torch_twin(**SHAPE | {"vocab_size": 44, "intermediate_size": 132})
    _, params = load(path, mesh=make_mesh(MeshConfig(data=8, fsdp=1)))
    read, flat = sum(bytes_read), flatten_dict(params)
    # Eight devices, of which four divide the rows.
    twice = ("embed_tokens", "lm_head", "gate_proj", "up_proj")
    times = {path: 1 + any(name in path for name in twice) for path in flat}
    matrices = {path: leaf.nbytes for path, leaf in flat.items() if path[-1] != "scale"}
    assert read == sum(times[path] * size for path, size in matrices.items())
    for name, value in flatten_dict(load(path)[1]).items():
        np.testing.assert_array_equal(flat[name], value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": 3}, "mesh data=3 x fsdp=-1 x tensor=1 does not fit the 8 devices"),
        ({"fsdp": 4}, "mesh data=1 x fsdp=4 x tensor=1 does not fit the 8 devices"),
        ({"tensor": 0}, "mesh.tensor must be at least 1, or -1, got 0"),
        ({"data": -1}, "only one of data, fsdp and tensor can be -1"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**fields))


def test_shapes_that_a_mesh_does_not_divide_are_named(torch_twin):
    path, _ = torch_twin(**SHAPE | {"intermediate_size": 100})
    message = r"mesh\.tensor=8 does not divide 100, .* model\.layers\.mlp\.down_proj\.kernel"
    with pytest.raises(ValueError, match=message):
        load(path, mesh=make_mesh(MeshConfig(fsdp=1, tensor=8)))


def test_rows_that_a_mesh_does_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"12 rows cannot .* mesh\.data x mesh\.fsdp = 8"):
        sharding.place_batch(make_mesh(MeshConfig()), batch_of(rows=12))


def test_local_rows_are_placed_as_the_whole_batch_is():
    mesh, batch = make_mesh(MeshConfig(data=2, fsdp=2, tensor=-1)), batch_of(rows=8)
    assert sharding.local_rows(mesh, 8) == list(range(8))  # of one process
    whole = sharding.place_batch(mesh, batch)
    for name, value in sharding.place_batch(mesh, batch, rows=8).items():
        np.testing.assert_array_equal(value, whole[name])
        assert value.sharding == whole[name].sharding
