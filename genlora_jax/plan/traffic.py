"""Bytes that a chip receives from the others in a step."""

from genlora_jax.plan.sizes import FLOAT32, Step

# Derived: an all-reduce is a reduce-scatter and an all-gather, and over n chips each of them
# receives (n - 1) / n of the array.
ALL_REDUCE = 2
# Derived: attention and the feed-forward network each end in one.
ALL_REDUCES_PER_LAYER = 2
# Derived: every micro-batch all-gathers the head for its forward and for its backward pass.
GATHERS_OF_HEAD = 2


def received_bytes(step: Step) -> dict[str, float]:
    """Bytes received, by what for: `base`, `activations`, `gradients`."""
    mesh, cfg = step.mesh, step.config
    micro_batches = step.recipe.train.accumulate
    gathered = (mesh.fsdp - 1) / mesh.fsdp
    reduced = ALL_REDUCE * (mesh.tensor - 1) / mesh.tensor
    # Kernel-sized factors are all-gathered like kernels. What a step forms out of factors and a
    # kernel takes that kernel once more, for its gradient.
    others = (
        GATHERS_OF_HEAD * step.head_values
        + step.passes * step.stored_values
        + (step.passes + 1) * step.formed_values
    )
    layers = step.passes * cfg.num_hidden_layers * step.layer_bytes
    hidden = cfg.num_hidden_layers * step.tokens * cfg.hidden_size * step.width
    return {
        "base": micro_batches * gathered * (layers + others * step.width / mesh.tensor),
        "activations": micro_batches * reduced * ALL_REDUCES_PER_LAYER * step.passes * hidden,
        "gradients": micro_batches * FLOAT32 * _gradient_values(step) / mesh.tensor,
    }


def _gradient_values(step: Step) -> float:
    """Values of gradients received, for one micro-batch and with `tensor` still to divide."""
    mesh = step.mesh
    # Replicated factors: an all-reduce over all shards of the batch.
    replicated = step.factor_values - step.stored_values
    values = ALL_REDUCE * replicated * (1 - 1 / (mesh.data * mesh.fsdp))
    # Sharded ones: a reduce-scatter over `fsdp`, and an all-reduce of each shard over `data`.
    scattered = (mesh.fsdp - 1) / mesh.fsdp
    return values + step.stored_values * (scattered + ALL_REDUCE * (1 - 1 / mesh.data) / mesh.fsdp)
