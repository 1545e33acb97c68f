"""``--quantize``: the experts of a model are quantised between the load of its checkpoint and the first batch."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

import core
from apps.train.quantising import Quantised, quantise


class QuantisesExperts(Callback):
    """Quantises the experts of a model before a test or a prediction begins.

    Args:
        how: as ``quantise`` takes it.

    Attributes:
        done: what was quantised; None before.
    """

    done: Quantised | None

    def __init__(self, how: str) -> None:
        self.how, self.done = how, None

    def apply(self, model: nn.Module) -> None:
        """Quantise the model, once."""
        if self.done is None:
            before = core.expert_bytes(model)
            quantise(model, self.how)
            self.done = Quantised(self.how, before, core.expert_bytes(model))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.apply(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.apply(pl_module)
