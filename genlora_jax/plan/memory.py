"""Bytes that a step holds on a chip: its arguments, and all else that is alive at once.

Arguments are exact but for padding. Temporaries are the largest terms. Where a comment says
"measured", the compilers' figures are in the results of the benchmarks `plan` and `several_gpus`.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.base.stored import StoredKernel
from genlora_jax.models.attention import choose, keeps_scores
from genlora_jax.plan.sizes import FLOAT32, Step, shard_bytes, shard_values
from genlora_jax.sharding import factor_specs, param_specs, state_specs

# Derived: three int32 (ids, segments, positions) and one bool (the loss's mask).
BATCH_BYTES_PER_TOKEN = 3 * 4 + 1
# Derived: a trained value and Adam's two moments of it.
COPIES_OF_TRAINED = 3
# Derived, per token of a layer, for its backward pass, as numbers of arrays of the size hidden,
# heads, key-value heads and feed-forward: the residual before attention and before the
# feed-forward network, and what goes into and comes out of each; queries and the heads' output;
# keys and values; gate, up, silu(gate), and their product.
ACTIVATIONS = (6, 2, 2, 4)
# Derived, the same for what is kept for the backward pass. `dots`: the residual before each half;
# queries and the heads' output; keys and values; gate and up. Unrolled layers without remat: also
# what goes into each half's products; measured: and a third array of the feed-forward size.
KEPT_BY_DOTS = (2, 2, 2, 2)
KEPT_UNROLLED = (4, 2, 2, 3)
# Derived, the same for the gradients of all factors: inputs of the products and gradients of their
# outputs. Measured: on GPUs that share the batch and no more, the compiler computes these last.
FACTOR_PRODUCTS = (4, 2, 2, 3)
# Measured: where GPUs scan layers that recompute all, arrays of the feed-forward size, as many as
# SwiGLU's gradients, exist beside what is recomputed.
SCANNED_GRADIENTS = (0, 0, 0, 3)
# Derived: a whole delta that is not trained itself is formed in float32 (Sine-LoRA's), and what it
# is the function of is kept for its gradient.
FORMED_COPIES = 2
# Measured on TPUs: a scan without remat stacks all activations, and a norm's input in float32.
NORM_ACTIVATIONS = 1
# Measured: cuDNN's backward pass holds a float32 gradient of the queries, of the row's length, for
# each segment that a row may have. Assumed: how many those are.
SEGMENTS = 16
# Measured on v5p: from this many chips of a 3D torus on, the compiler all-gathers by an all-reduce
# of zeros with the chip's shard among them. What goes in is then as large as what comes out.
CHIPS_OF_TWO_COPIES = 64
# Measured: kernels of which the compiler keeps a transposed copy while it loops over the layers.
# On TPUs they are those whose products attention takes. On GPUs they are those that `fsdp` shards
# by the last axis, since NCCL all-gathers by the first.
TRANSPOSED_ON_TPU = re.compile(r"(q|k|v|qkv)_proj\.kernel")
TRANSPOSED_ON_GPU = re.compile(r"(o|down)_proj\.kernel")


def argument_bytes(step: Step) -> int:
    """Bytes of base, adapter, optimizer and batch."""
    adapter, mesh = step.shapes.adapter, step.mesh
    trained = shard_values(mesh, adapter.trainable, state_specs(adapter.trainable))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(adapter.frozen))
    base = shard_bytes(mesh, step.shapes.params, param_specs(step.shapes.params))
    batch = step.tokens * step.recipe.train.accumulate
    state = FLOAT32 * (COPIES_OF_TRAINED * trained + frozen)
    return base + state + BATCH_BYTES_PER_TOKEN * batch


def temporary_bytes(step: Step) -> int:
    """Bytes of all that a step computes and holds at once, at its peak."""
    factors = shard_values(step.mesh, step.shapes.factors, factor_specs(step.shapes.factors))
    # Factors have a copy in the dtype of the computation, and so have their gradients during the
    # layers' backward pass.
    in_a_layer = _layer_bytes(step) + factors * step.width
    peak = _kept_bytes(step) + factors * step.width + max(in_a_layer, _head_bytes(step))
    if step.recipe.train.accumulate > 1:
        peak += FLOAT32 * factors  # the sum of the micro-batches' gradients
    if step.stored_values and "deltas" not in step.shapes.adapter.trainable:
        peak += FORMED_COPIES * FLOAT32 * factors
    return peak + _transposed_values(step) * _stored_bytes(step)


def _stored_bytes(step: Step) -> int:
    """Bytes of a value of the base."""
    return jnp.dtype(step.recipe.model.dtypes(step.platform)[1]).itemsize


def _kept_bytes(step: Step) -> int:
    """Bytes of what the layers keep for their backward pass."""
    cfg, tensor = step.config, step.mesh.tensor
    if step.remat == "full":  # what passes from layer to layer
        kept = step.tokens * cfg.hidden_size * step.width // tensor
        if _factor_gradients_come_last(step):
            kept += _values(step, FACTOR_PRODUCTS) * step.width
        return cfg.num_hidden_layers * kept
    if step.remat == "dots":
        return cfg.num_hidden_layers * _values(step, KEPT_BY_DOTS) * step.width
    if not step.recipe.model.scans(step.platform):
        kept = _values(step, KEPT_UNROLLED) * step.width + _score_bytes(step)
        return cfg.num_hidden_layers * kept
    norms = NORM_ACTIVATIONS * cfg.hidden_size * FLOAT32
    kept = _activation_bytes(step) + step.tokens * norms // tensor
    return cfg.num_hidden_layers * kept


def _factor_gradients_come_last(step: Step) -> bool:
    unrolled = not (step.chip.tpu or step.recipe.model.scans(step.platform))
    return unrolled and step.mesh.data > 1 and step.mesh.fsdp == 1


def _values(step: Step, arrays: tuple[int, int, int, int]) -> int:
    """Values of so many arrays of the sizes hidden, heads, key-value heads and feed-forward."""
    cfg, tensor = step.config, step.mesh.tensor
    hidden, heads, key_value_heads, feed_forward = arrays
    heads = heads * cfg.num_attention_heads + key_value_heads * cfg.num_key_value_heads
    values = hidden * cfg.hidden_size + heads * cfg.head_dim // tensor
    return step.tokens * (values + feed_forward * cfg.intermediate_size // tensor)


def _activation_bytes(step: Step) -> int:
    """Bytes of one layer's activations, and of its attention scores if they exist."""
    return _values(step, ACTIVATIONS) * step.width + _score_bytes(step)


