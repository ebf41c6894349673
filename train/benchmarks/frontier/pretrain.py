"""Bases for the study, pretrained from a seed at the start of each run: too large to store."""

import argparse
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.flax import load_file, save_file

from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, init_params
from genlora_jax.training.losses import cross_entropy
from genlora_jax.training.step_options import StepOptions

ROWS, STEPS_PER_CALL = 64, 10
REPEATS = 4  # of a task's rows in the pretraining, in the regime `known`


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base's shape and rate."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    rate: float


BASES = {
    "wide": Base(hidden=1024, intermediate=2816, layers=4, heads=8, rate=1e-3),
    "deep": Base(hidden=512, intermediate=1408, layers=16, heads=8, rate=1e-3),
    "tiny": Base(hidden=64, intermediate=160, layers=2, heads=2, rate=3e-3),
}


def base_model(name: str, data: Path) -> LlamaForCausalLM:
    """The model of a base for the data's tokenizer, in bfloat16 on GPUs."""
    base, on_gpu = BASES[name], jax.default_backend() == "gpu"
    config = LlamaConfig(
        vocab_size=json.loads((data / "about.json").read_text())["vocabulary"],
        hidden_size=base.hidden,
        intermediate_size=base.intermediate,
        num_hidden_layers=base.layers,
        num_attention_heads=base.heads,
        num_key_value_heads=base.heads,
        head_dim=base.hidden // base.heads,
    )
    return LlamaForCausalLM(
        config,
        dtype=jnp.bfloat16 if on_gpu else jnp.float32,
        param_dtype=jnp.float32,
        attention="cudnn" if on_gpu else "auto",
    )


def batch_of(ids: jax.Array) -> dict[str, jax.Array]:
    """Rows of running text, all of it trained, as a batch."""
    return {
        "input_ids": ids.astype(jnp.int32),
        "loss_mask": jnp.ones(ids.shape, bool),
        "segment_ids": jnp.ones(ids.shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
    }


def pretrain(
    model: LlamaForCausalLM, rows: np.ndarray, *, rate: float, seed: int, steps: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """Trains all parameters on rows of tokens `[n, length]`, each once, in a random order.

    Returns:
        The parameters, in the model's dtype, and a summary of the run.
    """
    count = len(rows) // (ROWS * STEPS_PER_CALL) * STEPS_PER_CALL
    count = count if steps is None else min(steps, count)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, count // 20 + 1, count, 0.1 * rate)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1)
    )
    options = StepOptions(chunk=8192, packed=False)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(seed))

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        total, count = cross_entropy(model, params, {}, batch_of(ids), options)
        return total / count

    @functools.partial(jax.jit, donate_argnums=0)
    def some_steps(carry: Any, ids: jax.Array) -> tuple[Any, jax.Array]:
        def step(carry: Any, ids: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, ids)
            with jax.numpy_dtype_promotion("standard"):  # optax takes floats to an integer power
                updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, carry, ids)

    order = np.random.default_rng(seed).permutation(len(rows))
    carry, losses, began = (params, optimizer.init(params)), [], time.perf_counter()
    for start in range(0, count, STEPS_PER_CALL):
        chosen = order[start * ROWS : (start + STEPS_PER_CALL) * ROWS]
        ids = rows[chosen].reshape(-1, ROWS, rows.shape[1])
        carry, new = some_steps(carry, ids)
        losses.append(new)
    curve = np.concatenate([np.asarray(part) for part in losses])
    summary = {
        "steps": count,
        "tokens": count * ROWS * rows.shape[1],
        "seconds": round(time.perf_counter() - began, 1),
        "loss": float(curve[-50:].mean()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    return jax.tree.map(lambda leaf: leaf.astype(model.dtype), carry[0]), summary


def base_file(folder: Path, job: dict[str, str]) -> Path:
    return folder / f"{job['base']}-{job['regime']}.safetensors"


def load_base(folder: Path, job: dict[str, str]) -> Any:
    """Parameters of a base that this run pretrained."""
    return unflatten_dict(load_file(base_file(folder, job)), sep="/")


def pretrain_base(options: argparse.Namespace, job: dict[str, str]) -> dict[str, Any]:
    """Pretrains a base and writes it to the run's folder; returns a summary."""
    streams = np.load(options.data / "pretraining.npz")
    rows = [streams["novels"]]
    if job["regime"] == "known":
        rows += [v for name, v in streams.items() if name != "novels"] * REPEATS
    params, summary = pretrain(
        base_model(job["base"], options.data),
        np.concatenate(rows),
        rate=BASES[job["base"]].rate,
        seed=0,
        steps=options.pretraining_steps,
    )
    save_file(flatten_dict(params, sep="/"), base_file(options.folder, job))
    return summary
