"""Pretrains the quickstart's base on stories of `world.py`, and writes it to `base/`.

    python -m train.quickstart.pretrain            # five minutes on one GPU

The base that is committed was made by this script with its defaults.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from genlora_jax.hf.checkpoint import SINGLE, model_config
from genlora_jax.hf.names import tensors
from genlora_jax.models.llama import LlamaForCausalLM, init_params
from train.quickstart.world import HERE, stories

BASE = HERE / "base"
LENGTH = 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def token_stream(seed: int, count: int) -> np.ndarray:
    """Tokens of `count` stories one after another, each with its begin and end."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE)
    texts = list(itertools.islice(stories(seed), count))
    ids = tokenizer(texts)["input_ids"]
    eos = tokenizer.eos_token_id
    return np.fromiter(itertools.chain.from_iterable([*row, eos] for row in ids), np.uint16)


def rows(count: int, workers: int) -> np.ndarray:
    """Rows `[n, LENGTH]` of the tokens of `count` stories."""
    share = functools.partial(token_stream, count=count // workers)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        stream = np.concatenate(pool.map(share, range(1000, 1000 + workers)))
    return stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)


def loss_of(model: LlamaForCausalLM, params: Any, ids: jax.Array) -> jax.Array:
    """Mean cross-entropy; stories in a row do not see each other."""
    begins = ids == CONFIG["bos_token_id"]
    segments = jnp.cumsum(begins, axis=1)
    index = jnp.arange(ids.shape[1])
    start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    logits: Any = model.apply(
        {"params": params}, ids, segment_ids=segments, positions=index - start
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), ids[:, 1:]
    )
    inside = segments[:, 1:] == segments[:, :-1]
    return jnp.where(inside, losses, 0).sum() / inside.sum()


def main() -> None:
    """Pretrains and writes config and weights beside the tokenizer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--stories", type=int, default=1_500_000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=512, help="rows of a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--out", type=Path, default=BASE)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    began = time.monotonic()
    data = rows(args.stories, args.workers)
    print(f"{data.size:,} tokens in {time.monotonic() - began:.0f} s", flush=True)

    model = LlamaForCausalLM(model_config(args.out), dtype=jnp.bfloat16, attention="xla")
    params = init_params(model, jax.random.key(0))
    schedule = optax.warmup_cosine_decay_schedule(
        0, args.rate, args.steps // 40, args.steps, args.rate / 50
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    )
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda p: loss_of(model, p, ids))(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    order = np.random.default_rng(0)
    for i in range(args.steps):
        ids = data[order.integers(0, len(data), args.batch)].astype(np.int32)
        params, opt_state, loss = step(params, opt_state, ids)
        if i % 250 == 0 or i == args.steps - 1:
            print(f"step {i}: loss {loss:.4f}, {time.monotonic() - began:.0f} s", flush=True)

    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    arrays = {}
    for tensor in tensors(params):
        leaf = np.asarray(jnp.asarray(flat[tensor.path], jnp.bfloat16))
        value = leaf if tensor.index is None else leaf[tensor.index]
        arrays[tensor.name] = np.ascontiguousarray(value.T if tensor.transposed else value)
    save_file(arrays, args.out / SINGLE, metadata={"format": "pt"})
    print(f"wrote {args.out / SINGLE}")


if __name__ == "__main__":
    main()
