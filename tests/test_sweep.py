"""Sweeps: each member is its own run; one program, one base."""

import dataclasses
import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_base import REPOSITORY, write_base
from tiny_models import perturb, random_llama

import genlora_jax as gl
from genlora_jax.mesh import MeshConfig, make_mesh
from genlora_jax.methods import METHODS
from genlora_jax.models import cudnn
from genlora_jax.models.attention import attend
from genlora_jax.settings import parse
from genlora_jax.sharding import named, param_specs
from genlora_jax.training import finetune as finetune_script
from genlora_jax.training import setup
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.step import evaluate, init_state, make_eval_step, make_train_step
from genlora_jax.training.sweep import program as sweep_program
from genlora_jax.training.sweep import sweep as script
from genlora_jax.training.sweep.loop import initial_states, run_sweep
from genlora_jax.training.sweep.members import Member

STEPS, EVERY = 4, 2
PROGRAM = {"steps", "options", "members_per_pass", "mesh"}
CFG = gl.GenLoRAConfig(
    rank=3, alpha=6.0, group_size=4, kernels=2, targets=["q_proj", "down_proj"], dropout=0.1
)
OPTIM = OptimConfig(clip=0.5, warmup=0.5)
MEMBERS = [
    Member(learning_rate=0.01, generator_ratio=0.3, seed=0, alpha=6.0),
    Member(learning_rate=0.03, generator_ratio=0.1, seed=1, alpha=12.0),
    Member(learning_rate=0.01, generator_ratio=0.3, seed=2, alpha=6.0),
    Member(learning_rate=0.002, generator_ratio=1.0, seed=0, alpha=3.0),
]
WILD = dataclasses.replace(MEMBERS[1], learning_rate=1e38)


@pytest.fixture(scope="module")
def base():
    return random_llama(num_hidden_layers=2, attention="xla")


@pytest.fixture(scope="module")
def batches():
    """Batches with two segments a row and some tokens that are not trained."""
    rng = np.random.default_rng(5)
    segments = np.repeat([[1, 2]], 6, axis=1).astype(np.int32).repeat(2, axis=0)
    return [
        {
            "input_ids": rng.integers(0, 61, (2, 12)).astype(np.int32),
            "loss_mask": rng.random((2, 12)) < 0.7,
            "segment_ids": segments,
            "positions": np.tile(np.arange(6, dtype=np.int32), (2, 2)),
        }
        for _ in range(STEPS + 2)
    ]


def make_program(model, *, cfg=None, steps=STEPS, **settings):
    cfg = CFG if cfg is None else cfg
    return sweep_program.SweepProgram(model=model, cfg=cfg, optim=OPTIM, steps=steps, **settings)


@pytest.fixture(scope="module")
def run(base, batches):
    """A function that sweeps members."""
    model, params = base

    def call(members, *, params=params, cfg=CFG, **options):
        settings = {name: options.pop(name) for name in PROGRAM & options.keys()}
        program = make_program(model, cfg=cfg, **settings)
        data = iter(batches[:STEPS]), batches[STEPS:]
        return run_sweep(program, params, members, *data, **({"eval_every": EVERY} | options))

    return call


@pytest.fixture(scope="module")
def result(run):
    return run(MEMBERS)


def assert_close(ours, theirs, tolerance=2e-5):
    """Equal to float32 rounding: relative to the largest value of each leaf."""

    def compare(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(float(abs(y).max()), 1e-3))

    jax.tree.map(compare, ours, theirs)


