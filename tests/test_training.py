"""The loss, the optimizer and the step."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import perturb, random_llama

import genlora_jax as gl
from genlora_jax.training import losses
from genlora_jax.training.losses import cross_entropy, next_token_targets
from genlora_jax.training.optim import OptimConfig, learning_rate_schedule, make_optimizer
from genlora_jax.training.step import evaluate, init_state, make_eval_step, make_train_step
from genlora_jax.training.step_options import StepOptions

# No two of these are alike, so that a shape tells what an array is. 4 rows of 12 tokens.
SIZES = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "head_dim": 12,
    "num_hidden_layers": 2,
    "attention": "xla",
}
VOCAB, ROWS, LENGTH = 61, 4, 12
LORA = gl.LoRAConfig(rank=3, alpha=6.0, targets=["q_proj", "down_proj"])
GENLORA = gl.GenLoRAConfig(
    rank=3, alpha=6.0, group_size=4, kernels=2, targets=["q_proj", "down_proj"]
)


def summed_loss(model, params, factors, batch, **options):
    """The sum of the cross-entropies, without what it counts."""
    return cross_entropy(model, params, factors, batch, StepOptions(**options))[0]


@pytest.fixture(scope="module")
def base():
    return random_llama(**SIZES)


@pytest.fixture(scope="module")
def make_adapter(base):
    """A function that makes an adapter away from its zero start; a new copy at every call."""
    init = jax.jit(gl.init_adapter, static_argnums=0)

    def make(cfg, params=base[1]):
        return perturb(init(replace(cfg, dropout=0.0), jax.random.key(1), params), size=0.2)

    return make


@pytest.fixture(scope="module")
def batch():
    """Rows of two or one segments, with very unequal numbers of trained tokens."""
    rng = np.random.default_rng(3)
    lengths = [(5, 7), (12,), (4, 3), (6,)]
    shares = [1.0, 0.15, 0.6, 0.9]
    segment_ids = np.zeros((ROWS, LENGTH), np.int32)
    positions = np.zeros((ROWS, LENGTH), np.int32)
    for row, parts in enumerate(lengths):
        start = 0
        for number, n in enumerate(parts, 1):
            segment_ids[row, start : start + n] = number
            positions[row, start : start + n] = np.arange(n)
            start += n
    mask = rng.random((ROWS, LENGTH)) < np.array(shares)[:, None]
    mask[:, 2] = True
    mask[2, :7] = True
    mask[3, 4] = False
    return {
        "input_ids": jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32),
        "loss_mask": jnp.asarray(mask & (segment_ids != 0)),
        "segment_ids": jnp.asarray(segment_ids),
        "positions": jnp.asarray(positions),
    }


def whole_loss(model, params, factors, batch):
    """The same loss by another way: all logits, and the targets picked by hand."""
    logits = gl.apply(
        model,
        params,
        factors,
        batch["input_ids"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
    )
    ids, segments, mask = (np.asarray(batch[k]) for k in ("input_ids", "segment_ids", "loss_mask"))
    places = [
        (row, t)
        for row in range(ids.shape[0])
        for t in range(1, ids.shape[1])
        if mask[row, t] and segments[row, t] == segments[row, t - 1] != 0
    ]
    rows, times = np.array(places).T
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[rows, times - 1], ids[rows, times]
    )
    return losses.sum()


def assert_close(ours, theirs, tolerance=2e-5):
    """Equal to float32 rounding: relative to the largest value of each leaf."""

    def compare(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(float(abs(y).max()), 1e-3))

    jax.tree.map(compare, ours, theirs)


def equations(jaxpr):
    """All equations of a jaxpr and of those in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


# The loss.


def test_targets_stay_within_their_segment(batch):
    targets, weights = next_token_targets(batch)
    segments, mask = np.asarray(batch["segment_ids"]), np.asarray(batch["loss_mask"])
    for row in range(ROWS):
        assert weights[row, -1] == 0
        for t in range(LENGTH - 1):
            wanted = mask[row, t + 1] and segments[row, t] == segments[row, t + 1] != 0
            assert weights[row, t] == float(wanted)
            assert targets[row, t] == batch["input_ids"][row, t + 1]


