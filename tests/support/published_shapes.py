"""Transformers as published families shape them, small."""

from __future__ import annotations

from dataclasses import replace

from apps.nets.config import TransformerConfig

BARE = TransformerConfig("nano", norm="rms", bias=False, scale_embeddings=False, dropout=0.0)
T5 = replace(BARE, positions="relative", tie="inputs", attention_scale=1.0)
MIXTRAL = replace(BARE, positions="rotary", tie="none", activation="silu", gated=True)