def member_of(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


@pytest.mark.parametrize("i", range(len(MEMBERS)))
def test_each_member_is_its_own_run(base, batches, result, i):
    model, params = base
    member = MEMBERS[i]
    cfg = dataclasses.replace(CFG, alpha=member.alpha)
    optim = dataclasses.replace(
        OPTIM, learning_rate=member.learning_rate, generator_ratio=member.generator_ratio
    )
    optimizer = make_optimizer(optim, STEPS)
    step, eval_step = make_train_step(model, cfg, optimizer), make_eval_step(model)
    adapter = gl.init_adapter(cfg, jax.random.key(member.seed), params)
    state = init_state(adapter, optimizer, member.seed)
    losses, norms, eval_losses = [], [], []
    for number, batch in enumerate(batches[:STEPS], 1):
        state, metrics = step(state, params, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        if number % EVERY == 0:
            factors = gl.generate_factors(cfg, state.adapter)
            eval_losses.append(evaluate(eval_step, params, factors, batches[STEPS:]))
    assert_close(result.loss[:, i], np.array(losses))
    assert_close(result.grad_norm[:, i], np.array(norms))
    assert_close(result.eval_loss[:, i], np.array(eval_losses))
    assert_close(member_of(result.final, i).trainable, state.adapter.trainable)


def test_members_differ(result):
    for curve in (result.loss, result.eval_loss):
        assert len(set(curve[-1].tolist())) == len(MEMBERS)


def test_the_best_is_that_of_the_lowest_evaluation(base, batches, result):
    model, params = base
    eval_step = make_eval_step(model)
    for i, member in enumerate(MEMBERS):
        adapter = result.adapter(i)
        assert adapter.config == dataclasses.replace(CFG, alpha=member.alpha)
        factors = gl.generate_factors(adapter.config, adapter)
        loss = evaluate(eval_step, params, factors, batches[STEPS:])
        assert_close(result.eval_loss[:, i].min(), np.float64(loss))
    assert result.ranking == np.argsort(result.eval_loss.min(axis=0)).tolist()
    assert result.eval_steps.tolist() == [2, 4]


def test_alphas_of_members_scale_gains(base, batches, run):
    model, params = base
    eval_step = make_eval_step(model)
    cfg = gl.LoRAConfig(rank=4, hadamard=True)
    members = [
        Member(learning_rate=0.01, generator_ratio=1.0, seed=0, alpha=alpha)
        for alpha in (4.0, 64.0)
    ]
    found = run(members, cfg=cfg)
    for i, member in enumerate(members):
        own = dataclasses.replace(cfg, alpha=member.alpha)
        factors = gl.generate_factors(own, found.adapter(i))
        loss = evaluate(eval_step, params, factors, batches[STEPS:])
        assert_close(found.eval_loss[:, i].min(), np.float64(loss))
    assert abs(np.diff(found.eval_loss[-1])) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_member_s_factors_are_those_of_its_alpha(method):
    cfg = METHODS[method](**{"uni_lora": {"size": 9}, "full": {}}.get(method, {"rank": 2}))
    kernel = jax.random.normal(jax.random.key(1), (16, 12))
    adapter = gl.init_adapter(cfg, jax.random.key(0), {"q_proj": {"kernel": kernel}})
    adapter = adapter.replace(trainable=perturb(adapter.trainable))
    alone = cfg if method == "full" else cfg.with_alpha(48.0)
    program = sweep_program.SweepProgram(model=None, cfg=cfg, optim=OPTIM, steps=1)
    found = program.factors(adapter, jnp.float32(alone.scale / cfg.scale))["q_proj"]
    expected = gl.generate_factors(alone, adapter.with_config(alone))["q_proj"]
    for leaf, value in expected.items():
        largest = np.abs(value).max()
        assert largest > 0
        atol = 8 * np.finfo(np.float32).eps * largest
        np.testing.assert_allclose(found[leaf], value, rtol=0, atol=atol)


def test_a_member_that_diverges_leaves_the_others_as_they_were_to_the_bit(run, result):
    wild = run([WILD if i == 1 else member for i, member in enumerate(MEMBERS)])
    assert not np.isfinite(wild.eval_loss[-1, 1])
    assert wild.diverged.astype(bool).tolist() == [False, True, False, False]
    assert wild.ranking[-1] == 1
    others = [0, 2, 3]
    for name in ("loss", "grad_norm", "eval_loss"):
        np.testing.assert_array_equal(
            getattr(wild, name)[:, others], getattr(result, name)[:, others]
        )
    for i in others:
        jax.tree.map(
            np.testing.assert_array_equal, member_of(wild.final, i), member_of(result.final, i)
        )


def test_one_that_diverges_late_keeps_the_rank_of_its_best_adapter(result):
    losses = np.array([[1.0, 3.5, 2.0], [np.nan, 3.0, 2.5]])
    late = dataclasses.replace(result, eval_loss=losses, loss=losses, grad_norm=losses)
    assert late.ranking == [0, 2, 1]
    assert late.diverged.tolist() == [2, 0, 0]
    assert late.best_step.tolist() == [2, 4, 2]


def test_a_sweep_that_is_told_to_stop_evaluates_and_ends(run, result):
    asked = []
    stopped = run(MEMBERS, stop=lambda step: asked.append(step) or step == 1, steps_per_call=1)
    assert asked == [1]
    assert stopped.eval_steps.tolist() == [1]
    assert stopped.loss.shape == (1, len(MEMBERS))
    assert np.isfinite(stopped.eval_loss).all()
    assert_close(stopped.loss, result.loss[:1])
    jax.tree.map(np.testing.assert_array_equal, stopped.best, stopped.final)


def test_sweeps_of_one_size_share_one_program(run, result):
    programs = sweep_program.train_members, sweep_program.evaluate_members
    before = [program._cache_size() for program in programs]
    again = run([dataclasses.replace(m, learning_rate=0.5, seed=7 + m.seed) for m in MEMBERS])
    assert (again.loss[-1] != result.loss[-1]).all()
    assert before == [program._cache_size() for program in programs]


def lowered(base, batches, members, **settings):
    model, params = base
    program = make_program(model, **settings)
    states, numbers = initial_states(program, members, params)
    stacked = {name: np.stack([b[name] for b in batches[:EVERY]]) for name in batches[0]}
    traced = sweep_program.train_members.trace(states, numbers, params, stacked, program=program)
    return traced, states


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_there_is_one_base_and_its_products_are_not_batched(base, batches):
    traced, states = lowered(base, batches, MEMBERS)
    batched = [
        equation
        for equation in equations(traced.jaxpr.jaxpr)
        if equation.primitive.name == "dot_general" and equation.params["dimension_numbers"][1][0]
    ]
    leaves = [leaf for leaf in jax.tree.leaves(base[1]) if leaf.ndim > 1]
    kernels = {shape for leaf in leaves for shape in (leaf.shape[-2:], leaf.shape[:-3:-1])}
    assert batched
    for equation in batched:  # attention's and the adapters', never the base's
        for operand in equation.invars:
            assert operand.aval.shape[1:] not in kernels
    compiled = traced.lower().compile().memory_analysis()
    single, one = lowered(base, batches, MEMBERS[:1])
    alone = single.lower().compile().memory_analysis()
    grown = compiled.argument_size_in_bytes - alone.argument_size_in_bytes
    numbers = 3 * 4 * (len(MEMBERS) - 1)
    assert abs(grown - (size(states) - size(one)) - numbers) <= 64 * len(jax.tree.leaves(states))
    assert grown < size(base[1]) * (len(MEMBERS) - 1)


def test_members_lie_over_data_and_change_nothing(base, run, result):
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    params = jax.device_put(base[1], named(mesh, param_specs(base[1])))
    cut = run(MEMBERS, params=params, mesh=mesh)
    for leaf in jax.tree.leaves((cut.final, cut.best)):
        assert leaf.sharding.spec[0] == "data"
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}
    kernel = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    for name in ("loss", "grad_norm", "eval_loss"):
        assert_close(getattr(cut, name), getattr(result, name))
    assert_close(cut.final.trainable, result.final.trainable, 1e-4)
    with pytest.raises(ValueError, match=r"3 members cannot be sharded over mesh.data = 4"):
        run(MEMBERS[:3], params=params, mesh=mesh)


@pytest.mark.parametrize("size", [2, 9])
def test_passes_change_nothing(run, result, size):
    passed = run(MEMBERS, members_per_pass=size)
    for name in ("loss", "grad_norm", "eval_loss"):
        assert_close(getattr(passed, name), getattr(result, name))
    assert_close(passed.final.trainable, result.final.trainable)
    assert_close(passed.best.trainable, result.best.trainable)


def test_passes_on_a_mesh_take_members_of_every_device(base, run, result):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    params = jax.device_put(base[1], named(mesh, param_specs(base[1])))
    members = [*MEMBERS, *(dataclasses.replace(member, seed=9) for member in MEMBERS)]
    cut = run(members, params=params, mesh=mesh, members_per_pass=4)
    for leaf in jax.tree.leaves((cut.final, cut.best)):
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {4}
    for name in ("loss", "grad_norm", "eval_loss"):
        assert_close(getattr(cut, name)[:, :4], getattr(result, name))
    with pytest.raises(ValueError, match=r"members_per_pass \(1\) .* of mesh.data \(2\)"):
        run(members, params=params, mesh=mesh, members_per_pass=1)


def test_memory_is_that_of_the_members_of_a_pass(base, batches):
    # Longer rows: activations outweigh the members' states.
    long = [{k: np.tile(x, (1, 16)) for k, x in batch.items()} for batch in batches]
    whole = lowered(base, long, MEMBERS)[0].lower().compile().memory_analysis()
    halves = lowered(base, long, MEMBERS, members_per_pass=2)[0].lower().compile().memory_analysis()
    assert halves.temp_size_in_bytes < 0.6 * whole.temp_size_in_bytes


def test_passes_must_be_of_one_size(run):
    for count in (3, 0):
        said = rf"members_per_pass \({count}\) must divide .* \(4\) .*: one of 1, 2, 4$"
        with pytest.raises(ValueError, match=said):
            run(MEMBERS, members_per_pass=count)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_as_one_batch_is_attention(masked):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (3, 2, 8, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True)
    )
    mask = jnp.tril(jnp.ones((8, 8), bool))[None, None] if masked else None
    weights = jnp.arange(8.0)[None, None, None]

    def gradients(attention):
        loss = lambda q, k, v: (attention(q, k, v) * weights).sum()  # noqa: E731
        return jax.jit(jax.vmap(jax.value_and_grad(jax.checkpoint(loss), (0, 1, 2))))

    folded = cudnn.of_all_rows(lambda q, k, v, mask: attend(q, k, v, mask, "xla"))
    ours = gradients(lambda q, k, v: folded(q, k, v, mask))
    theirs = gradients(lambda q, k, v: attend(q, k, v, mask, "xla"))
    assert_close(ours(q, k, v), theirs(q, k, v))
    rows = {
        equation.invars[0].aval.shape[0]
        for equation in equations(jax.make_jaxpr(ours)(q, k, v).jaxpr)
        if equation.primitive.name == "dot_general"
    }
    assert rows == {6}  # 3 members of 2 rows: one batch


def test_no_members_and_no_evaluation_are_refused(run, base, batches):
    model, params = base
    with pytest.raises(ValueError, match="at least one member"):
        run([])
    with pytest.raises(ValueError, match="which member is best"):
        run_sweep(make_program(model, steps=1), params, MEMBERS, iter(batches), [])
    program = make_program(model, steps=2)
    with pytest.raises(ValueError, match="batches ended before step 2"):
        run_sweep(program, params, MEMBERS, iter(batches[:1]), batches)


def test_a_sweep_needs_neither_a_command_line_nor_a_data_library():
    code = (
        "import sys\n"
        "for name in ('jsonargparse', 'grain', 'tensorboardX', 'orbax'): sys.modules[name] = None\n"
        "import train.benchmarks.sweep, genlora_jax.training.sweep"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


# The script.

RECIPE = """
model: {{path: {here}/base, dtype: float32, param_dtype: float32}}
adapter: {{rank: 4, alpha: 8.0, group_size: 4, kernels: 2, targets: [q_proj, up_proj]}}
data:
  train: {here}/rows.jsonl
  eval: {here}/rows.jsonl
  length: 8
  batch_size: 4
  pack: false
optim: {{learning_rate: 0.02}}
train: {{output: {here}/out, steps: 4, eval_every: 2}}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    here = tmp_path_factory.mktemp("sweep")
    write_base(here / "base")
    rows = [{"prompt": f"{i % 7} and", "completion": f" {i % 7}"} for i in range(8)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "recipe.yaml").write_text(RECIPE.format(here=here))
    return here


@pytest.fixture
def command(workshop, monkeypatch, run_main):
    """A function that runs the script's main on one device: exit status, stdout and stderr."""

    def call(*arguments):
        one = lambda cfg: make_mesh(cfg, jax.devices()[:1])  # noqa: E731
        monkeypatch.setattr(script, "make_mesh", one)
        monkeypatch.setenv("COLUMNS", "160")
        return run_main(script.main, "--config", workshop / "recipe.yaml", *arguments)

    return call


def test_the_script_writes_what_it_found(command, workshop, tmp_path, monkeypatch):
    out = tmp_path / "out"
    grid = ["--grid.learning_rate", "[0.01, 1e38]", "--grid.alpha", "[8.0, 16.0]"]
    status, said, errors = command("--train.output", out, *grid)
    assert status == 0, errors
    assert "0.01, is the grid's lowest: widen it downwards" in said
    assert "diverged at step" in said
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["learning_rate"] for r in results] == [0.01, 0.01, 1e38, 1e38]
    assert results[0]["best_eval_loss"] <= results[1]["best_eval_loss"]
    assert results[3]["diverged_at"] is not None
    assert (results[3]["best_eval_loss"], results[3]["best_step"]) == (None, None)
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    assert metrics[3]["eval_loss"][3] is None
    assert [len(r["loss"]) for r in results] == [4] * 4
    cfg, adapter = gl.load_adapter(out / "best")
    assert cfg.alpha == results[0]["alpha"]

    # The same as a run of train/finetune.py on its own.
    single = tmp_path / "single"
    monkeypatch.setattr(setup, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    arguments = ["--config", workshop / "recipe.yaml", "--train.output", single]
    arguments += ["--optim.learning_rate", 0.01, "--adapter.alpha", cfg.alpha]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
    finetune_script.main()
    own = gl.load_adapter(single / "adapter-best")[1]
    assert_close(adapter.trainable, own.trainable, 1e-4)

    status, _, errors = command("--train.output", out, *grid)
    assert (status, "exists" in errors) == (1, True)


def test_members_of_any_alpha_start_at_the_delta_of_a_peft_adapter(command, workshop, tmp_path):
    base, cfg = workshop / "base", gl.LoRAConfig(rank=2, alpha=4.0, targets=["q_proj"])
    _, params = gl.load_llama(base, dtype="float32", param_dtype="float32")
    adapter = gl.init_adapter(cfg, jax.random.key(0), params)
    adapter = adapter.replace(trainable=jax.tree.map(lambda x: x + 0.1, adapter.trainable))
    gl.export_peft(tmp_path / "peft", cfg, gl.generate_factors(cfg, adapter), base=base)
    arguments = ["--adapter", "genlora_jax.LoRAConfig", "--adapter.rank", "2"]
    arguments += ["--adapter.targets", "[q_proj]", "--grid.alpha", "[1.0, 16.0]"]
    arguments += ["--train.init_from", tmp_path / "peft", "--train.steps", "1"]
    status, _, errors = command("--train.output", tmp_path / "out", *arguments)
    assert status == 0, errors
    (first,) = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    one, other = json.loads(first)["loss"]
    assert one == pytest.approx(other, rel=1e-5)
    kept = parse(script.SweepRecipe, ["--config", str(tmp_path / "out" / "recipe.yaml")])
    assert kept.grid.alpha == [1.0, 16.0]


def test_ctrl_c_ends_the_script_with_what_there_is(command, tmp_path, monkeypatch):
    def interrupted(*arguments, stop, **settings):
        def told(step):
            signal.raise_signal(signal.SIGINT)
            return stop(step)

        return run_sweep(*arguments, stop=told, **settings)

    monkeypatch.setattr(script, "run_sweep", interrupted)
    grid = ["--grid.learning_rate", "[0.01, 0.02]", "--steps_per_call", "1"]
    status, said, errors = command("--train.output", tmp_path / "out", *grid)
    assert (status, errors) == (128 + signal.SIGINT, "")
    assert "stopped at step 1 of 4" in said
    results = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["best_step"] for line in results] == [1, 1]
    assert gl.load_adapter(tmp_path / "out" / "best")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid.learning_rate", "[]"], "grid.learning_rate is empty"),
        (["--grid.learning_rate", "[0.1, -0.1]"], "learning_rate must be a finite number > 0"),
        (["--grid.rank", "[1, 2]"], "grid.rank"),
        (["--grid.members", "[{rate: 0.1}]"], "unknown field rate"),
        (["--grid.members", "[{seed: 0.5}]"], "seed must be a whole number"),
        (["--grid.seed", "[1, 1]"], "twice"),
        (
            ["--adapter.class_path", "genlora_jax.LoRAConfig", "--grid.generator_ratio", "[1.0]"],
            "grid.generator_ratio means nothing to LoRAConfig",
        ),
        (["--grid.seed", "[1]", "--grid.members", "[{seed: 1}]"], "either members or lists"),
        (["--data.eval", "null"], "data.eval is missing"),
        (["--train.resume", "true"], "train.resume"),
        (["--grid.learning_rate", "[1e38, 2e38]"], "all 2 members diverged"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(command, tmp_path, arguments, message):
    status, _, errors = command("--train.output", tmp_path / "out", *arguments)
    assert status == 1
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())