@pytest.mark.parametrize(
    ("tied", "targets"),
    [(True, ["q_proj"]), (False, ["q_proj"]), (False, ["q_proj", "lm_head"])],
    ids=["tied", "untied", "head-adapted"],
)
def test_the_loss_in_chunks_is_the_whole_loss(make_adapter, batch, tied, targets):
    model, params = random_llama(**SIZES, tie_word_embeddings=tied)
    cfg = replace(LORA, targets=targets)
    factors = gl.generate_factors(cfg, make_adapter(cfg, params))
    assert ("lm_head" in factors) == ("lm_head" in targets)
    expected = jax.jit(jax.value_and_grad(lambda f: whole_loss(model, params, f, batch)))(factors)
    assert all(float(abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(expected[1]))
    for chunk in (7, 10_000):  # 48 tokens: the first does not divide them
        ours = jax.jit(
            jax.value_and_grad(
                lambda f, chunk=chunk: summed_loss(model, params, f, batch, chunk=chunk)
            )
        )(factors)
        assert_close(ours, expected)


def test_the_layers_pass_keeps_no_factor_in_float32_and_loses_nothing_by_it(
    make_adapter, batch, monkeypatch
):
    model, params = random_llama(**SIZES, dtype=jnp.bfloat16)
    factors = gl.generate_factors(LORA, make_adapter(LORA, params))
    a = next(leaf for path, leaf in flatten_dict(factors).items() if path[-2:] == ("q_proj", "a"))

    def loss(factors):
        return summed_loss(model, params, factors, batch)

    def scanned():
        """Types of what the scan over layers reads and writes of the size of A."""
        jaxpr = jax.make_jaxpr(jax.grad(loss))(factors).jaxpr
        scans = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
        values = [v.aval for e in scans for v in (*e.invars, *e.outvars)]
        return {v.dtype.name for v in values if v.shape == a.shape}

    def computed(loss):
        # JAX's attention multiplies float32 with bfloat16, which its lowering checks once more.
        with jax.numpy_dtype_promotion("standard"):
            return jax.jit(jax.value_and_grad(loss))(factors)

    assert scanned() == {"bfloat16"}
    ours = computed(loss)
    monkeypatch.setattr(losses, "in_dtype", lambda factors, dtype: factors)
    assert "float32" in scanned()
    theirs = computed(lambda f: loss(f))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_rows_of_one_segment_need_no_mask(make_adapter, batch):
    model, params = random_llama(**SIZES)
    factors = gl.generate_factors(LORA, make_adapter(LORA, params))
    alone = batch["segment_ids"] == 1  # the first segment of each row, and padding after it
    single = batch | {
        "segment_ids": alone.astype(jnp.int32),
        "loss_mask": batch["loss_mask"] & alone,
    }

    def loss(factors, packed):
        return summed_loss(model, params, factors, single, packed=packed)

    ours, theirs = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(factors, packed)
        for packed in (False, True)
    )
    assert_close(ours, theirs)

    def masks(packed):
        jaxpr = jax.make_jaxpr(loss, static_argnums=1)(factors, packed).jaxpr
        values = [v.aval for e in equations(jaxpr) for v in e.outvars]
        return [v for v in values if v.dtype == bool and v.shape == (ROWS, 1, LENGTH, LENGTH)]

    assert masks(True)
    assert masks(False) == []


def test_the_logits_never_exist_whole(base, make_adapter, batch):
    model, params = base
    factors = gl.generate_factors(LORA, make_adapter(LORA))

    def logits_sized(chunk):
        def loss(factors):
            return summed_loss(model, params, factors, batch, chunk=chunk)

        jaxpr = jax.make_jaxpr(jax.grad(loss))(factors).jaxpr
        shapes = [v.aval.shape for e in equations(jaxpr) for v in e.outvars]
        return [s for s in shapes if VOCAB in s and math.prod(s) >= ROWS * LENGTH * VOCAB]

    assert logits_sized(ROWS * LENGTH)  # with one chunk there are: the search finds them
    assert logits_sized(8) == []
    assert logits_sized(7) == []


