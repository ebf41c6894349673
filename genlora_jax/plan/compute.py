"""FLOP of a step on a chip, and its seconds by the roofline."""

from genlora_jax.plan.sizes import Step

FLOP_PER_PRODUCT = 2  # derived: a multiplication and an addition
# Derived: those of a query with all keys, and of its weights with all values. The masked half
# counts, though some implementations skip it: this is an upper bound.
ATTENTION_PRODUCTS = 2
# Derived: forward, forward again in the backward pass of the chunked loss, and the gradient of the
# hidden states.
PASSES_OVER_HEAD = 3
# Assumed, not measured: arrays of the hidden size that a layer reads and writes over all passes.
ACTIVATIONS_READ_PER_LAYER = 30


def step_flops(step: Step) -> float:
    """FLOP of a step on a chip."""
    cfg, passes = step.config, step.passes
    attention = ATTENTION_PRODUCTS * step.recipe.data.length * cfg.num_attention_heads
    attention *= cfg.num_hidden_layers * cfg.head_dim
    products = passes * (step.layers_values + attention) + PASSES_OVER_HEAD * step.head_values
    # Factors take one product more than the base: that of their gradient.
    products += (passes + 1) * (step.factor_values + step.formed_values)
    per_token = FLOP_PER_PRODUCT * products
    return step.recipe.train.accumulate * step.tokens * per_token / step.mesh.tensor


def step_seconds(step: Step, flops: float, received: float) -> float:
    """Seconds of a step by the roofline: the longest of computing, reading and receiving.

    Args:
        step: The step.
        flops: FLOP of a step on a chip.
        received: Bytes that a chip receives from the others in a step.
    """
    cfg, chip = step.config, step.chip
    base = step.passes * (step.layers_values + step.head_values + step.stored_values)
    layers = cfg.num_hidden_layers * step.tokens * cfg.hidden_size * step.width
    read = base * step.width / step.mesh.tensor + ACTIVATIONS_READ_PER_LAYER * layers
    return max(
        flops / chip.flops,
        step.recipe.train.accumulate * read / chip.bandwidth,
        received / chip.link,
    )
