"""``--offload``: the experts of a model leave the device between the load of its checkpoint and the first batch."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

import core
from apps.train.offloading import offload


class OffloadsExperts(Callback):
    """Offloads the experts of a model before a test or a prediction begins.

    Args:
        how: as ``offload`` takes it.

    Attributes:
        done: what counts the experts that were there; None before.
    """

    done: core.OffloadedExperts | None

    def __init__(self, how: str) -> None:
        self.how, self.done = how, None

    def apply(self, model: nn.Module, device: torch.device) -> None:
        """Offload the model's experts, once."""
        if self.done is None:
            self.done = offload(model, self.how, device)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.apply(pl_module, pl_module.device)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.apply(pl_module, pl_module.device)