def _packed_bytes(step: Step) -> int:
    """Bytes that the backward pass of attention holds for packed rows on GPUs."""
    if step.chip.tpu or not step.recipe.data.pack or step.width == FLOAT32:
        return 0
    heads = step.config.num_attention_heads * step.config.head_dim // step.mesh.tensor
    return SEGMENTS * step.tokens * heads * FLOAT32


def _score_bytes(step: Step) -> int:
    """Bytes of attention's scores in float32, their softmax, and their gradient in float32."""
    supported = step.chip.tpu or step.width < FLOAT32  # cuDNN's takes half precision
    if not keeps_scores(choose(step.recipe.model.attention, step.platform, supported=supported)):
        return 0
    heads = step.rows * step.config.num_attention_heads // step.mesh.tensor
    return heads * step.recipe.data.length**2 * (FLOAT32 + step.width + FLOAT32)


def _layer_bytes(step: Step) -> int:
    """Bytes that exist only during one layer's backward pass."""
    # Kernel-sized factors, and what factors of other kinds form, exist for a layer at a time.
    deltas = step.formed_values + step.stored_values
    deltas = deltas // step.config.num_hidden_layers * step.width // step.mesh.tensor
    recomputed = _activation_bytes(step) if step.remat == "full" else 0
    if recomputed and step.recipe.model.scans(step.platform) and not step.chip.tpu:
        recomputed += _values(step, SCANNED_GRADIENTS) * step.width
    gathered = _gathered_copies(step) * step.layer_bytes
    # A layer's kernels are dequantised together, or gathered so.
    dequantised = step.dequantised_values * step.width // step.mesh.tensor
    return max(gathered, dequantised) + recomputed + deltas + _packed_bytes(step)


def _head_bytes(step: Step) -> int:
    """Bytes that exist only during the backward pass of the head, for one chunk of the loss."""
    chunk = max(1, -(-step.recipe.train.chunk // step.rows)) * step.rows
    # Measured: TPUs keep no logits in float32.
    per_logit = step.width if step.chip.tpu else FLOAT32 + step.width
    logits = chunk * step.config.vocab_size * per_logit // step.mesh.tensor
    return _gathered_copies(step) * step.head_values * step.width // step.mesh.tensor + logits


def _gathered_copies(step: Step) -> int:
    """Copies of an all-gathered layer, or of the head's kernel, that exist at once."""
    if step.mesh.fsdp == 1:
        return 0
    return 2 if step.chip.dimensions == 3 and step.mesh.fsdp >= CHIPS_OF_TWO_COPIES else 1


def _transposed_values(step: Step) -> int:
    """Values of the kernels that the compiler keeps a second time, transposed."""
    if not step.recipe.model.scans(step.platform) or (step.mesh.fsdp == 1 and not step.chip.tpu):
        return 0
    pattern = TRANSPOSED_ON_TPU if step.chip.tpu else TRANSPOSED_ON_GPU
    layers: dict[tuple[str, ...], Any] = flatten_dict(step.shapes.params["model"]["layers"])
    kernels = {
        path: leaf
        for path, leaf in layers.items()
        if pattern.fullmatch(".".join(path[-2:])) and not isinstance(leaf, StoredKernel)
    }
    return shard_values(step.mesh, kernels, flatten_dict(param_specs(unflatten_dict(kernels))))
