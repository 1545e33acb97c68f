"""Soft slots and merged experts in several settings, and layers of them."""

from __future__ import annotations

import torch
from torch import nn

from core import FFN, GEGLU, MoE, MoEConfig, SwiGLU
from core.layers import SoftMoE
from core.routing.soft.soft import Merge, SoftSlots

BACKENDS = ["eager", "cpu", "grouped", "triton"]
EXPERTS = [FFN(12), FFN(12, "relu", bias=True), SwiGLU(12, bias=True), GEGLU(12)]
LORY = Merge("lory", segment_length=3)
MERGES = [Merge("smear"), Merge("meo"), LORY, Merge("lory", segment_length=3, first="own")]
ROUTERS = [SoftSlots(2), *MERGES]
# Two sequences of 7; the second has 4 real tokens, one of them after padding.
VALID = torch.tensor([[True] * 7, [True, True, False, True, False, True, False]])


def build(router, expert_config=FFN(12, bias=True), dim: int = 8, **options) -> MoE:
    """Return a layer of four experts whose gate is large enough for the weights to matter."""
    layer = MoEConfig(4, router, expert_config, **options).build(dim)
    with torch.no_grad():
        if isinstance(layer, SoftMoE):
            layer.router.scale.fill_(3.0)
        else:
            nn.init.normal_(layer.router.gate.weight)
    return layer
