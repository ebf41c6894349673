"""A tiny random checkpoint on disk, with the quickstart's tokenizer."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from genlora_jax.hf.checkpoint import model_config
from genlora_jax.hf.names import tensors
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes

REPOSITORY = Path(__file__).resolve().parents[1]
TOKENIZER = REPOSITORY / "train" / "quickstart" / "base"
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def write_recipe(directory, base, form, mesh="{data: 8, fsdp: 1}"):
    """Writes a recipe that trains LoRA on a base in a form, and its data; returns its file."""
    (directory / "rows.jsonl").write_text('{"prompt": "one", "completion": " two"}\n' * 4)
    file = directory / "recipe.yaml"
    file.write_text(
        f"model: {{path: {base}, dtype: float32, base_dtype: {form}}}\n"
        f"data: {{train: {directory / 'rows.jsonl'}, length: 16, batch_size: 8}}\n"
        f"mesh: {mesh}\ntrain: {{output: {directory / 'run'}}}\n"
        "adapter: {class_path: genlora_jax.LoRAConfig, init_args: {rank: 2}}\n"
    )
    return file


def write_base(directory, *, seed=0, dtype="float32", **changes):
    """Writes a random LLaMA in Hugging Face's layout; returns its directory."""
    directory.mkdir(parents=True)
    config = {"model_type": "llama", "eos_token_id": 2, "dtype": dtype} | SHAPE | changes
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, directory / name)
    flat = flatten_dict(parameter_shapes(LlamaForCausalLM(model_config(directory), scan=False)))
    rng = np.random.default_rng(seed)
    values = {}
    for path, leaf in sorted(flat.items()):
        noise = rng.standard_normal(leaf.shape) * (
            leaf.shape[0] ** -0.5 if path[-1] == "kernel" else 0.3
        )
        values[path] = (noise + (path[-1] == "scale")).astype(jnp.dtype(dtype))
    arrays = {
        t.name: np.ascontiguousarray(values[t.path].T if t.transposed else values[t.path])
        for t in tensors(unflatten_dict(values))
    }
    save_file(arrays, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