def test_evaluation_weighs_tokens_not_batches(base, make_adapter, batch):
    model, params = base
    factors = gl.generate_factors(LORA, make_adapter(LORA))
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(ROWS)]
    weights = [float(next_token_targets(row)[1].sum()) for row in rows]
    assert len(set(weights)) > 2
    together = float(whole_loss(model, params, factors, batch)) / sum(weights)
    assert evaluate(make_eval_step(model), params, factors, rows) == pytest.approx(
        together, rel=1e-5
    )


# The optimizer.


def first_updates(optimizer, gradient, trainable):
    with jax.numpy_dtype_promotion("standard"):  # optax takes floats to an integer power
        return optimizer.update(gradient, optimizer.init(trainable), trainable)[0]


def test_the_first_step_is_the_rate_by_the_sign_and_generators_have_their_own():
    rng = np.random.default_rng(0)
    trainable = {
        group: {"t": {"a": jnp.asarray(rng.standard_normal((2, 5)), jnp.float32)}}
        for group in ("latents", "generators")
    }
    gradient = jax.tree.map(lambda x: 3.0 * x[::-1] + 0.1, trainable)
    cfg = OptimConfig(
        learning_rate=0.01, generator_ratio=0.25, warmup=0.0, weight_decay=0.5, clip=None
    )
    optimizer = make_optimizer(cfg, 10)
    updates = first_updates(optimizer, gradient, trainable)
    for group, rate in (("latents", 0.01), ("generators", 0.0025)):
        value, slope = trainable[group]["t"]["a"], gradient[group]["t"]["a"]
        # After one step Adam's moments, corrected for their bias, are the gradient and its square.
        expected = -rate * (slope / (abs(slope) + cfg.eps) + 0.5 * value)
        np.testing.assert_allclose(updates[group]["t"]["a"], expected, rtol=1e-4)


def test_basis_functions_have_a_rate_of_their_own():
    leaves = ("weights", "centers", "log_width", "projection", "residual")
    ones = {name: jnp.ones(2) for name in leaves}
    trainable = {"latents": {"t": {"a": jnp.ones(2)}}, "generators": {"t": {"a": ones}}}
    cfg = OptimConfig(learning_rate=0.01, generator_ratio=0.25, basis_ratio=4.0, clip=None)
    updates = first_updates(make_optimizer(cfg, 1), trainable, trainable)
    np.testing.assert_allclose(updates["latents"]["t"]["a"], -0.01, rtol=1e-4)
    for name, update in updates["generators"]["t"]["a"].items():
        rate = 0.0025 if name == "residual" else 0.01
        np.testing.assert_allclose(update, -rate, rtol=1e-4)
    del ones["weights"]
    with pytest.raises(ValueError, match=r"optim\.basis_ratio: this adapter has no basis"):
        make_optimizer(cfg, 1).init(trainable)


def test_lora_factors_have_the_full_rate():
    factors = {"factors": {"t": {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[0.5]])}}}
    optimizer = make_optimizer(OptimConfig(learning_rate=0.01, generator_ratio=0.25), 1)
    updates = first_updates(optimizer, factors, factors)
    expected = jax.tree.map(lambda x: -0.01 * jnp.sign(x), factors)
    # Adam divides by 1 - b2, which a rounding of b2 = 0.999 or of its power changes by
    # 2^-24 / 0.001 each, and the square root by half of that.
    assert_close(updates, expected, 2**-24 / 0.001)


def test_clipping_takes_the_norm_over_all_groups():
    # Adam's first step knows no scale but that of eps; with a huge eps it is the gradient's.
    cfg = OptimConfig(learning_rate=1.0, generator_ratio=1.0, warmup=0.0, clip=1.0, eps=1e6)
    gradient = {"latents": {"t": jnp.array([3.0])}, "generators": {"t": jnp.array([4.0])}}
    optimizer = make_optimizer(cfg, 10)
    updates = first_updates(optimizer, gradient, gradient)
    expected = {"latents": {"t": jnp.array([-0.6e-6])}, "generators": {"t": jnp.array([-0.8e-6])}}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), updates, expected)


