"""A small model of images and texts, and a batch of pairs for it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

import core
from apps.multimodal.module import ImageTextRetriever
from apps.multimodal.pairs.pairs import PairBatch
from apps.multimodal.towers.towers import SingleTower

SIZES: dict[str, Any] = {"image_size": 8, "in_chans": 3, "vocab_size": 20, "max_tokens": 6}
TOWER = SingleTower(width=16, depth=2, num_heads=2, hidden_dim=32, patch_size=4)
MOE = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=16))


def retriever(seed: int = 0, **changed: Any) -> ImageTextRetriever:
    """Return a sparse single tower of width 16; ``changed`` replaces its arguments."""
    torch.manual_seed(seed)
    return ImageTextRetriever(**{**SIZES, "tower": TOWER, "dim": 8, "moe": MOE, **changed})


def pair_batch(size: int = 4, seed: int = 1) -> PairBatch:
    """Return pairs of noise, the text of pair i with 2 + i % 5 pieces; attributes of 3 and 2 classes, some unknown."""
    generator = torch.Generator().manual_seed(seed)
    length_B = 2 + torch.arange(size) % 5
    text_BL = torch.randint(3, SIZES["vocab_size"], (size, int(length_B.max())), generator=generator)
    label_BA = torch.stack((torch.arange(size) % 3, torch.arange(size) % 3 - 1), 1)
    return PairBatch(
        image=torch.randn(size, 3, 8, 8, generator=generator),
        text_BL=text_BL * (torch.arange(text_BL.shape[1]) < length_B[:, None]),
        image_B=torch.arange(size),
        caption_B=torch.arange(size),
        label_BA=label_BA,
        index_B=torch.arange(size),
    )


class Pairs(LightningDataModule):
    """Batches of pairs that are the same in all splits."""

    image_size, in_chans, vocab_size, max_tokens = 8, 3, 20, 6

    def __init__(self, size: int = 8, attributes: dict[str, int] | None = None) -> None:
        super().__init__()
        self.batch, self.attributes = pair_batch(size), attributes

    def train_dataloader(self) -> Any:
        return DataLoader([self.batch] * 5, batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader([self.batch], batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader
