"""Tiny models with random parameters, and plain functions on parameters and logits."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def random_llama(
    *, scan=True, seed=0, dtype=jnp.float32, remat="none", attention="auto", **changes
) -> tuple[LlamaForCausalLM, dict]:
    """A tiny Linen model and random parameters for it; unrolled, they are the same numbers."""
    config = LlamaConfig(**(TINY | changes))
    options = {"dtype": dtype, "param_dtype": dtype, "remat": remat, "attention": attention}
    stacked = flatten_dict(parameter_shapes(LlamaForCausalLM(config, scan=True)))
    rng = np.random.default_rng(seed)
    params = unflatten_dict(
        {
            path: jnp.asarray(_random_leaf(rng, path, leaf.shape), dtype)
            for path, leaf in sorted(stacked.items())
        }
    )
    return LlamaForCausalLM(config, scan=scan, **options), params if scan else unstack(params)


def _random_leaf(rng, path, shape):
    """Numbers of a size with which activations neither vanish nor explode."""
    noise = rng.standard_normal(shape)
    if path[-1] == "kernel":
        return noise / np.sqrt(shape[-2])
    if path[-1] == "scale":
        return 1 + 0.1 * noise
    return noise if path[-1] == "embedding" else 0.1 * noise


def unstack(tree):
    """A scanned model's tree as that of an unrolled one."""
    flat = {}
    for path, leaf in flatten_dict(tree).items():
        if "layers" not in path:
            flat[path] = leaf
            continue
        at = path.index("layers") + 1
        flat |= {(*path[:at], str(i), *path[at:]): layer for i, layer in enumerate(leaf)}
    return unflatten_dict(flat)


def perturb(tree, seed=0, size=0.1):
    """A pytree with some noise on every leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype), tree
    )


def torch_logits(model, ids, **inputs):
    """A PyTorch model's logits, float32."""
    import torch

    tensors = {key: torch.from_numpy(np.array(value)) for key, value in inputs.items()}
    with torch.no_grad():
        return model(torch.from_numpy(np.array(ids)).long(), **tensors).logits.float().numpy()


class Numbers:
    """0, 1, 2 ...: as batches are, with a place that is saved and restored."""

    def __init__(self, taken=0):
        self.taken = taken

    def __next__(self):
        self.taken += 1
        return self.taken - 1

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state.get("taken")