def test_the_rate_warms_up_and_falls_as_a_cosine():
    cfg = OptimConfig(learning_rate=0.5, warmup=0.1, final_ratio=0.2)
    rate = learning_rate_schedule(cfg, 100)
    values = np.array([float(rate(step)) for step in range(100)])
    np.testing.assert_allclose(values[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    share = (np.arange(10, 100) - 9) / (100 - 9)
    cosine = 0.5 * (0.2 + 0.8 * (1 + np.cos(np.pi * share)) / 2)
    np.testing.assert_allclose(values[10:], cosine, rtol=1e-5)
    assert values.max() == values[9] == 0.5
    assert values[-1] == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (0.05, 3), (1.0, 4), (0.5, 1)])
def test_no_step_of_the_shortest_runs_is_lost(warmup, steps):
    rate = learning_rate_schedule(OptimConfig(learning_rate=0.5, warmup=warmup), steps)
    values = [float(rate(step)) for step in range(steps)]
    assert min(values) > 0
    assert max(values) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"generator_ratio": -1.0},
        {"warmup": 1.5},
        {"final_ratio": -0.1},
        {"clip": 0.0},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"b1": 1.0},
        {"b2": -0.5},
    ],
    ids=str,
)
def test_the_config_names_the_field_at_fault(settings):
    (field,) = settings
    with pytest.raises(ValueError, match=rf"optim\.{field}"):
        OptimConfig(**settings)


# The step.


def test_accumulation_changes_nothing_but_rounding(base, make_adapter, batch):
    model, params = base
    cfg = GENLORA
    adapter = make_adapter(cfg)
    weights = next_token_targets(batch)[1]
    assert len(set(weights.sum(axis=1).tolist())) == ROWS  # unequal: means of means would differ

    def mean_loss(trainable):
        factors = gl.generate_factors(cfg, replace(adapter, trainable=trainable))
        return whole_loss(model, params, factors, batch) / weights.sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(adapter.trainable)
    assert all(float(abs(leaf).max()) > 1e-5 for leaf in jax.tree.leaves(gradient))
    norm = float(optax.global_norm(gradient))
    start = jax.tree.map(np.array, adapter.trainable)
    for accumulate in (1, 2, 4):
        step = make_train_step(
            model, cfg, optax.sgd(1.0), StepOptions(accumulate=accumulate, chunk=9)
        )
        own = jax.tree.map(jnp.array, adapter)
        state, metrics = step(init_state(own, optax.sgd(1.0)), params, batch)
        moved = jax.tree.map(lambda old, new: old - new, start, state.adapter.trainable)
        difference = jax.tree.map(lambda x, y: x - y, moved, gradient)
        assert float(optax.global_norm(difference)) < 2e-5 * norm
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        assert int(metrics["trained_tokens"]) == int(weights.sum())
        assert int(metrics["tokens"]) == 12 + 12 + 7 + 6


@pytest.mark.parametrize(
    "cfg",
    [GENLORA, replace(GENLORA, rbf_init=0.5, share_generators=False), LORA],
    ids=["genlora", "genlora-apart", "lora"],
)
def test_all_of_the_adapter_moves_and_nothing_of_the_base(base, batch, cfg):
    model, params = base
    before = jax.tree.map(np.array, params)
    adapter = jax.jit(gl.init_adapter, static_argnums=0)(cfg, jax.random.key(0), params)
    start = jax.tree.map(np.array, adapter.trainable)
    optimizer = make_optimizer(OptimConfig(learning_rate=0.02), 4)
    step = make_train_step(model, cfg, optimizer)
    states = [init_state(adapter, optimizer)]
    losses = []
    for _ in range(4):
        state, metrics = step(states[-1], params, batch)
        states.append(state)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert int(states[-1].step) == 4
    jax.tree.map(np.testing.assert_array_equal, params, before)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), start, states[-1].adapter.trainable)
    assert all(jax.tree.leaves(moved)), moved
    assert step._cache_size() == 1
    for old in states[:-1]:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.adapter, old.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, states[-1])))


