"""LLaMA in Flax Linen, with the module names of Hugging Face. It knows nothing of adapters."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from genlora_jax.models.attention import Attention, attend

Remat = Literal["none", "full", "dots"]
Cache = Any  # per layer {"k", "v": [..., batch, slots, kv_heads, head_dim]}
Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1 (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a model; names are those of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is no multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")


def rope_frequencies(cfg: LlamaConfig) -> Array:
    """Float32 rotary frequencies in radians a position, `[head_dim / 2]`.

    With `rope_scaling`, wavelengths longer than `original / low_freq_factor` are stretched by
    `factor`, those shorter than `original / high_freq_factor` kept, those between interpolated.
    """
    half = jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim
    frequency = 1.0 / cfg.rope_theta**half
    scaling = cfg.rope_scaling
    if scaling is None:
        return frequency
    periods = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((periods - low) / (high - low), 0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / scaling.factor)


def rotary(cfg: LlamaConfig, positions: Array) -> tuple[Array, Array]:
    """Float32 cosines and sines `[batch, length, 1, head_dim / 2]` of positions."""
    angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(cfg)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates `[batch, length, heads, head_dim]`, the halves of a head being its two axes."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


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
        return wide.astype(x.dtype) * scale.astype(x.dtype)


@dataclass(frozen=True)
class _Layer:
    """What every module of a layer is built from."""

    cfg: LlamaConfig
    dtype: Any
    param_dtype: Any
    attention: Attention

    def dense(self, features: int, bias: bool, name: str | None = None) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(0.02),
            name=name,
        )

    def norm(self, name: str | None = None) -> RMSNorm:
        return RMSNorm(self.cfg.rms_norm_eps, self.param_dtype, name=name)


class LlamaAttention(nn.Module):
    """Multi-head attention with rotary embeddings and grouped key-value heads."""

    layer: _Layer

    @nn.compact
    def __call__(
        self, x: Array, rope: tuple[Array, Array], mask: Array | None, start: Any, cache: Cache
    ) -> tuple[Array, Cache]:
        """Returns the output and, if there is a cache, the cache with these positions in it."""
        cfg, dense = self.layer.cfg, self.layer.dense
        heads, groups, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        q = dense(heads * size, cfg.attention_bias, "q_proj")(x)
        k = dense(groups * size, cfg.attention_bias, "k_proj")(x)
        v = dense(groups * size, cfg.attention_bias, "v_proj")(x)
        q = rotate(q.reshape(*x.shape[:2], heads, size), rope)
        k = rotate(k.reshape(*x.shape[:2], groups, size), rope)
        v = v.reshape(*x.shape[:2], groups, size)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache["k"], k, start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache["v"], v, start, axis=1)
            cache = {"k": k, "v": v}
        out = attend(q, k, v, mask, self.layer.attention)
        out = out.reshape(*x.shape[:2], heads * size)
        return dense(cfg.hidden_size, cfg.attention_bias, "o_proj")(out), cache


class LlamaMLP(nn.Module):
    """SwiGLU feed-forward network."""

    layer: _Layer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[batch, length, hidden]` to the same."""
        cfg, dense = self.layer.cfg, self.layer.dense
        gate = dense(cfg.intermediate_size, cfg.mlp_bias, "gate_proj")(x)
        up = dense(cfg.intermediate_size, cfg.mlp_bias, "up_proj")(x)
        return dense(cfg.hidden_size, cfg.mlp_bias, "down_proj")(nn.silu(gate) * up)


class LlamaDecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and a residual."""

    layer: _Layer

    @nn.compact
    def __call__(
        self, x: Array, rope: tuple[Array, Array], mask: Array | None, start: Any, cache: Cache
    ) -> tuple[Array, Cache]:
        """Returns hidden states and cache, as `nn.scan` wants a carry and an output."""
        h = self.layer.norm("input_layernorm")(x)
        h, cache = LlamaAttention(self.layer, name="self_attn")(h, rope, mask, start, cache)
        x = x + h
        h = self.layer.norm("post_attention_layernorm")(x)
        return x + LlamaMLP(self.layer, name="mlp")(h), cache


class _UnrolledLayers(nn.Module):
    """Layers one after another, named `0`, `1`, ...; used as the scanned ones are."""

    make: Callable[..., nn.Module]
    count: int

    @nn.compact
    def __call__(self, x: Array, *context: Any) -> tuple[Array, Cache]:
        *context_, cache = context
        caches = []
        for i in range(self.count):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], cache)
            x, own = self.make(name=str(i))(x, *context_, own)
            caches.append(own)
        stacked = (
            None if cache is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
        )
        return x, stacked


class LlamaModel(nn.Module):
    """Embedding, decoder layers and final norm."""

    layer: _Layer
    scan: bool
    remat: Remat

    def setup(self) -> None:
        cfg, layer = self.layer.cfg, self.layer
        self.embed_tokens = nn.Embed(
            cfg.vocab_size,
            cfg.hidden_size,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        block: Any = LlamaDecoderLayer
        if self.remat != "none":
            policies = jax.checkpoint_policies
            policy = policies.checkpoint_dots_with_no_batch_dims if self.remat == "dots" else None
            block = nn.remat(block, policy=policy, prevent_cse=not self.scan)
        if self.scan:
            self.layers = nn.scan(
                block,
                # "genlora" is any collection that mirrors params; see `gl.apply`.
                variable_axes={"params": 0, "genlora": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
                length=cfg.num_hidden_layers,
            )(layer)
        else:
            self.layers = _UnrolledLayers(
                lambda name: block(layer, name=name), cfg.num_hidden_layers
            )
        self.norm = layer.norm()

    def __call__(self, input_ids: Array, *context: Any) -> tuple[Array, Cache]:
        """Normalised hidden states and cache; the context is what a layer takes."""
        hidden, cache = self.layers(self.embed_tokens(input_ids), *context)
        return self.norm(hidden), cache


class LlamaForCausalLM(nn.Module):
    """LLaMA with its language-model head.

    Attributes:
        config: Shape of the model.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        scan: Layers stacked in one `nn.scan` (fast to compile), or one after another.
        remat: What of a layer the backward pass recomputes: `"none"`, `"full"`, or all but the
            outputs of matrix products (`"dots"`).
        attention: `"auto"`, `"xla"`, `"cudnn"` or `"blocks"`; see `attend`.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = True
    remat: Remat = "none"
    attention: Attention = "auto"

    def setup(self) -> None:
        layer = _Layer(self.config, self.dtype, self.param_dtype, self.attention)
        self.model = LlamaModel(layer, self.scan, self.remat)
        if not self.config.tie_word_embeddings:
            self.lm_head = layer.dense(self.config.vocab_size, False)

    def __call__(
        self,
        input_ids: Array,
        *,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array:
        """Logits of the next tokens.

        Args:
            input_ids: Int `[batch, length]`.
            attention_mask: `[batch, length]`, zero at padding, on either side.
            positions: Int `[batch, length]`; by default counted from a row's first token that
                is not padding. Packed rows give their own.
            segment_ids: Int `[batch, length]`; tokens see only their own segment.

        Returns:
            Logits `[batch, length, vocab]` in `dtype`.
        """
        return self.head(
            self.hidden_states(
                input_ids,
                attention_mask=attention_mask,
                positions=positions,
                segment_ids=segment_ids,
            )
        )

    def hidden_states(
        self,
        input_ids: Array,
        *,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array:
        """Normalised hidden states `[batch, length, hidden]`: what `head` takes."""
        length = input_ids.shape[1]
        mask = None
        if attention_mask is not None or segment_ids is not None:
            mask = jnp.tril(jnp.ones((length, length), bool))[None]
            if attention_mask is not None:
                mask = mask & (attention_mask[:, None, :] != 0)
            if segment_ids is not None:
                mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
            # A query sees itself, so that padding has something to average and never NaN.
            mask = (mask | jnp.eye(length, dtype=bool))[:, None]
        if positions is None and attention_mask is not None:
            positions = jnp.maximum(jnp.cumsum(attention_mask != 0, axis=1) - 1, 0)
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(length), input_ids.shape)
        hidden, _ = self.model(input_ids, rotary(self.config, positions), mask, 0, None)
        return hidden

    def head(self, hidden: Array) -> Array:
        """Logits `[..., vocab]` of hidden states `[..., hidden]`."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

    def decode(
        self, input_ids: Array, positions: Array, visible: Array, start: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Logits with a key-value cache.

        Args:
            input_ids: Int `[batch, length]`: a prompt, or one new token.
            positions: Int `[batch, length]`.
            visible: Bool `[batch, slots]`: the slots of the cache that hold no padding.
            start: The slot that the first of these tokens takes.
            cache: From `init_cache`, or from the last call.

        Returns:
            Logits `[batch, length, vocab]` and the new cache.
        """
        slots = jnp.arange(visible.shape[1])
        own = start + jnp.arange(input_ids.shape[1])
        mask = (slots <= own[:, None]) & visible[:, None, :] | (slots == own[:, None])
        rope = rotary(self.config, positions)
        hidden, cache = self.model(input_ids, rope, mask[:, None], start, cache)
        return self.head(hidden), cache

    def init_cache(self, batch: int, slots: int) -> Cache:
        """Empty key-value cache `[layers, batch, slots, kv_heads, head_dim]` in `dtype`."""
        cfg = self.config
        shape = (cfg.num_hidden_layers, batch, slots, cfg.num_key_value_heads, cfg.head_dim)
        return {"k": jnp.zeros(shape, self.dtype), "v": jnp.zeros(shape, self.dtype)}


def init_params(model: LlamaForCausalLM, key: Array) -> Any:
    """Random parameters, for training from scratch and for tests."""
    return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def parameter_shapes(model: LlamaForCausalLM) -> Any:
    """The tree of parameters as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
