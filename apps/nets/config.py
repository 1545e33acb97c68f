"""The configuration of a transformer: sizes by name, and the choices that tell published models apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import core
from core.fields import Checked, Count, CountOrZero, Depth, Positive, ShareBelowOne


class Size(NamedTuple):
    """A named size."""

    encoder_layers: int
    decoder_layers: int
    dim: int
    hidden_dim: int
    num_heads: int


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "nano": Size(2, 2, 64, 128, 2),
        "tiny": Size(4, 4, 128, 256, 4),
        "small": Size(6, 6, 256, 1024, 4),
        "base": Size(6, 6, 512, 2048, 8),
        "big": Size(6, 6, 1024, 4096, 16),
    }
)
"""Layers of encoder and decoder, D, F and heads. "base" and "big" are those of arXiv 1706.03762."""


class Shape(NamedTuple):
    """A configuration's numbers with the size's filled in."""

    encoder_layers: int
    decoder_layers: int
    dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_heads // self.num_kv_heads


@core.register_config
@dataclass(frozen=True)
class TransformerConfig(Checked):
    """The pre-norm transformer around the MoE layers. A field left at None takes the size's value; see ``shape``.

    Attributes:
        size: layers of encoder and decoder / dim / hidden_dim / heads. "nano": 2+2 / 64 / 128 / 2, "tiny": 4+4 / 128 /
            256 / 4, "small": 6+6 / 256 / 1024 / 4, "base": 6+6 / 512 / 2048 / 8, "big": 6+6 / 1024 / 4096 / 16.
        dim: model dim D.
        hidden_dim: FFN hidden dim F of the dense layers.
        num_heads: attention heads H.
        num_kv_heads: heads of keys and values, each shared by ``num_heads / num_kv_heads`` query heads (arXiv
            2305.13245); None: as ``num_heads``.
        head_dim: width of a head; None: ``dim / num_heads``.
        encoder_layers, decoder_layers: layers; a language model has the decoder's.
        positions: "sinusoidal", added to the embeddings: sines in the first half of D, cosines in the second;
            "learned", added; "rotary", of queries and keys (arXiv 2104.09864); "relative", T5's biases by distance,
            one table for all layers of a stack (arXiv 1910.10683, section 2.1); "none".
        max_length: positions that "learned" knows: longer sequences raise an error.
        position_offset: "sinusoidal" and "learned": row of the first position; 2 in fairseq's models.
        relative_buckets: "relative": rows of the table.
        relative_max_distance: "relative": distance from which on all share a row.
        rotary_base: "rotary": base of the wavelengths.
        norm: "layer": LayerNorm; "rms": RMSNorm (arXiv 1910.07467).
        norm_eps: added to a norm's variance.
        activation: of the dense FFNs: "relu", "gelu", "gelu_tanh" (its approximation), "silu".
        gated: the dense FFNs are ``(act(x w_gate) * (x w_in)) w_out``: GEGLU, SwiGLU (arXiv 2002.05202).
        bias: in all linear layers but the output's, and in LayerNorm.
        qkv_bias: of queries, keys and values; None: as ``bias``.
        qk_norm: RMSNorm of the queries and keys of self-attention before their rotations, which keeps the scores from
            growing (arXiv 2302.05442): "head": of each head, with one scale for all (Qwen3); "all": of all heads as
            one vector (OLMoE, arXiv 2409.02060); "none".
        tie: which embeddings are one parameter. "all": source, target, output, which needs a joint vocabulary;
            "inputs": source and target; "decoder": target and output; "none".
        start: whose embedding the decoder reads for ``BOS_ID``: "bos", its own; "eos", the embedding of ``EOS_ID``,
            with which fairseq's models start.
        scale_embeddings: embeddings are multiplied by ``sqrt(dim)``.
        attention_scale: factor of the attention scores; None: ``1 / sqrt(head_dim)``.
        logits_scale: factor of the decoder's output before the output layer; ``dim ** -0.5`` in tied T5 models.
        dropout: on each layer's addition to the residual stream.
        attn_dropout: of the attention weights.
        ffn_dropout: of the hidden layer of the dense FFNs; experts have none.
        embed_dropout: of the embeddings; None: as ``dropout``.

    Raises:
        ValueError: a value out of its range, or two that do not go together.
    """

    size: Literal["nano", "tiny", "small", "base", "big"] = "tiny"
    dim: Count | None = None
    hidden_dim: Count | None = None
    num_heads: Count | None = None
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    encoder_layers: Depth | None = None
    decoder_layers: Depth | None = None
    positions: Literal["sinusoidal", "learned", "rotary", "relative", "none"] = "sinusoidal"
    max_length: Count = 512
    position_offset: CountOrZero = 0
    relative_buckets: Count = 32
    relative_max_distance: Count = 128
    rotary_base: Positive = 10000.0
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: Positive = 1e-5
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu"
    gated: bool = False
    bias: bool = True
    qkv_bias: bool | None = None
    qk_norm: Literal["none", "head", "all"] = "none"
    tie: Literal["all", "inputs", "decoder", "none"] = "all"
    start: Literal["bos", "eos"] = "bos"
    scale_embeddings: bool = True
    attention_scale: Positive | None = None
    logits_scale: Positive = 1.0
    dropout: ShareBelowOne = 0.1
    attn_dropout: ShareBelowOne = 0.0
    ffn_dropout: ShareBelowOne = 0.0
    embed_dropout: ShareBelowOne | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_shape()

    def _check_shape(self) -> None:
        dim, heads = self._sized("dim"), self._sized("num_heads")
        if self.head_dim is None and dim % heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={heads}: set head_dim")
        shape = self.shape
        if heads % shape.num_kv_heads:
            raise ValueError(f"num_heads={heads} is not divisible by num_kv_heads={shape.num_kv_heads}")
        if self.positions == "sinusoidal" and (dim % 2 or dim < 4):
            raise ValueError(f"dim={dim} must be even and at least 4 for positions='sinusoidal'")
        if self.positions == "rotary" and shape.head_dim % 2:
            raise ValueError(f"head_dim={shape.head_dim} must be even for positions='rotary'")
        if self.positions == "relative":
            if self.relative_buckets < 4 or self.relative_buckets % 2:
                raise ValueError(f"relative_buckets={self.relative_buckets} must be even and at least 4")
            if self.relative_max_distance <= self.relative_buckets // 2:
                raise ValueError(
                    f"relative_max_distance={self.relative_max_distance} must exceed half of "
                    f"relative_buckets={self.relative_buckets}"
                )

    def _sized(self, name: str) -> int:
        value = getattr(self, name)
        return getattr(SIZES[self.size], name) if value is None else value

    @property
    def shape(self) -> Shape:
        """The configuration's numbers, with the size's filled in."""
        heads = self._sized("num_heads")
        return Shape(
            self._sized("encoder_layers"),
            self._sized("decoder_layers"),
            self._sized("dim"),
            self._sized("hidden_dim"),
            heads,
            heads if self.num_kv_heads is None else self.num_kv_heads,
            self._sized("dim") // heads if self.head_dim is None else self.head_dim,
        )

    @property
    def dense_ffn(self) -> core.DenseFFN:
        """The FFN that each dense block has."""
        return core.DenseFFN(self.shape.hidden_dim, self.activation, self.gated, self.bias, self.ffn_dropout)

    @property
    def has_qkv_bias(self) -> bool:
        """Queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def score_scale(self) -> float:
        """Factor of the attention scores, the default filled in."""
        return self.shape.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