def test_no_gradient_of_the_base_is_formed(make_adapter, batch):
    model, params = random_llama(**SIZES, tie_word_embeddings=False)
    cfg = replace(GENLORA, targets="all-linear", exclude=["k_proj"])
    adapter = make_adapter(cfg, params)
    optimizer = optax.sgd(1.0)
    kernels = {(40, 48), (24, 40), (40, 56), (40, VOCAB)}  # either way round

    def products(jaxpr):
        dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
        shapes = [dot.outvars[0].aval.shape for dot in dots]
        return {tuple(sorted(shape)) for shape in shapes if len(shape) == 2} & kernels

    factors = gl.generate_factors(cfg, adapter)
    trained = jax.make_jaxpr(jax.grad(lambda p: summed_loss(model, p, factors, batch, chunk=16)))(
        params
    )
    assert products(trained.jaxpr) == kernels  # the search finds them where they are
    # Chunks of 16: all 48 tokens' states would look like q_proj.
    step = make_train_step(model, cfg, optimizer, StepOptions(chunk=16))
    ours = jax.make_jaxpr(step)(init_state(adapter, optimizer), params, batch)
    assert products(ours.jaxpr) == set()


def test_dropout_differs_by_step_and_follows_the_seed(base, make_adapter, batch):
    model, params = base
    still = optax.sgd(0.0)  # so that nothing but dropout can change the loss

    def runner(rate):
        cfg = replace(LORA, dropout=rate)
        step = make_train_step(model, cfg, still)

        def losses(seed):
            state = init_state(make_adapter(cfg), still, seed)
            values = []
            for _ in range(2):
                state, metrics = step(state, params, batch)
                values.append(float(metrics["loss"]))
            return values

        return losses

    plain, dropped = runner(0.0)(0), runner(0.5)
    first = dropped(0)
    assert np.isfinite(first).all()
    assert plain[0] == plain[1]
    assert len({plain[0], *first}) == 3
    assert dropped(0) == first
    assert not set(dropped(1)) & set(first)


def test_parts_of_a_batch_have_their_own_dropout(base, make_adapter, batch):
    model, params = base
    cfg = replace(LORA, dropout=0.5)
    still = optax.sgd(0.0)
    once = jax.tree.map(lambda x: x[:1], batch)
    twice = jax.tree.map(lambda x: jnp.concatenate([x[:1], x[:1]]), batch)
    values = []
    for rows, accumulate in ((once, 1), (twice, 2)):
        step = make_train_step(model, cfg, still, StepOptions(accumulate=accumulate))
        _, metrics = step(init_state(make_adapter(cfg), still), params, rows)
        values.append(float(metrics["loss"]))
    assert values[0] != pytest.approx(values[1], rel=1e-6)  # equal if both had the first's


def preference_loss(model, params, factors, batch, options, *, dropout=0.0, key=None):
    """DPO (arXiv 2305.18290), of rows that are chosen and rejected in turn; a loss of a user's."""

    def log_likelihood(factors):
        rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(4)]
        return -jnp.stack(
            [
                cross_entropy(model, params, factors, row, options, dropout=dropout)[0]
                for row in rows
            ]
        )

    gain = (log_likelihood(factors) - log_likelihood({})).reshape(2, 2)
    return -jax.nn.log_sigmoid(gain[:, 0] - gain[:, 1]).sum(), jnp.float32(2)


def test_a_loss_of_ones_own_is_trained():
    model, params = random_llama()
    cfg = gl.LoRAConfig(rank=2, targets=["q_proj"])
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(0, 61, (4, 8)).astype(np.int32),
        "loss_mask": np.ones((4, 8), bool),
        "segment_ids": np.ones((4, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (4, 1)),
    }
    optimizer = make_optimizer(OptimConfig(learning_rate=0.05, warmup=0.0), 8)
    state = init_state(gl.init_adapter(cfg, jax.random.key(0), params), optimizer)
    step = make_train_step(model, cfg, optimizer, loss=preference_loss)
    losses = []
    for _ in range(8):
        state, metrics = step(state, params, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(2), rel=1e-6)  # the adapter is still the base
    assert losses[-1] < 0.9 * losses[0]
    assert int(metrics["trained_tokens"]) == 2
