"""The methods that GenLoRA is compared with: against `peft`, and through the commands."""

import dataclasses
import functools
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from baseline_methods import EPS, METHODS, SHARED, TARGETS, close
from flax.traverse_util import flatten_dict
from tiny_base import write_base
from tiny_models import perturb, torch_logits

import genlora_jax as gl
from genlora_jax.cli import main
from genlora_jax.mesh import make_mesh
from genlora_jax.settings import parse
from genlora_jax.training import finetune, setup
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.recipe import Recipe

IDS = np.random.default_rng(0).integers(0, 512, (2, 9)).astype(np.int32)
# Where peft, or the model itself, holds what we train.
THEIRS = {
    ("factors", "a"): "lora_A.default.weight",
    ("factors", "b"): "lora_B.default.weight",
    ("hira", "a"): "hira_A.default",
    ("hira", "b"): "hira_B.default",
    ("magnitudes",): "lora_magnitude_vector.default.weight",
    ("vectors", "d"): "vera_lambda_d.default",
    ("vectors", "b"): "vera_lambda_b.default",
    ("deltas",): "weight",
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def load(path, **options):
    return gl.load_llama(path, dtype=jnp.float32, param_dtype=jnp.float32, **options)


def load_torch(path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, factors):
    return gl.apply(model, params, factors, IDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    # The tokenizer of the family adds a token of its own.
    path = tmp_path_factory.mktemp("methods") / "base"
    return write_base(path, model_type="qwen2", vocab_size=520)


def torch_with(name, cfg, adapter, path):
    """The base in PyTorch with the method in it."""
    import peft

    model = load_torch(path)
    if name == "full":
        return model
    if name == "vera":
        settings = peft.VeraConfig(r=cfg.rank, target_modules=TARGETS, projection_prng_key=1)
        model = peft.get_peft_model(model, settings)
        for ours, theirs in zip(cfg.projections(adapter.spec.targets), "AB", strict=True):
            shared = getattr(model.base_model, f"vera_{theirs}")["default"]
            assert shared.T.shape == ours.shape
            # Of the same distribution, from another generator.
            assert 0.8 < np.abs(ours).max() / shared.abs().max() < 1.25
            shared.copy_(tensor(ours.T))
        return model
    if name == "hira":  # which has no scale
        return peft.get_peft_model(model, peft.HiraConfig(r=cfg.rank, target_modules=TARGETS))
    settings = {"use_rslora": name == "rslora", "use_dora": name == "dora"}
    if name == "pissa":
        settings["init_lora_weights"] = "pissa"
    lora = peft.LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=TARGETS, **settings)
    model = peft.get_peft_model(model, lora)
    if name == "lora_fa":
        factors = flatten_dict(gl.generate_factors(cfg, adapter))
        sides = {".".join(p[:-1]): {"a": leaf} for p, leaf in factors.items() if p[-1] == "a"}
        set_values({"factors": sides}, model)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in parameter_name)
    return model


def tensor(value):
    import torch

    return torch.from_numpy(np.array(value))


def counterparts(trainable, model):
    """(our path, layer, their parameter, its size over ours) of every layer's leaf."""
    parameters = dict(model.named_parameters())
    hira = any("hira_" in name for name in parameters)
    for path, leaf in flatten_dict(trainable).items():
        group, name, *side = path
        head, tail = name.split(".layers.")
        prefix = "" if group == "deltas" else "base_model.model."
        sizes = {"a": leaf.shape[1] ** 0.5, "b": SHARED["alpha"] / SHARED["rank"]} if hira else {}
        for i in range(2):
            theirs = THEIRS[("hira" if hira else group, *side)]
            parameter = parameters[f"{prefix}{head}.layers.{i}.{tail}.{theirs}"]
            yield path, i, parameter, sizes.get(path[-1], 1.0)


def set_values(trainable, model):
    """Puts our values into theirs."""
    import torch

    flat = flatten_dict(trainable)
    with torch.no_grad():
        for path, i, parameter, size in counterparts(trainable, model):
            value = tensor(size * flat[path][i].T)
            parameter.add_(value) if path[0] == "deltas" else parameter.copy_(value)


