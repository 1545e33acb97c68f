"""Routers whose experts may become more and fewer, and layers that are built the same each time."""

from __future__ import annotations

import torch

import core
from core import MoEConfig, TokenChoice

D = 8

ROUTERS = {
    "TokenChoice": TokenChoice(2, expert_bias=True),
    "Prototypes": core.Prototypes(2),
    "Hierarchical": core.Hierarchical(num_groups=2, top_groups=1, top_k=1),
    "Ensemble": core.Ensemble(2, 1),
    "Cosine": core.Cosine(2, proj_dim=3),
    "Stable": core.Stable(20),
    "Threshold": core.Threshold(),
    "NullExperts": core.NullExperts(2, 3),
    "DynamicThreshold": core.DynamicThreshold(2),
    "TokenRounding": core.TokenRounding(2, tile=2),
    "Base": core.Base(),
    "Sinkhorn": core.Sinkhorn(),
    "Dense": core.Dense(),
    "DenseToSparse": core.DenseToSparse(),
    "Sentence": core.Sentence(),
    "ExpertChoice": core.ExpertChoice(),
    "SoftSlots": core.SoftSlots(),
    "Merge": core.Merge("smear"),
    "MixtureOfTokens": core.MixtureOfTokens(group_size=2),
}


def built(config: MoEConfig, seed: int = 0) -> core.MoE:
    torch.manual_seed(seed)
    return config.build(D)


def tokens(B: int = 2, S: int = 12) -> torch.Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(5))
