"""Tuning one arm on a base: its sweep of rates, and the spectrum of its best adapter.

All rates are tried with the first seed, the two best also with the others. The mean decides.
"""

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import genlora_jax as gl
from genlora_jax.analysis import singular_values, target_factors
from genlora_jax.factors import LOW_RANK, by_module
from genlora_jax.methods import config_to_json
from genlora_jax.training.losses import next_token_targets
from genlora_jax.training.optim import OptimConfig
from genlora_jax.training.step_options import StepOptions
from genlora_jax.training.sweep.loop import run_sweep
from genlora_jax.training.sweep.members import Member
from genlora_jax.training.sweep.program import SweepProgram
from train.benchmarks.frontier.arms import ARMS, FIRST, rate_at
from train.benchmarks.frontier.pretrain import base_model, load_base

FIELDS = ("input_ids", "loss_mask", "segment_ids", "positions")
CHUNK, STEPS_PER_CALL = 16384, 8
RATES_AT_ONCE, MOST_RATES = 4, 16
SPECTRUM = 64  # singular values in a record


def load_batches(file: Path, task: str) -> list[dict[str, np.ndarray]]:
    """A task's batches, one after another."""
    arrays = np.load(file)
    stacked = [arrays[f"{task}/{field}"] for field in FIELDS]
    return [dict(zip(FIELDS, parts, strict=True)) for parts in zip(*stacked, strict=True)]