@pytest.fixture(scope="module", params=METHODS)
def case(request, base):
    """A method's adapter on the base, new and moved, with logits and gradients of both sides."""
    import torch

    name, cfg = request.param, METHODS[request.param]
    model, params = load(base)
    new = gl.init_adapter(cfg, jax.random.key(0), params)
    moved = new.replace(trainable=perturb(new.trainable, size=0.1))
    theirs = torch_with(name, cfg, new, base)
    start = {
        path: (i, p.detach().numpy().copy())
        for path, i, p, _ in counterparts(new.trainable, theirs)
    }

    def loss(trainable):
        factors = gl.generate_factors(cfg, moved.replace(trainable=trainable))
        logits = gl.apply(model, params, factors, IDS)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), IDS[:, 1:, None], -1)
        return -chosen.mean(), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, logits), gradient = step(moved.trainable)
    set_values(moved.trainable, theirs)
    ids = torch.from_numpy(IDS).long()
    out = theirs(ids).logits
    torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return SimpleNamespace(
        name=name,
        cfg=cfg,
        model=model,
        params=params,
        new=new,
        moved=moved,
        factors=gl.generate_factors(cfg, moved),
        base=np.asarray(forward(model, params, {})),
        logits=np.asarray(logits),
        gradient=gradient,
        theirs=theirs,
        start=start,
        their_logits=out.detach().numpy(),
    )


def test_an_adapter_is_the_base_at_first(case):
    first = forward(case.model, case.params, gl.generate_factors(case.cfg, case.new))
    if case.name in ("dora", "pissa"):  # which divide or subtract what they read off the base
        close(first, case.base)
    else:
        np.testing.assert_array_equal(first, case.base)


def test_logits_and_gradients_are_those_of_peft(case):
    assert np.abs(case.logits - case.base).max() > 0.1 * np.abs(case.base).max()
    # Rounding errors add up over 22 products of up to 48 terms, one after the other: at worst
    # 1056, and some root of it if they are random. A gradient goes through them twice.
    close(case.logits, case.their_logits, terms=256)
    gradient = flatten_dict(case.gradient)
    for path, i, parameter, size in counterparts(case.new.trainable, case.theirs):
        assert np.abs(gradient[path]).max() > 0
        ours, theirs = gradient[path][i].T, size * parameter.grad.numpy()
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=512 * EPS * np.abs(gradient[path]).max(), err_msg=str(path)
        )


def test_the_merged_model_is_the_adapted_one(case):
    merged = gl.merge(case.params, case.factors)
    close(forward(case.model, merged, {}), case.logits)
    if case.name == "dora":
        with pytest.raises(ValueError, match=r"unmerge: model\.layers\..*_proj was merged"):
            gl.unmerge(merged, case.factors)
        return
    back = gl.unmerge(merged, case.factors)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(case.params), strict=True):
        close(one, other)


# From a recipe to what serves.

RECIPE = """
model: {{path: {base}, dtype: float32, param_dtype: float32}}
adapter: {{class_path: genlora_jax.{kind}, init_args: {settings}}}
data: {{train: {here}/train.jsonl, length: 8, batch_size: 4, pack: false}}
optim: {{learning_rate: 0.05, warmup: 0}}
train: {{output: {here}/run, steps: 3, progress: false}}
"""


def command(monkeypatch, function, *arguments):
    """Exit status of a command."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    try:
        function()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize("name", [name for name in METHODS if name != "rslora"])
def test_a_recipe_trains_and_its_adapter_is_merged_and_exported(
    name, base, tmp_path, monkeypatch, capsys
):
    import peft

    cfg = METHODS[name]
    rows = [{"prompt": f"{i} and", "completion": f" {i % 3}"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        field.name: getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if getattr(cfg, field.name) != field.default
    }
    settings["targets"] = TARGETS
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            base=base, here=tmp_path, kind=type(cfg).__name__, settings=json.dumps(settings)
        )
    )
    monkeypatch.setattr(setup, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    assert command(monkeypatch, finetune.main, "--config", recipe) == 0, capsys.readouterr().err

    model, params = load(base)
    found, adapter = gl.load_adapter(tmp_path / "run" / "adapter", params, model=model)
    assert found == cfg
    new = gl.init_adapter(cfg, jax.random.key(0), params)
    for one, other in zip(jax.tree.leaves(adapter), jax.tree.leaves(new), strict=True):
        assert one.shape == other.shape
    for path, leaf in flatten_dict(adapter.trainable).items():
        assert np.abs(leaf - flatten_dict(new.trainable)[path]).max() > 0.01, path
    jax.tree.map(np.testing.assert_array_equal, adapter.frozen, new.frozen)

    ours = np.asarray(forward(model, params, gl.generate_factors(cfg, adapter)))
    assert np.abs(ours - forward(model, params, {})).max() > 0.1
    at = ["--adapter", tmp_path / "run" / "adapter"]
    out = tmp_path / "merged"
    assert command(monkeypatch, main, "merge", "--base", base, *at, "--out", out) == 0
    close(torch_logits(load_torch(out), IDS), ours)
    out = tmp_path / "peft"
    status = command(monkeypatch, main, "export-peft", *at, "--out", out, "--base", base)
    if name == "full":
        assert status == 1
        assert "no LoRA adapter: merge it" in capsys.readouterr().err
        assert not out.exists()
    else:
        assert status == 0
        exported = peft.PeftModel.from_pretrained(load_torch(base), out).eval()
        close(torch_logits(exported, IDS), ours)
        close(forward(model, params, gl.import_peft(out, params)), ours)
    capsys.readouterr()
    assert command(monkeypatch, main, "inspect", *at) == 0
    assert f"{gl.count_parameters(adapter):,} parameters" in capsys.readouterr().out


def test_a_method_named_on_the_command_line_has_its_defaults_and_what_the_recipe_gives(
    tmp_path,
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: base}\ndata: {train: rows.jsonl}\ntrain: {output: run}\n"
        "adapter: {group_size: 8, layers: [1]}\n"
    )
    for kind in (gl.LoRAConfig, gl.VeRAConfig, gl.FullConfig):
        named = ["--config", str(recipe), "--adapter", f"genlora_jax.{kind.__name__}"]
        assert parse(Recipe, named).adapter == kind(layers=[1])
    assert parse(Recipe, named[:2]).adapter == gl.GenLoRAConfig(group_size=8, layers=[1])


def test_loraplus_steps_are_those_of_peft():
    import peft
    import torch
    from peft.optimizers import create_loraplus_optimizer

    model = torch.nn.Sequential()
    model.add_module("proj", torch.nn.Linear(6, 5, bias=False))
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["proj"]))
    rng = np.random.default_rng(0)
    values = {"a": rng.standard_normal((6, 2)), "b": rng.standard_normal((2, 5))}
    gradients = {"a": rng.standard_normal((6, 2)), "b": rng.standard_normal((2, 5))}
    sides = {"a": theirs.base_model.model.proj.lora_A, "b": theirs.base_model.model.proj.lora_B}
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    settings = OptimConfig(learning_rate=0.01, b_ratio=8.0, weight_decay=0.1, warmup=0.0, clip=None)
    ours = make_optimizer(settings, 1_000_000)  # the rate does not fall within three of so many
    trainable = {"factors": {"proj": jax.tree.map(jnp.float32, values)}}
    gradient = {"factors": {"proj": jax.tree.map(jnp.float32, gradients)}}
    state = ours.init(trainable)
    with torch.no_grad():
        for side, module in sides.items():
            module["default"].weight.copy_(tensor(values[side].T))
            module["default"].weight.grad = tensor(gradients[side].T).float()
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):  # optax takes floats to an integer power
            updates, state = ours.update(gradient, state, trainable)
        trainable = jax.tree.map(jnp.add, trainable, updates)
        optimizer.step()
    for side, module in sides.items():
        after = module["default"].weight.detach().numpy().T
        assert np.abs(after - values[side]).max() > (0.2 if side == "b" else 0.025)
        close(trainable["factors"]["proj"][side], after)
