"""cuDNN's attention, which never writes scores to memory: causal, packed, or with any mask."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from genlora_jax.mesh import BATCH, batch_shards

Array = jax.Array
AMPERE, HOPPER = 8.0, 9.0  # CUDA compute capabilities


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Runs:
    """Where the segments of a batch of rows lie.

    Attributes:
        lengths: Int32 `[batch, most]`, -1 behind a row's last segment.
        starts: Int32 `[batch, most + 1]`, -1 behind a row's last segment.
        fit: Bool scalar, True if every row has at most `most` segments.
    """

    lengths: Array
    starts: Array
    fit: Array


def find_runs(segments: Array, most: int) -> Runs:
    """The runs of equal numbers in each row of segment ids, int `[batch, length]`."""
    length = segments.shape[1]
    first = jnp.ones_like(segments[:, :1], bool)
    begins = jnp.concatenate([first, segments[:, 1:] != segments[:, :-1]], axis=1)

    def row(begins: Array) -> tuple[Array, Array]:
        starts = jnp.nonzero(begins, size=most + 1, fill_value=length)[0].astype(jnp.int32)
        exists = jnp.arange(most + 1) < jnp.minimum(begins.sum(), most)
        return jnp.where(exists[:-1], jnp.diff(starts), -1), jnp.where(exists, starts, -1)

    lengths, starts = jax.vmap(row)(begins)
    return Runs(lengths, starts, begins.sum(axis=1).max() <= most)


def supports(dtype: Any, head_dim: int, device: Any) -> bool:
    """Whether cuDNN's attention takes heads of this dtype and size on a device."""
    capability = float(getattr(device, "compute_capability", 0) or 0)
    widest = 256 if capability >= HOPPER else 128
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return half and capability >= AMPERE and head_dim % 8 == 0 and head_dim <= widest


def supports_runs(q: Array, k: Array, mesh: Mesh | None, device: Any) -> bool:
    """Whether it takes segments as runs: on Hopper and later, if the mesh divides the arrays."""
    if float(getattr(device, "compute_capability", 0) or 0) < HOPPER:
        return False
    return mesh is None or (
        q.shape[0] % batch_shards(mesh) == 0 and k.shape[2] % mesh.shape["tensor"] == 0
    )


def attend_runs(
    q: Array,
    k: Array,
    v: Array,
    runs: tuple[Array, Array],
    *,
    window: int | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Causal attention within runs; arrays, window and mesh are those of `attention.attend`.

    No mask is formed, and the work grows with the sum of the squares of the runs' lengths.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        runs: `lengths` and `starts` of `Runs`.
        window: How many tokens back a token sees.
        mesh: Devices.
    """
    attention = functools.partial(_packed, window=window)
    operands = (q, k, v, *runs)
    if mesh is None or mesh.size == 1:
        return attention(*operands)
    heads, rows = P(BATCH, None, "tensor", None), P(BATCH)
    # JAX cannot tell through cuDNN's call which values differ between devices.
    sharded = jax.shard_map(
        attention,
        mesh=mesh,
        in_specs=(heads, heads, heads, rows, rows),
        out_specs=heads,
        check_vma=False,
    )
    return sharded(*operands)


def _packed(
    q: Array, k: Array, v: Array, lengths: Array, starts: Array, *, window: int | None
) -> Array:
    # `jax.nn` has no name for the packed layout.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    length, (q, k, v) = q.shape[1], _of_even_length(q, k, v)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = cudnn.dot_product_attention(
            q,
            k,
            v,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=starts,
            kv_offsets=starts,
            scale=q.shape[-1] ** -0.5,
            mask_type=cudnn.MaskType.PADDING_CAUSAL,
            sliding_window_length=window,
        )
    return out[:, :length]


def attend_masked(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention under a mask, causal if it is None; the arrays are those of `attention.attend`."""
    length = q.shape[1]
    if mask is not None:
        odd = length % 2
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, odd)))
        # A row without any key would give NaN.
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, odd), (0, 0)), constant_values=True)
    q, k, v = _of_even_length(q, k, v)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=mask is None, implementation="cudnn"
        )
    return out[:, :length]


def _of_even_length(*arrays: Array) -> list[Array]:
    """Arrays `[batch, length, ...]`, a position longer if their length is odd: cuDNN asks for it.

    No query before it sees that position.
    """
    return [jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in arrays]


def of_all_rows(attention: Callable[..., Array]) -> Callable[..., Array]:
    """Attention `(q, k, v, rest)` of arrays `[rows, ...]`; `vmap` makes one call with more rows.

    JAX's batching rules of cuDNN's attention refuse runs, and masks that are the same for all
    heads. The backward pass runs the forward pass again, which `remat="full"` does anyway.
    """

    def of_rows(q: Array, rest: Any) -> Any:
        # A mask may be one for all rows.
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(q), *x.shape[1:])), rest)

    def run(q: Array, k: Array, v: Array, rest: Any) -> Array:
        # The backward pass runs it in this form. Under remat the compiler then sees one call.
        return jax.vjp(lambda *qkv: attention(*qkv, rest), q, k, v)[0]

    def pull_back(q: Array, k: Array, v: Array, rest: Any, d_out: Array) -> Any:
        return jax.vjp(lambda *qkv: attention(*qkv, rest), q, k, v)[1](d_out)

    @jax.custom_vjp
    def folded(q: Array, k: Array, v: Array, rest: Any) -> Array:
        return _fold_vmap_into_rows(run)(q, k, v, of_rows(q, rest))

    def forward(*operands: Any) -> tuple[Array, Any]:
        return folded(*operands), operands

    def backward(operands: Any, d_out: Array) -> Any:
        q, k, v, rest = operands
        return (*_fold_vmap_into_rows(pull_back)(q, k, v, of_rows(q, rest), d_out), None)

    folded.defvjp(forward, backward)
    return folded


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
