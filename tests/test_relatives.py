"""Relatives of LoRA that make much of few parameters: against PEFT, or the papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import perturb

import genlora_jax as gl
from genlora_jax.methods import config_from_json, config_to_json

LAYERS, D_IN, D_OUT = 2, 12, 20
BASE = {"layers": {"proj": {"kernel": jax.ShapeDtypeStruct((LAYERS, D_IN, D_OUT), np.float32)}}}
CONFIGS = {
    "uni_lora": gl.UniLoRAConfig(rank=3, size=50, bound=0.5),
    "tied_a": gl.TiedLoRAConfig(rank=3, alpha=6.0),
    "tied_b": gl.TiedLoRAConfig(rank=3, alpha=6.0, tied="b"),
    "sine": gl.SineLoRAConfig(rank=3, alpha=6.0, omega=30.0),
    "nola": gl.NOLAConfig(rank=3, alpha=6.0, count=5),
}
X = np.random.default_rng(1).standard_normal((4, D_IN)).astype(np.float32)


def close(ours, theirs):
    """Whether arrays agree to the rounding of float32 sums of a hundred terms."""
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=100 * eps * np.abs(theirs).max())


def moved_adapter(name):
    """An adapter whose every leaf is away from where it starts, and its target."""
    new = gl.init_adapter(CONFIGS[name], jax.random.key(0), BASE)
    moved = new.replace(trainable=perturb(new.trainable, size=0.3))
    return moved, moved.spec.targets[0]


def deltas(adapter):
    """The deltas of the layers, `[L, d_in, d_out]`."""
    leaves = gl.generate_factors(adapter.config, adapter)["layers"]["proj"]
    return np.asarray(leaves["delta"] if "delta" in leaves else leaves["a"] @ leaves["b"])


def exact(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def torch_layers(config):
    """Two linear layers in PyTorch with a PEFT method in them."""
    import peft
    import torch

    layers = {f"layer{i}": torch.nn.Linear(D_IN, D_OUT, bias=False) for i in range(LAYERS)}
    model = peft.get_peft_model(torch.nn.ModuleDict(layers), config).base_model.model
    return [model[name] for name in layers]


def change(layer):
    """What PEFT's method adds to a layer's output at `X`."""
    import torch

    x = torch.from_numpy(X)
    with torch.no_grad():
        return (layer(x) - layer.base_layer(x)).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_begins_at_zero_and_all_of_it_is_trained(name):
    cfg = CONFIGS[name]
    assert config_from_json(config_to_json(cfg)) == cfg
    new = gl.init_adapter(cfg, jax.random.key(0), BASE)
    adapter, _ = moved_adapter(name)
    # Uni-LoRA subtracts what it begins at; the others multiply with zeros.
    most = 1e-7 * np.abs(deltas(adapter)).max() if name == "uni_lora" else 0.0
    assert np.abs(deltas(new)).max() <= most

    def power(trainable):
        leaves = gl.generate_factors(cfg, adapter.replace(trainable=trainable))["layers"]["proj"]
        delta = leaves["delta"] if "delta" in leaves else leaves["a"] @ leaves["b"]
        return jnp.square(delta - 1.0).sum()

    for path, leaf in flatten_dict(jax.grad(power)(adapter.trainable)).items():
        assert np.abs(leaf).max() > 0, path


def test_uni_lora_is_that_of_peft(monkeypatch):
    import peft
    import torch
    from peft.tuners.unilora import UniLoraModel

    adapter, target = moved_adapter("uni_lora")
    cfg, theta = adapter.config, np.asarray(adapter.trainable["vectors"]["shared"])
    a, b = (np.asarray(cfg.drawn(target, side)) for side in "ab")
    order = [part.ravel() for i in range(LAYERS) for part in (a[i].T, b[i])]

    def drawn(count, size, seed):
        indices = np.concatenate(order)
        assert (len(indices), cfg.size) == (count, size)
        return torch.from_numpy(indices).long()

    monkeypatch.setattr(UniLoraModel, "generate_index", staticmethod(drawn))
    settings = peft.UniLoraConfig(
        r=cfg.rank, theta_d_length=cfg.size, target_modules=["layer0", "layer1"]
    )
    layers = torch_layers(settings)
    start = np.asarray(adapter.frozen["initial"]["shared"])
    outputs = []
    for vector in (theta, start):
        with torch.no_grad():
            layers[0].unilora_theta_d["default"].copy_(torch.from_numpy(np.array(vector)))
        outputs.append([change(layer) for layer in layers])
    ours = deltas(adapter)
    for i in range(LAYERS):
        close(X @ ours[i], outputs[0][i] - outputs[1][i])


def test_places_of_uni_lora_are_spread_evenly():
    cfg = gl.UniLoRAConfig(rank=16, size=64)
    target = gl.init_adapter(cfg, jax.random.key(0), BASE).spec.targets[0]
    counts = np.asarray(cfg.counts((target,)))
    expected = LAYERS * (D_IN + D_OUT) * 16 / 64
    assert counts.sum() == 64 * expected
    assert np.abs(counts - expected).max() < 5 * expected**0.5  # five deviations of a Poisson


def test_a_vector_of_uni_lora_that_is_longer_than_its_factors_is_refused():
    elements = LAYERS * (D_IN + D_OUT) * 3
    gl.init_adapter(gl.UniLoRAConfig(rank=3, size=elements), jax.random.key(0), BASE)
    with pytest.raises(ValueError, match=f"size {elements + 1} exceeds the {elements} elements"):
        gl.init_adapter(gl.UniLoRAConfig(rank=3, size=elements + 1), jax.random.key(0), BASE)


def test_a_tied_b_is_lily_of_peft_whose_bs_are_alike():
    import peft
    import torch

    adapter, _ = moved_adapter("tied_b")
    sides = adapter.trainable["factors"]["layers.proj"]
    settings = peft.LilyConfig(
        r=3, scaling=2.0, stride_A=1, num_B=2, target_modules=["layer0", "layer1"]
    )
    layers = torch_layers(settings)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.lily_A["default"].weight.copy_(torch.from_numpy(np.array(sides["a"][i].T)))
            # Whatever the router's weights are, they sum to 1.
            both = np.concatenate([sides["b"][0]] * 2)
            layer.lily_B["default"].weight.copy_(torch.from_numpy(both))
    assert sides["b"].shape == (1, 3, D_OUT)
    ours = deltas(adapter)
    for i, layer in enumerate(layers):
        close(X @ ours[i], change(layer))


def test_a_tied_a_is_lora_of_peft_with_that_a_in_every_layer():
    import peft
    import torch

    adapter, _ = moved_adapter("tied_a")
    sides = adapter.trainable["factors"]["layers.proj"]
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer0", "layer1"])
    layers = torch_layers(settings)
    assert sides["a"].shape == (1, D_IN, 3)
    ours = deltas(adapter)
    for i, layer in enumerate(layers):
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(torch.from_numpy(np.array(sides["a"][0].T)))
            layer.lora_B["default"].weight.copy_(torch.from_numpy(np.array(sides["b"][i].T)))
        close(X @ ours[i], change(layer))


def test_sine_lora_is_the_papers_equation():
    adapter, _ = moved_adapter("sine")
    sides = exact(adapter.trainable["factors"]["layers.proj"])
    theirs = 2.0 * np.sin(30.0 * sides["a"] @ sides["b"]) / D_IN**0.5
    # The sine's argument is about 30 and rounded like it.
    np.testing.assert_allclose(deltas(adapter), theirs, rtol=0, atol=1e-5)
    assert np.linalg.matrix_rank(theirs[0]) == D_IN


def test_an_error_about_a_whole_delta_names_sine_lora():
    factors = gl.generate_factors(CONFIGS["sine"], moved_adapter("sine")[0])
    with pytest.raises(ValueError, match=r"has a delta \(full fine-tuning or Sine-LoRA\)"):
        gl.combine([factors], [1.0])


def test_nola_is_the_papers_equation():
    adapter, target = moved_adapter("nola")
    weights = exact(adapter.trainable["mixtures"]["layers.proj"])
    matrices = {side: exact(adapter.config.matrices(target, side)) for side in "ab"}
    ours = deltas(adapter)
    for i in range(LAYERS):
        a, b = (
            sum(w * m for w, m in zip(weights[side][i], matrices[side], strict=True))
            for side in "ab"
        )
        close(ours[i], 2.0 * a @ b.T)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gl.UniLoRAConfig(size=0), "size must be"),
        (lambda: gl.UniLoRAConfig(bound=0.0), "bound must be"),
        (lambda: gl.TiedLoRAConfig(tied="c"), "tied must be"),
        (lambda: gl.SineLoRAConfig(omega=0.0), "omega must be"),
        (lambda: gl.NOLAConfig(count=0), "count must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
