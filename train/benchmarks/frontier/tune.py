"""Tuning one arm on a base: its sweep of rates, and what its best adapter is like.

All rates are tried with the first seed, and the two best with the others: the seeds then decide.
"""

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import genlora_jax as gl
from genlora_jax.analysis import singular_values, target_factors
from genlora_jax.methods import config_to_json
from genlora_jax.methods.config import LowRankConfig, TwoSidedConfig
from genlora_jax.training.losses import next_token_targets
from genlora_jax.training.optim import OptimConfig
from genlora_jax.training.sweep.members import Member
from genlora_jax.training.sweep.run import run_sweep
from train.benchmarks.frontier.arms import ARMS, FIRST, rate_at
from train.benchmarks.frontier.pretrain import base_model, load_base

FIELDS = ("input_ids", "loss_mask", "segment_ids", "positions")
CHUNK, STEPS_PER_CALL = 16384, 8
RATES_AT_ONCE, MOST_RATES = 4, 16
SPECTRUM = 64  # singular values that are told of


def load_batches(file: Path, task: str) -> list[dict[str, np.ndarray]]:
    """A task's batches, one after another."""
    arrays = np.load(file)
    stacked = [arrays[f"{task}/{field}"] for field in FIELDS]
    return [dict(zip(FIELDS, parts, strict=True)) for parts in zip(*stacked, strict=True)]


def by_loss(losses: dict[float, list[float]]) -> list[float]:
    """Rates by the mean loss over their seeds, the lowest first; a lost seed loses the rate."""
    return sorted(losses, key=lambda rate: (np.mean(losses[rate]), rate))


def sweep_rates(options: argparse.Namespace, job: dict[str, str]) -> dict[str, Any]:
    """An arm at rates of the grid, so many and until the best is not at an end; its record."""
    arm, began = ARMS[job["arm"]], time.perf_counter()
    model, params = base_model(job["base"], options.data), load_base(options.folder, job)
    tuned = load_batches(options.data / "tuned.npz", job["task"])
    held_out = load_batches(options.data / "validation.npz", job["task"])
    steps = int(job.get("steps", len(tuned))) // STEPS_PER_CALL * STEPS_PER_CALL
    members: list[Member] = []
    validation: list[float | None] = []
    losses: dict[float, list[float]] = {}
    kept: dict[float, list[gl.Adapter]] = {}
    train_loss, diverged = [], []

    def sweep(rates: Iterable[float], seeds: range) -> None:
        new = [
            Member(learning_rate=rate, generator_ratio=arm.ratio, seed=seed)
            for rate in rates
            for seed in seeds
        ]
        result = run_sweep(
            model,
            params,
            arm.cfg,
            new,
            itertools.cycle(tuned),
            held_out,
            optim=OptimConfig(b_ratio=arm.b_ratio, weight_decay=arm.weight_decay),
            steps=steps,
            eval_every=max(steps // STEPS_PER_CALL // 3, 1) * STEPS_PER_CALL,
            chunk=CHUNK,
            steps_per_call=STEPS_PER_CALL,
        )
        for i, (member, loss) in enumerate(zip(new, result.best_loss, strict=True)):
            members.append(member)
            validation.append(round(float(loss), 5) if math.isfinite(loss) else None)
            losses.setdefault(member.learning_rate, []).append(float(loss))
            kept.setdefault(member.learning_rate, []).append(result.adapter(i))
        train_loss.extend(result.loss[-STEPS_PER_CALL:].mean(axis=0).round(5).tolist())
        diverged.extend(result.diverged.tolist())

    low = FIRST[job["regime"]] + arm.shift
    high = low + RATES_AT_ONCE
    sweep(map(rate_at, range(low, high)), range(1))
    while high - low < MOST_RATES:
        place = sorted(losses).index(by_loss(losses)[0])
        if 0 < place < len(losses) - 1 and len(losses) >= options.rates:
            break
        if place < len(losses) / 2:
            sweep(map(rate_at, range(low - RATES_AT_ONCE, low)), range(1))
            low -= RATES_AT_ONCE
        else:
            sweep(map(rate_at, range(high, high + RATES_AT_ONCE)), range(1))
            high += RATES_AT_ONCE
    if options.seeds > 1:
        sweep(by_loss(losses)[:2], range(1, options.seeds))
    # Only rates of all seeds can be chosen.
    best = by_loss({rate: own for rate, own in losses.items() if len(own) == options.seeds})[0]
    record = {
        "config": config_to_json(arm.cfg),
        "b_ratio": arm.b_ratio,
        "weight_decay": arm.weight_decay,
        "parameters": gl.count_parameters(kept[best][0]),
        "members": [dataclasses.asdict(member) for member in members],
        "steps": steps,
        "train_loss": train_loss,
        "validation_loss": validation,
        "diverged_at": diverged,
        "best_rate": best,
        "best_loss": round(float(np.mean(losses[best])), 5),
        "singular_values": spectrum(arm.cfg, kept[best][0]),
    }
    if options.test:
        rows = load_batches(options.data / "test.npz", job["task"])
        told = [tested(model, params, arm.cfg, adapter, rows) for adapter in kept[best]]
        record |= {key: [own[key] for own in told] for key in told[0]}
    return record | {"seconds": round(time.perf_counter() - began, 1)}


def tested(model: Any, params: Any, cfg: Any, adapter: Any, batches: Any) -> dict[str, float]:
    """An adapter on some rows: the loss of trained tokens, and the share of completions it gets.

    A completion is got if every token of it is the likeliest after the right ones before: then
    greedy decoding finds it, too.
    """

    @jax.jit
    def measure(params: Any, factors: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        targets, weights = next_token_targets(batch)
        known = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
        logits = gl.apply(model, params, factors, batch["input_ids"], **known)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), targets
        )
        return losses * weights, weights, logits.argmax(-1) == targets

    factors = gl.generate_factors(cfg, adapter)
    total = tokens = got = completions = 0.0
    for batch in batches:
        losses, weights, right = map(np.asarray, measure(params, factors, batch))
        total, tokens = total + float(losses.sum()), tokens + float(weights.sum())
        for row_weights, row_right, segments in zip(
            weights, right, batch["segment_ids"], strict=True
        ):
            for segment in set(segments[row_weights > 0].tolist()):
                completions += 1
                got += bool(row_right[(segments == segment) & (row_weights > 0)].all())
    return {
        "test_loss": round(total / tokens, 5),
        "test_exact_match": round(got / completions, 5),
    }


def spectrum(cfg: Any, adapter: Any) -> list[float] | None:
    """Singular values of the deltas over their largest, the mean over targets and layers.

    None for deltas that are no product of factors.
    """
    if not isinstance(cfg, LowRankConfig) or (isinstance(cfg, TwoSidedConfig) and cfg.hadamard):
        return None
    factors, found = gl.generate_factors(cfg, adapter), []
    for target in adapter.spec.targets:
        values = np.asarray(singular_values(*target_factors(factors, target)))[:, :SPECTRUM]
        values = values / np.maximum(values[:, :1], np.finfo(np.float32).tiny)
        found.append(np.pad(values, ((0, 0), (0, SPECTRUM - values.shape[1]))).mean(axis=0))
    return np.mean(found, axis=0).round(4).tolist()
