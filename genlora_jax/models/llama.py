"""Models of the LLaMA family in Flax Linen. They know nothing of adapters."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from genlora_jax.models.attention import Attention
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.cudnn import Runs, find_runs
from genlora_jax.models.layers import (
    ATTENTION,
    PROJECTION,
    Blueprint,
    Cache,
    Context,
    LlamaDecoderLayer,
)
from genlora_jax.models.rope import rotary

Remat = Literal["none", "dots", "full"]
Array = jax.Array


_keeps_names = jax.checkpoint_policies.save_only_these_names(PROJECTION, ATTENTION)


def keeps_products(primitive: Any, *values: Any, **parameters: Any) -> Any:
    """A policy of `jax.checkpoint`: projections and attention are kept, the rest recomputed."""
    # The gradient of cuDNN's attention takes its output and the logarithm of its denominator.
    if "dot_product_attention_fwd" in primitive.name:
        return True
    return _keeps_names(primitive, *values, **parameters)


class _UnrolledLayers(nn.Module):
    """Layers one after another, named `0`, `1`, ..., called as the scanned ones are."""

    make: Callable[..., nn.Module]
    count: int

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Cache], context: Context, slides: Array | None, layers: Array
    ) -> tuple[tuple[Array, Cache], None]:
        hidden, caches = carry
        written = []
        for i in range(self.count):
            here = None if slides is None else slides[i]
            cache = None if caches is None else caches[i]
            (hidden, cache), _ = self.make(name=str(i))((hidden, cache), context, here, 0)
            written.append(cache)
        return (hidden, None if caches is None else tuple(written)), None


class LlamaModel(nn.Module):
    """Embedding, decoder layers and final norm."""

    blueprint: Blueprint
    scan: bool
    remat: Remat | tuple[Remat, ...]

    def setup(self) -> None:
        blueprint = self.blueprint
        self.embed_tokens = blueprint.embed()
        if self.scan:
            self.layers = nn.scan(
                self._block(self.remat),
                # The collection "genlora" mirrors params; see `gl.apply`.
                variable_axes={"params": 0, "genlora": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0, 0),
                length=blueprint.cfg.num_hidden_layers,
            )(blueprint)
        else:
            count = blueprint.cfg.num_hidden_layers
            policies = (self.remat,) * count if isinstance(self.remat, str) else self.remat
            if len(policies) != count:
                raise ValueError(f"remat has {len(policies)} policies, the model {count} layers")
            blocks = [self._block(policy) for policy in policies]
            self.layers = _UnrolledLayers(
                lambda name: blocks[int(name)](blueprint, name=name), count
            )
        self.norm = blueprint.norm()

    def _block(self, remat: Any) -> Any:
        """The layers' class under a policy.

        Raises:
            ValueError: If there is no such policy, or it is a tuple of them.
        """
        if isinstance(remat, tuple):
            raise ValueError("remat: scanned layers share one policy; a tuple needs scan=False")
        if remat not in get_args(Remat):
            raise ValueError(f"remat must be one of {get_args(Remat)}, got {remat!r}")
        if remat == "none":
            return LlamaDecoderLayer
        policy = keeps_products if remat == "dots" else None
        return nn.remat(LlamaDecoderLayer, policy=policy, prevent_cse=not self.scan)

    def __call__(
        self, input_ids: Array, context: Context, slides: Array | None, cache: Cache
    ) -> tuple[Array, Cache]:
        """Normalised hidden states and cache."""
        hidden = self.blueprint.residual(self.embed_tokens(input_ids))
        layers = jnp.arange(self.blueprint.cfg.num_hidden_layers, dtype=jnp.int32)
        # The cache is carried, so that it is updated where it lies.
        (hidden, cache), _ = self.layers((hidden, cache), context, slides, layers)
        return self.blueprint.constrain(self.norm(hidden)), cache


class LlamaForCausalLM(nn.Module):
    """A model of the LLaMA family with its language-model head.

    Attributes:
        config: Shape of the model.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
        scan: Layers stacked in one `nn.scan` (fast to compile), or one after another.
        remat: What of a layer the backward pass recomputes: almost nothing (`"none"`), all but the
            outputs of projections and of attention (`"dots"`), or all (`"full"`). Each takes less
            memory and more time. Or, of unrolled layers, a policy for each.
        attention: `"auto"`, `"xla"`, `"cudnn"`, `"splash"` or `"blocks"`; see `attend`.
        mesh: Devices, with axes `data`, `fsdp` and `tensor`, that shard activations.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = True
    remat: Remat | tuple[Remat, ...] = "none"
    attention: Attention = "auto"
    mesh: Mesh | None = None

    def setup(self) -> None:
        blueprint = Blueprint(
            self.config, self.dtype, self.param_dtype, self.attention, self.mesh, not self.scan
        )
        self.model = LlamaModel(blueprint, self.scan, self.remat)
        if not self.config.tie_word_embeddings:
            self.lm_head = blueprint.dense(self.config.vocab_size, False)

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
                is not padding. Packed rows must give them.
            segment_ids: Int `[batch, length]`; a token sees its segment alone.

        Returns:
            Logits `[batch, length, vocab]` in `dtype`.
        """
        hidden = self.hidden_states(
            input_ids, attention_mask=attention_mask, positions=positions, segment_ids=segment_ids
        )
        return self.head(hidden)

    def hidden_states(
        self,
        input_ids: Array,
        *,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        max_segments: int | None = None,
    ) -> Array:
        """Normalised hidden states `[batch, length, hidden]`: what `head` takes.

        The arguments are those of a call, and `max_segments`: the most segments that a row has,
        padding counted as one, if equal ids lie together. cuDNN's attention then needs no mask.
        More of them give NaN.
        """
        length = input_ids.shape[1]
        mask, segments = None, jnp.ones_like(input_ids) if segment_ids is None else segment_ids
        if attention_mask is not None:
            segments = jnp.where(attention_mask != 0, segments, -1)
        if attention_mask is not None or segment_ids is not None:
            mask = jnp.tril(jnp.ones((length, length), bool))[None]
            if attention_mask is not None:
                mask = mask & (attention_mask[:, None, :] != 0)
            if segment_ids is not None:
                mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
            # A query sees itself: a row of the mask without any key would give NaN.
            mask = (mask | jnp.eye(length, dtype=bool)[None])[:, None]
        if positions is None and attention_mask is not None:
            positions = jnp.maximum(jnp.cumsum(attention_mask != 0, axis=1) - 1, 0)
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(length), input_ids.shape)
        runs = None
        if max_segments is not None and segment_ids is not None and attention_mask is None:
            runs = find_runs(segment_ids, max_segments)
        hidden = self._run(input_ids, positions, mask, segments, 0, None, runs)[0]
        return hidden if runs is None else jnp.where(runs.fit, hidden, jnp.nan)

    def _run(
        self,
        input_ids: Array,
        positions: Array,
        mask: Any,
        segments: Any,
        start: Any,
        cache: Cache,
        runs: Runs | None = None,
    ) -> tuple[Array, Cache]:
        """Hidden states and cache, with the masks of sliding windows."""
        cfg, sliding_mask, slides, window = self.config, None, None, None
        slots = input_ids.shape[1] if cache is None else jax.tree.leaves(cache)[0].shape[3]
        if cfg.sliding_window is not None and cfg.sliding_window < slots:
            segments = None  # a token's view now depends on its window as well
            first = jnp.reshape(start, (-1, 1, 1, 1))  # of each row, or of all
            query = first + jnp.arange(input_ids.shape[1])[None, None, :, None]
            key = jnp.arange(slots)[None, None, None]
            causal = key <= query if mask is None else mask
            sliding_mask = causal & (key > query - cfg.sliding_window)
            if cfg.sliding_layers is None:
                mask, sliding_mask, window = sliding_mask, None, cfg.sliding_window
            else:
                mask, runs = causal, None
                slides = jnp.array([i in cfg.sliding_layers for i in range(cfg.num_hidden_layers)])
        rope = rotary(cfg, positions)
        context = Context(rope, mask, sliding_mask, start, segments, runs, window)
        return self.model(input_ids, context, slides, cache)

    def head(self, hidden: Array) -> Array:
        """Logits `[..., vocab]` of hidden states `[..., hidden]`."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

    def decode(self, input_ids: Array, start: Array, cache: Cache) -> tuple[Array, Cache]:
        """Logits of the token after these, with a key-value cache.

        Args:
            input_ids: Int `[batch, length]`: a part of each row's text, or one new token.
            start: Int `[batch]`: the position of the first of these, which is its slot as well.
                What is written beyond the cache is dropped.
            cache: From `init_cache`, or from the last call.

        Returns:
            Logits `[batch, vocab]` and the new cache.
        """
        positions = start[:, None] + jnp.arange(input_ids.shape[1])[None]
        slots = jnp.arange(jax.tree.leaves(cache)[0].shape[3])
        mask = slots[None, None, None] <= positions[:, None, :, None]
        hidden, cache = self._run(input_ids, positions, mask, None, start, cache)
        # A prompt's other logits would take more memory than all the rest.
        return self.head(hidden[:, -1]), cache

    def init_cache(self, batch: int, slots: int) -> Cache:
        """Empty key-value cache in `dtype`.

        Of scanned layers it is one stack `[layers, batch, kv_heads, slots, head_dim]`; unrolled
        ones have a stack of one layer each, which is read where it lies.
        """
        cfg = self.config
        layers = cfg.num_hidden_layers
        shape = (batch, cfg.num_key_value_heads, slots, cfg.head_dim)

        def stack(count: int) -> Cache:
            return {name: jnp.zeros((count, *shape), self.dtype) for name in ("k", "v")}

        return stack(layers) if self.scan else tuple(stack(1) for _ in range(layers))


def init_params(model: LlamaForCausalLM, key: Array) -> Any:
    """Random parameters, for training from scratch and for tests."""
    return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def parameter_shapes(model: LlamaForCausalLM) -> Any:
    """The tree of parameters as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
