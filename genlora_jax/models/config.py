"""The shape of a model of the LLaMA family. Families differ in options of one module."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1 (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a model; names are those of Hugging Face's `config.json` where it has one.

    Attributes:
        attention_bias: Biases of the projections to queries, keys and values.
        attention_output_bias: Bias of the projection from the heads.
        mlp_bias: Biases of the feed-forward network.
        partial_rotary_factor: Share of a head's size that is rotated.
        sliding_window: Number of positions up to and with a query's that it sees; None for all.
        sliding_layers: Layers that have the window; None for all of them.
        qk_norm: Norm of queries and keys before rotation: none, one over each `"head"`, or one
            over the `"whole"` projection.
        post_norm: Norms after attention and feed-forward network instead of before.
        fused_projections: `qkv_proj` and `gate_up_proj` instead of one Dense for each.
    """

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
    partial_rotary_factor: float = 1.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    qk_norm: Literal["none", "head", "whole"] = "none"
    post_norm: bool = False
    fused_projections: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is no multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"head_dim ({self.head_dim}) times partial_rotary_factor "
                f"({self.partial_rotary_factor:g}) must be even for rotary embeddings, above 0 and "
                "no more than head_dim"
            )
        if not 0 < self.rms_norm_eps < 1:
            raise ValueError(f"rms_norm_eps must be above 0 and below 1, got {self.rms_norm_eps}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")

    @property
    def rotary_dim(self) -> int:
        """Number of values of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)
