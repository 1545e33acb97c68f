"""Small models of every published family, and a checkpoint of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from published_shapes import MIXTRAL, T5
from safetensors.torch import load_file
from torch import Tensor

import core
from apps.nets.config import TransformerConfig
from apps.nets.transformer import LanguageModel, TranslationModel
from apps.porting import save_pretrained

NLLB = TransformerConfig("nano", position_offset=2, dropout=0.0)
EXPERTS = core.MoEConfig(4, core.TokenChoice(top_k=1), core.FFN(128, "relu"))
VOCAB = 30


def switch_model(config: TransformerConfig = T5, **options: Any) -> TranslationModel:
    tied = replace(config, tie="all", logits_scale=config.shape.dim**-0.5)
    return TranslationModel(tied, source_vocab=VOCAB, **{"ffn": EXPERTS, **options}).eval()


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return a.state_dict().keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in a.state_dict().items())


def two_of_four(**options: Any) -> core.MoEConfig:
    return core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(128, "relu", bias=True), **options)


SCALED = core.TokenChoice(top_k=2, score_func="sigmoid", normalize=True, expert_bias=True, scale=2.5)


def decoder(
    router: core.TokenChoice, qk_norm: Any = MIXTRAL.qk_norm, moe_blocks: str = "all", **options: Any
) -> LanguageModel:
    ffn = core.MoEConfig(4, router, core.SwiGLU(24), **options)
    return LanguageModel(replace(MIXTRAL, qk_norm=qk_norm), vocab=VOCAB, ffn=ffn, moe_blocks=moe_blocks)


MODELS: dict[str, Callable[[], Any]] = {
    "t5": lambda: TranslationModel(T5, source_vocab=VOCAB),
    "switch_transformers": switch_model,
    "m2m_100": lambda: TranslationModel(NLLB, source_vocab=VOCAB),
    "nllb-moe": lambda: TranslationModel(NLLB, source_vocab=VOCAB, ffn=two_of_four()),
    "mistral": lambda: LanguageModel(MIXTRAL, vocab=VOCAB),
    "mixtral": lambda: decoder(core.TokenChoice(top_k=2)),
    "qwen3_moe": lambda: decoder(core.TokenChoice(top_k=2), qk_norm="head", moe_blocks="last1"),
    "olmoe": lambda: decoder(core.TokenChoice(top_k=3, normalize=False), qk_norm="all"),
    "glm4_moe": lambda: decoder(SCALED, num_shared_experts=2, moe_blocks="last1"),
}


def checkpoint(folder: Path) -> dict[str, Tensor]:
    """Write a Switch checkpoint to ``folder``, and return its tensors."""
    save_pretrained(switch_model(), folder)
    return load_file(folder / "model.safetensors")
