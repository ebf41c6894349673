"""Softmax attention with grouped key-value heads: which implementation runs where.

`cudnn` holds NVIDIA's, `splash` the TPUs', `blocks` the one for CPUs. XLA's is here.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from genlora_jax.models import cudnn, splash
from genlora_jax.models.blocks import attend_in_blocks

Attention = Literal["auto", "xla", "cudnn", "blocks", "splash", "vmap"]
Array = jax.Array


def choose(
    implementation: Attention, platform: str, *, devices: int = 1, supported: bool = True
) -> Attention:
    """The implementation that `implementation` stands for: itself, unless it leaves the choice.

    The choice is for so many devices of a platform: `"cpu"`, `"gpu"` or `"tpu"`. `supported` says
    whether the platform's own implementation takes the arrays.
    """
    if implementation not in ("auto", "vmap"):
        return implementation
    fastest: dict[str, Attention] = {"tpu": "splash", "gpu": "cudnn"}
    # `blocks` goes over the rows one by one, which would undo their sharding.
    if platform == "cpu" and devices == 1:
        return "blocks"
    return fastest.get(platform, "xla") if supported else "xla"


def choose_on(
    device: Any,
    implementation: Attention,
    *,
    dtype: Any,
    head_dim: int,
    devices: int = 1,
    splash_supported: bool = True,
) -> Attention:
    """`choose` for heads of this dtype and size on so many devices like this one."""
    gpu = device.platform == "gpu"
    supported = cudnn.supports(dtype, head_dim, device) if gpu else splash_supported
    return choose(implementation, device.platform, devices=devices, supported=supported)


def device_of(mesh: Mesh | None) -> Any:
    """The first device of a mesh, or of JAX without one; a plan's need not be there."""
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def keeps_scores(implementation: Attention) -> bool:
    """Whether an implementation, chosen, writes all scores of a layer to memory."""
    return implementation == "xla"


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    implementation: Attention,
    *,
    segments: Array | None = None,
    runs: cudnn.Runs | None = None,
    window: int | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Softmax attention.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: `[batch, slots, kv_heads, head_dim]`.
        v: Like k.
        mask: Bool `[batch or 1, 1, length, slots]`, True where a query sees a key. A query must
            see no later key; None for that alone.
        implementation: `"xla"`; `"cudnn"` (NVIDIA GPUs, half precision); `"splash"` (TPUs, lengths
            in multiples of 128; elsewhere interpreted, for tests); `"blocks"` (see
            `attend_in_blocks`); `"auto"`: `"cudnn"` on GPUs and `"splash"` on TPUs where they take
            the arrays, `"blocks"` on a single CPU device, else `"xla"`; `"vmap"`: the same where
            the caller is under `vmap` (see `cudnn.of_all_rows`).
        segments: Int `[batch, length]` if a token sees exactly what comes before it in its
            segment; None if the mask says anything else.
        runs: What the mask says, with `window`, as runs; None if they are not known.
        window: How many tokens back a token sees, itself included; None for all.
        mesh: Devices that shard the batch and the heads.

    Returns:
        `[batch, length, heads, head_dim]`.

    Raises:
        ValueError: If splash attention is asked for and does not suit.
    """
    device = device_of(mesh)
    supported = segments is not None and splash.supports(q, k, mesh)
    chosen = choose_on(
        device,
        implementation,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        devices=1 if mesh is None else mesh.size,
        splash_supported=supported,
    )
    if chosen == "splash":
        if not supported or segments is None:
            raise ValueError(
                f"attention splash takes no {q.shape[0]} rows of {q.shape[1]} tokens and "
                f"{k.shape[2]} heads here (multiples of {splash.LANES} tokens, of the mesh's "
                "sizes, and no sliding window): take auto"
            )
        return splash.splash(q, k, v, segments, mesh, interpret=device.platform != "tpu")
    if chosen == "blocks":
        return attend_in_blocks(q, k, v, mask)
    if chosen == "xla":
        return _xla(q, k, v, mask)
    rest: Any = mask
    attention: Any = cudnn.attend_masked
    if runs is not None and cudnn.supports_runs(q, k, mesh, device):
        rest = (runs.lengths, runs.starts)
        attention = functools.partial(cudnn.attend_runs, window=window, mesh=mesh)
    if implementation == "vmap":
        attention = cudnn.of_all_rows(attention)
    return attention(q, k, v, rest)


def attend_cached(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Softmax attention of a few queries to a key-value cache.

    Args:
        q: `[batch, length, heads, head_dim]`.
        k: `[batch, kv_heads, slots, head_dim]`: products read it as it lies.
        v: Like k.
        mask: Bool `[batch, 1, length, slots]`, True where a query sees a key.

    Returns:
        `[batch, length, heads, head_dim]`.
    """
    rows, length, heads, size = q.shape
    groups, slots = k.shape[1:3]
    # Products in this order of operands transpose neither keys nor values; einsum chooses another.
    pairs = ((0, 1), (0, 1))
    grouped = q.reshape(rows, length, groups, -1, size).swapaxes(1, 2)
    grouped = grouped.reshape(rows, groups, -1, size)
    scores = jax.lax.dot_general(
        grouped, k, (((3,), (3,)), pairs), preferred_element_type=jnp.float32
    )
    scores = scores.reshape(rows, groups, length, -1, slots) * size**-0.5
    scores = jnp.where(mask[:, :, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(v.dtype).reshape(rows, groups, -1, slots)
    out = jax.lax.dot_general(weights, v, (((3,), (2,)), pairs))
    out = out.reshape(rows, groups, length, -1, size).swapaxes(1, 2)
    return out.reshape(rows, length, heads, size)


def _xla(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    # JAX itself mixes bfloat16 and float32 in there.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=mask is None, implementation="xla"
        )
