"""A V-MoE of two blocks, the second one sparse, and batches of 8x8 images of three classes."""

from __future__ import annotations

import torch

import core
from apps.vision.batch import ImageBatch
from apps.vision.model import ViTConfig, VMoE

# 8x8 images, patches of 4: 4 tokens without a class token.
VIT = ViTConfig(patch_size=4, embed_dim=8, depth=2, num_heads=2, pool="avg")
MOE = core.MoEConfig(num_experts=2, router=core.TokenChoice(top_k=1), expert=core.FFN(hidden_dim=16))


def sparse(moe=MOE):
    torch.manual_seed(0)
    return VMoE(VIT, image_size=8, in_chans=1, num_classes=3, ffn=moe, moe_blocks=[1]).eval()


def batches(n=2, size=8):
    draw = torch.Generator().manual_seed(1)
    return [
        ImageBatch(torch.randn(size, 1, 8, 8, generator=draw), torch.arange(size) % 3, torch.arange(size))
        for _ in range(n)
    ]
