"""Transformers as published families shape them, small."""

from __future__ import annotations

from apps.nets.config import TransformerConfig

T5 = TransformerConfig(
    "nano",
    positions="relative",
    norm="rms",
    bias=False,
    tie="inputs",
    scale_embeddings=False,
    attention_scale=1.0,
    dropout=0.0,
)
MIXTRAL = TransformerConfig(
    "nano",
    positions="rotary",
    norm="rms",
    bias=False,
    tie="none",
    scale_embeddings=False,
    activation="silu",
    gated=True,
    dropout=0.0,
)
