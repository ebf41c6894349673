"""Splash attention, a Pallas program for TPUs that never writes scores to memory, on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from genlora_jax.mesh import BATCH, batch_shards

BLOCK, LANES = 512, 128
Array = jax.Array


def supports(q: Array, k: Array, mesh: Mesh | None) -> bool:
    """Whether splash attention takes these: no cache, whole blocks, heads that the mesh divides."""
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    rows = 1 if mesh is None else batch_shards(mesh)
    return (
        q.shape[1] == k.shape[1]
        and q.shape[1] % LANES == 0
        and k.shape[2] % tensor == 0
        and q.shape[0] % rows == 0
    )


def splash(
    q: Array, k: Array, v: Array, segments: Array, mesh: Mesh | None, *, interpret: bool = False
) -> Array:
    """Causal softmax attention within segments; arrays and mesh as for `attention.attend`.

    With `interpret` it runs as plain JAX, on any device.
    """
    # Imported where it runs: Pallas is slow to import.
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        batch, length, heads, size = q.shape
        groups = k.shape[2]
        mask = pallas.MultiHeadMask([pallas.CausalMask((length, length))] * (heads // groups))
        block = next(b for b in (BLOCK, 256, LANES) if length % b == 0)
        names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
        sizes: dict[str, Any] = dict.fromkeys(names, block)
        attend_one_group: Any = pallas.make_splash_mqa_single_device(
            mask, block_sizes=pallas.BlockSizes(**sizes), interpret=interpret
        )
        scaled = (q.astype(jnp.float32) * size**-0.5).astype(q.dtype)
        scaled = scaled.reshape(batch, length, groups, heads // groups, size)
        out = jax.vmap(jax.vmap(attend_one_group, in_axes=(0, 0, 0, None)))(
            scaled.transpose(0, 2, 3, 1, 4),
            k.swapaxes(1, 2),
            v.swapaxes(1, 2),
            pallas.SegmentIds(segments, segments),
        )
        return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)

    if mesh is None:
        return local(q, k, v, segments)
    heads = P(BATCH, None, "tensor", None)
    # JAX cannot tell through a Pallas program which values differ between devices.
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(heads, heads, heads, P(BATCH)), out_specs=heads, check_vma=False
    )
    return sharded(q, k, v, segments)
