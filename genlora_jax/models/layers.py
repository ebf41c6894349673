"""A decoder layer: norm, attention, feed-forward network, under Hugging Face's names."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genlora_jax.base.kernel import product
from genlora_jax.base.products import keeping_float32, multiplies_wide, wide_product
from genlora_jax.base.stored import StoredKernel
from genlora_jax.mesh import BATCH
from genlora_jax.models.attention import Attention, attend, attend_cached, device_of
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.cudnn import Runs
from genlora_jax.models.rope import rotate

# Names of what a layer computes, for the policies of `remat`.
PROJECTION, ATTENTION = "projection", "attention"
Cache = Any  # {"k", "v": [layers, batch, kv_heads, slots, head_dim]}, see `init_cache`, or None
Array = jax.Array


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, in float32."""

    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last axis; the dtype is that of x."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


class Dense(nn.Dense):
    """A Dense whose kernel may be quantised.

    Attributes:
        prevent_cse: True where layers are unrolled, see `product`.
        wide: Whether products are asked for in float32, see `wide_product`.
    """

    prevent_cse: bool = False
    wide: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., d_in]` to `[..., d_out]` in `dtype`."""
        kernel: Any = self.get_variable("params", "kernel")
        if not isinstance(kernel, StoredKernel):
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        y = product(x.astype(self.dtype), kernel, prevent_cse=self.prevent_cse, wide=self.wide)
        if not self.use_bias:
            return y
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))


class Embed(nn.Embed):
    """An embedding whose logits may be a wide product."""

    wide: bool = False

    def attend(self, query: Array) -> Array:
        """Logits `[..., vocab]` of hidden states `[..., hidden]`."""
        if not self.wide:
            return super().attend(query)
        table = self.embedding.astype(self.dtype)
        return wide_product(query.astype(self.dtype), table, 1)


def constrain(mesh: Mesh | None, x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """An array each of whose axes is sharded over the mesh's that are named.

    An axis whose size the mesh does not divide is replicated.
    """
    if mesh is None:
        return x
    spec = []
    for size, names in zip(x.shape, axes, strict=True):
        names_of_axis = (names,) if isinstance(names, str) else names or ()
        shards = math.prod(mesh.shape[name] for name in names_of_axis)
        spec.append(names if size % shards == 0 else None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


@dataclass(frozen=True)
class Blueprint:
    """What every module of a layer is built from."""

    cfg: LlamaConfig
    dtype: Any
    param_dtype: Any
    attention: Attention
    mesh: Mesh | None
    prevent_cse: bool = False

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """Activations `[batch, ...]` sharded over the mesh: the batch, and the last axes as named.

        An axis whose size the mesh does not divide is replicated.
        """
        replicated = (None,) * (x.ndim - 1 - len(axes))
        return constrain(self.mesh, x, BATCH, *replicated, *axes)

    def residual(self, x: Array) -> Array:
        """The residual stream `[batch, length, hidden]`, sharded between layers.

        `tensor` shards its length (arXiv 2205.05198). That costs no more communication than a
        replicated one, and each device keeps a shard for the backward pass instead of a copy.
        """
        return self.constrain(x, "tensor", None)

    @property
    def wide(self) -> bool:
        """Whether products are asked for in float32, see `wide_product`."""
        return multiplies_wide(self.dtype, device_of(self.mesh).platform)

    def embed(self) -> nn.Embed:
        """The embedding of tokens."""
        return Embed(
            self.cfg.vocab_size,
            self.cfg.hidden_size,
            wide=self.wide,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
        )

    def project(self, x: Array, features: int, bias: bool, name: str) -> Array:
        """A projection of x, which `remat="dots"` keeps."""
        return checkpoint_name(self.dense(features, bias, name)(x), PROJECTION)

    def dense(self, features: int, bias: bool, name: str | None = None) -> Dense:
        """A Dense layer."""
        return Dense(
            features,
            prevent_cse=self.prevent_cse,
            wide=self.wide,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(0.02),
            name=name,
        )

    def norm(self, name: str | None = None) -> RMSNorm:
        """A norm."""
        return RMSNorm(self.cfg.rms_norm_eps, self.param_dtype, name=name)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What all layers of a pass are given.

    Attributes:
        rope: Cosines and sines of the positions.
        mask: Bool `[batch, 1, length, slots]`, True where a query sees a key; None: causal.
        sliding_mask: The mask of layers with a sliding window, where not all layers are alike.
        start: Int `[batch]`: the first slot of each row of the cache that is written.
        segments: Int `[batch, length]` if each token sees all that comes before it in its
            segment and nothing else; None otherwise.
        runs: What the mask says, with `window`, as runs; None if they are not known.
        window: How many tokens back every layer sees; None for all, or if layers differ.
    """

    rope: tuple[Array, Array]
    mask: Any
    sliding_mask: Any
    start: Any
    segments: Any
    runs: Runs | None = None
    window: int | None = field(default=None, metadata={"static": True})


class LlamaAttention(nn.Module):
    """Multi-head attention with rotary embeddings and grouped key-value heads."""

    blueprint: Blueprint

    @nn.compact
    def __call__(
        self, x: Array, context: Context, mask: Array | None, cache: Cache, layer: Array
    ) -> tuple[Array, Cache]:
        """Returns the output, and the cache with these positions in it if there is one."""
        blueprint, cfg = self.blueprint, self.blueprint.cfg
        project, norm, constrain = blueprint.project, blueprint.norm, blueprint.constrain
        heads, groups, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        widths = {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size}
        if cfg.fused_projections:
            fused = project(x, sum(widths.values()), cfg.attention_bias, "qkv_proj")
            q, k, v = jnp.split(fused, (heads * size, (heads + groups) * size), axis=-1)
        else:
            q, k, v = (project(x, n, cfg.attention_bias, name) for name, n in widths.items())
        if cfg.qk_norm == "whole":
            q, k = norm("q_norm")(q), norm("k_norm")(k)
        q, k, v = (part.reshape(*x.shape[:2], -1, size) for part in (q, k, v))
        q, k, v = (constrain(part, "tensor", None) for part in (q, k, v))
        if cfg.qk_norm == "head":
            q, k = norm("q_norm")(q), norm("k_norm")(k)
        q, k = (constrain(rotate(part, context.rope), "tensor", None) for part in (q, k))
        if cache is not None:
            assert mask is not None  # some of its slots are empty
            slots = context.start[:, None] + jnp.arange(x.shape[1])[None]
            at = (layer, jnp.arange(x.shape[0])[:, None], slice(None), slots)
            cache = {
                name: cache[name].at[at].set(new, mode="drop", unique_indices=True)
                for name, new in (("k", k), ("v", v))
            }
            out = attend_cached(q, cache["k"][layer], cache["v"][layer], mask)
        else:
            out = attend(
                q,
                k,
                v,
                mask,
                blueprint.attention,
                segments=context.segments,
                runs=context.runs,
                window=context.window,
                mesh=blueprint.mesh,
            )
        out = checkpoint_name(out, ATTENTION)
        out = constrain(out.reshape(*x.shape[:2], heads * size), "tensor")
        return project(out, cfg.hidden_size, cfg.attention_output_bias, "o_proj"), cache


def _swiglu(gate: Array, up: Array) -> Array:
    return nn.silu(gate) * up


# The backward pass computes it again, rather than keep a third array of this size.
_plain_swiglu, _wide_swiglu = jax.checkpoint(_swiglu), keeping_float32(_swiglu)


class LlamaMLP(nn.Module):
    """SwiGLU feed-forward network."""

    blueprint: Blueprint

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[batch, length, hidden]` to the same."""
        cfg, project = self.blueprint.cfg, self.blueprint.project
        width = cfg.intermediate_size
        if cfg.fused_projections:
            gate, up = jnp.split(project(x, 2 * width, cfg.mlp_bias, "gate_up_proj"), 2, axis=-1)
        else:
            gate, up = (project(x, width, cfg.mlp_bias, name) for name in ("gate_proj", "up_proj"))
        swiglu = _wide_swiglu if self.blueprint.wide else _plain_swiglu
        inner = self.blueprint.constrain(swiglu(gate, up), "tensor")
        return project(inner, cfg.hidden_size, cfg.mlp_bias, "down_proj")


class LlamaDecoderLayer(nn.Module):
    """Attention and feed-forward, each with a norm and a residual."""

    blueprint: Blueprint

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Cache], context: Context, slides: Array | None, layer: Array
    ) -> tuple[tuple[Array, Cache], None]:
        """Takes and returns hidden states and cache, as `nn.scan` wants a carry."""
        x, cache = carry
        norm, residual = self.blueprint.norm, self.blueprint.residual
        # What a product takes is all-gathered explicitly. XLA would guess otherwise.
        gather = self.blueprint.constrain
        mask: Any = context.mask
        if slides is not None:
            mask = jnp.where(slides, context.sliding_mask, mask)
        attention = LlamaAttention(self.blueprint, name="self_attn")
        mlp = LlamaMLP(self.blueprint, name="mlp")
        if self.blueprint.cfg.post_norm:
            h, cache = attention(gather(x), context, mask, cache, layer)
            x = residual(x + norm("post_attention_layernorm")(h))
            x = residual(x + norm("post_feedforward_layernorm")(mlp(gather(x))))
            return (x, cache), None
        h, cache = attention(gather(norm("input_layernorm")(x)), context, mask, cache, layer)
        x = residual(x + h)
        x = residual(x + mlp(gather(norm("post_attention_layernorm")(x))))
        return (x, cache), None
