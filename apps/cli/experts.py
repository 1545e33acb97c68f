"""``--quantize`` and ``--offload``: the experts change between the load of a checkpoint and the first batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

import core
from apps.train.cost.offloading import described, offload, record
from apps.train.cost.quantizing import Quantized, quantize_model


class ChangesExperts(Callback):
    """Quantizes the experts of a model, then offloads them, before a test or a prediction starts.

    Args:
        quantize: as ``quantize_model`` takes it; None: they stay as they are.
        offload: as ``offload`` takes it; None: they stay on the device.
    """

    def __init__(self, quantize: str | None, offload: str | None) -> None:
        self.quantize, self.offload = quantize, offload
        self._quantized: Quantized | None = None
        self._offloaded: core.OffloadedExperts | None = None

    def apply(self, model: nn.Module, device: torch.device) -> None:
        """Change the model's experts, once."""
        if self.quantize is not None and self._quantized is None:
            before = core.expert_bytes(model)
            quantize_model(model, self.quantize)
            self._quantized = Quantized(self.quantize, before, core.expert_bytes(model))
        if self.offload is not None and self._offloaded is None:
            self._offloaded = offload(model, self.offload, device)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.apply(pl_module, pl_module.device)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.apply(pl_module, pl_module.device)

    def records(self) -> dict[str, Any]:
        """Return the changes, as plain values for the record of a test."""
        quantized = {} if self._quantized is None else {"quantized": self._quantized.record()}
        offloaded = {} if self._offloaded is None else {"offloaded": record(str(self.offload), self._offloaded)}
        return {**quantized, **offloaded}

    def notes(self) -> dict[str, str]:
        """Return the changes, as lines by the name of the option."""
        quantized = {} if self._quantized is None else {"quantize": str(self._quantized)}
        return quantized if self._offloaded is None else {**quantized, "offload": described(self._offloaded)}
