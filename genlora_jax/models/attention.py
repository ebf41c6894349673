"""Softmax attention with grouped key-value heads: which implementation runs where.

XLA's and cuDNN's are here, `splash` holds the TPU's, `blocks` the one for CPUs.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh

from genlora_jax.models import splash
from genlora_jax.models.blocks import attend_in_blocks

Attention = Literal["auto", "xla", "cudnn", "cudnn_vmap", "blocks", "splash"]
Array = jax.Array


def choose(
    implementation: Attention, platform: str, *, devices: int = 1, suits_splash: bool = True
) -> Attention:
    """The implementation that `implementation` stands for: itself, unless it is `"auto"`.

    The choice is for so many devices of a platform: `"cpu"`, `"gpu"` or `"tpu"`. `suits_splash`
    says whether splash attention takes the arrays.
    """
    if implementation != "auto":
        return implementation
    if platform == "tpu" and suits_splash:
        return "splash"
    # `blocks` goes over the rows one by one, which would undo their sharding.
    return "blocks" if platform == "cpu" and devices == 1 else "xla"


def keeps_scores(implementation: Attention) -> bool:
    """Whether an implementation, not `"auto"`, writes all scores of a layer to memory."""
    return implementation == "xla"


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    implementation: Attention,
    *,
    segments: Array | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Softmax attention.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: `[batch, slots, kv_heads, head_dim]`.
        v: Like k.
        mask: Bool `[batch or 1, 1, length, slots]`, True where a query sees a key. A query must
            see no later key; None for that alone.
        implementation: `"xla"`; `"cudnn"` (GPUs, even lengths, half precision); `"cudnn_vmap"`
            (the same under `vmap`, see `attend_as_one_batch`); `"splash"` (TPUs, lengths in
            multiples of 128; elsewhere interpreted, for tests); `"blocks"` (see
            `attend_in_blocks`); `"auto"`: `"splash"` on TPUs where it can be, `"blocks"` on a
            single CPU device, else `"xla"`.
        segments: Int `[batch, length]` if a token sees exactly what comes before it in its
            segment; None if the mask says anything else.
        mesh: Devices that shard the batch and the heads.

    Returns:
        `[batch, length, heads, head_dim]`.

    Raises:
        ValueError: If splash attention is asked for and does not suit.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    devices = 1 if mesh is None else mesh.size
    suits = segments is not None and splash.suits(q, k, mesh)
    chosen = choose(implementation, platform, devices=devices, suits_splash=suits)
    if q.shape[1] != k.shape[1]:  # with a key-value cache; a handful of queries at most
        chosen = "xla"
    if chosen == "splash":
        if not suits or segments is None:
            raise ValueError(
                f"attention splash takes no {q.shape[0]} rows of {q.shape[1]} tokens and "
                f"{k.shape[2]} heads here (multiples of {splash.LANES} tokens, of the mesh's "
                "sizes, and no sliding window): take auto"
            )
        return splash.splash(q, k, v, segments, mesh, interpret=platform != "tpu")
    if chosen == "blocks":
        return attend_in_blocks(q, k, v, mask)
    if chosen == "cudnn_vmap":
        return attend_as_one_batch(q, k, v, mask)
    return plain_attention(q, k, v, mask, chosen)


def plain_attention(q: Array, k: Array, v: Array, mask: Array | None, implementation: Any) -> Array:
    """`jax.nn.dot_product_attention`, causal where there is no mask; as `attend`."""
    # JAX itself mixes bfloat16 and float32 in there.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=mask is None, implementation=implementation
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_as_one_batch(
    q: Array, k: Array, v: Array, mask: Array | None, implementation: str = "cudnn"
) -> Array:
    """Attention whose `vmap` makes one larger batch of rows.

    JAX's batching rule of cuDNN attention refuses a mask that is the same for all heads. The
    backward pass runs the forward pass again, which `remat` does anyway. Arrays are as for
    `attend`, the implementation as for `jax.nn.dot_product_attention`.
    """
    return _one_batch_forward(q, k, v, mask, implementation)[0]


def _one_batch_forward(
    q: Array, k: Array, v: Array, mask: Array | None, implementation: str
) -> tuple[Array, Any]:
    if mask is not None:
        mask = jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))

    def run(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        attention = functools.partial(plain_attention, mask=mask, implementation=implementation)
        # The backward pass runs it in this form. Under remat the compiler then sees one call.
        return jax.vjp(attention, q, k, v)[0]

    return _fold_vmap_into_rows(run)(q, k, v, mask), (q, k, v, mask)


def _one_batch_backward(implementation: str, residuals: Any, d_out: Array) -> Any:
    def run(q: Array, k: Array, v: Array, mask: Array | None, d_out: Array) -> Any:
        attention = functools.partial(plain_attention, mask=mask, implementation=implementation)
        return jax.vjp(attention, q, k, v)[1](d_out)

    return (*_fold_vmap_into_rows(run)(*residuals, d_out), None)


attend_as_one_batch.defvjp(_one_batch_forward, _one_batch_backward)


def _fold_vmap_into_rows(function: Any) -> Any:
    """A function of arrays `[rows, ...]` that under `vmap` is called once, with all rows."""
    wrapped = custom_vmap(function)

    @wrapped.def_vmap
    def rule(size: int, batched: Any, *operands: Any) -> Any:
        def fold(x: Array, has_axis: bool) -> Array:
            x = x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = wrapped(*jax.tree.map(fold, operands, tuple(batched)))
        unfolded = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return unfolded, jax.tree.map(lambda _: True, out)

    return wrapped