@dataclasses.dataclass(kw_only=True)
class Trials:
    """The members of an arm that were trained so far; all lists are one entry a member.

    Attributes:
        program: What they share.
        params: The base's parameters.
        batches: To tune on, one after another, as often as it takes.
        held_out: To choose by.
        ratio: Rate of the generators over that of the latents.
        make_adapter: Config, seed -> initial adapter; None for a new one.
        members: Their rates and seeds.
        losses: Lowest validation losses; infinite for one that diverged at once.
        adapters: Their adapters at these losses.
        train_losses: Mean training losses of the last steps.
        diverged: The steps at which they diverged, 0 for those that did not.
    """

    program: SweepProgram
    params: Any
    batches: list[dict[str, np.ndarray]]
    held_out: list[dict[str, np.ndarray]]
    ratio: float
    make_adapter: Callable[[gl.AdapterConfig, int], gl.Adapter] | None = None
    members: list[Member] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    adapters: list[gl.Adapter] = dataclasses.field(default_factory=list)
    train_losses: list[float] = dataclasses.field(default_factory=list)
    diverged: list[int] = dataclasses.field(default_factory=list)

    def add(self, rates: Iterable[float], seeds: range) -> None:
        """Trains a member of each rate and seed."""
        members = [
            Member(learning_rate=rate, generator_ratio=self.ratio, seed=seed)
            for rate in rates
            for seed in seeds
        ]
        result = run_sweep(
            self.program,
            self.params,
            members,
            itertools.cycle(self.batches),
            self.held_out,
            eval_every=max(self.program.steps // STEPS_PER_CALL // 3, 1) * STEPS_PER_CALL,
            steps_per_call=STEPS_PER_CALL,
            make_adapter=self.make_adapter,
        )
        self.members += members
        self.losses += result.best_loss.tolist()
        self.adapters += [result.adapter(i) for i in range(len(members))]
        self.train_losses += result.loss[-STEPS_PER_CALL:].mean(axis=0).round(5).tolist()
        self.diverged += result.diverged.tolist()

    def of_rate(self, rate: float) -> list[int]:
        """Indices of the members of a rate."""
        return [i for i, member in enumerate(self.members) if member.learning_rate == rate]

    def mean_loss(self, rate: float) -> float:
        """Mean validation loss over the seeds of a rate."""
        return float(np.mean([self.losses[i] for i in self.of_rate(rate)]))

    def ranked(self, seeds: int) -> list[float]:
        """The rates that have so many seeds, the one of the lowest mean loss first."""
        rates = {member.learning_rate for member in self.members}
        complete = [rate for rate in rates if len(self.of_rate(rate)) == seeds]
        return sorted(complete, key=lambda rate: (self.mean_loss(rate), rate))


def search(
    trials: Trials,
    first: int,
    fewest: int,
    *,
    at_once: int = RATES_AT_ONCE,
    seeds: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Tries rates of the grid until the best of them is not at an end.

    Args:
        trials: Takes the members.
        first: Exponent of the lowest rate to begin with.
        fewest: Number of rates to try at least.
        at_once: Rates of one sweep.
        seeds: Seeds of each rate, the mean of which counts.
        stop: Whether to try no more.
    """
    low, high = first, first + at_once
    trials.add(map(rate_at, range(low, high)), range(seeds))
    while high - low < MOST_RATES and not stop():
        ranked = trials.ranked(seeds)
        index = sorted(ranked).index(ranked[0])
        if 0 < index < len(ranked) - 1 and len(ranked) >= fewest:
            return
        if index < len(ranked) / 2:
            trials.add(map(rate_at, range(low - at_once, low)), range(seeds))
            low -= at_once
        else:
            trials.add(map(rate_at, range(high, high + at_once)), range(seeds))
            high += at_once


def sweep_rates(options: argparse.Namespace, job: dict[str, str]) -> dict[str, Any]:
    """Sweeps an arm over the grid until its best rate lies inside of those tried; its record."""
    arm, began = ARMS[job["arm"]], time.perf_counter()
    model, params = base_model(job["base"], options.data), load_base(options.folder, job)
    tuned = load_batches(options.data / "tuned.npz", job["task"])
    steps = int(job.get("steps", len(tuned))) // STEPS_PER_CALL * STEPS_PER_CALL
    program = SweepProgram(
        model=model,
        cfg=arm.cfg,
        optim=OptimConfig(b_ratio=arm.b_ratio, weight_decay=arm.weight_decay),
        steps=steps,
        options=StepOptions(chunk=CHUNK),
    )
    trials = Trials(
        program=program,
        params=params,
        batches=tuned,
        held_out=load_batches(options.data / "validation.npz", job["task"]),
        ratio=arm.ratio,
    )
    search(trials, FIRST[job["regime"]] + arm.shift, options.rates)
    if options.seeds > 1:
        trials.add(trials.ranked(1)[:2], range(1, options.seeds))
    best = trials.ranked(options.seeds)[0]
    chosen = [trials.adapters[i] for i in trials.of_rate(best)]
    record = {
        "config": config_to_json(arm.cfg),
        "b_ratio": arm.b_ratio,
        "weight_decay": arm.weight_decay,
        "parameters": gl.count_parameters(chosen[0]),
        "members": [dataclasses.asdict(member) for member in trials.members],
        "steps": steps,
        "train_loss": trials.train_losses,
        "validation_loss": [round(x, 5) if math.isfinite(x) else None for x in trials.losses],
        "diverged_at": trials.diverged,
        "best_rate": best,
        "best_loss": round(trials.mean_loss(best), 5),
        "singular_values": spectrum(chosen[0]),
    }
    if options.test:
        rows = load_batches(options.data / "test.npz", job["task"])
        scores = [tested(model, params, adapter, rows) for adapter in chosen]
        record |= {name: [score[name] for score in scores] for name in scores[0]}
    return record | {"seconds": round(time.perf_counter() - began, 1)}


def tested(model: Any, params: Any, adapter: gl.Adapter, batches: Any) -> dict[str, float]:
    """An adapter on some rows: the loss of trained tokens, and the exact match of completions.

    A completion matches if each of its tokens is the likeliest after the right ones before it:
    greedy decoding then yields it.
    """

    @jax.jit
    def measure(params: Any, factors: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        targets, weights = next_token_targets(batch)
        fields = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
        logits = gl.apply(model, params, factors, batch["input_ids"], **fields)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), targets
        )
        return losses * weights, weights, logits.argmax(-1) == targets

    factors = gl.generate_factors(adapter.config, adapter)
    total = tokens = matched = completions = 0.0
    for batch in batches:
        losses, weights, right = map(np.asarray, measure(params, factors, batch))
        total, tokens = total + float(losses.sum()), tokens + float(weights.sum())
        for row_weights, row_right, segments in zip(
            weights, right, batch["segment_ids"], strict=True
        ):
            for segment in set(segments[row_weights > 0].tolist()):
                completions += 1
                matched += bool(row_right[(segments == segment) & (row_weights > 0)].all())
    return {
        "test_loss": round(total / tokens, 5),
        "test_exact_match": round(matched / completions, 5),
    }


def spectrum(adapter: gl.Adapter) -> list[float] | None:
    """Singular values of the deltas over their largest, the mean over targets and layers.

    None for deltas that are no product of factors.
    """
    factors, found = gl.generate_factors(adapter.config, adapter), []
    if not all(leaves.keys() >= LOW_RANK.axes.keys() for _, leaves in by_module(factors).values()):
        return None
    for target in adapter.spec.targets:
        values = np.asarray(singular_values(*target_factors(factors, target)))[:, :SPECTRUM]
        values = values / np.maximum(values[:, :1], np.finfo(np.float32).tiny)
        found.append(np.pad(values, ((0, 0), (0, SPECTRUM - values.shape[1]))).mean(axis=0))
    return np.mean(found, axis=0).round(4).tolist()
