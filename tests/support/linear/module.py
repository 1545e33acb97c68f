"""``LinearClassifier``, the module that ``moesaic fit`` trains."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import core
from apps.nets.blocks import one_ffn
from apps.train.step.module import SparseModule, TaskOutput
from linear.model import linear
from linear.report import LinearReport


class LinearClassifier(SparseModule):
    monitor, monitor_mode = "val/top1", "max"

    def __init__(
        self, moe: core.MoEConfig | None = None, dense_ffn: core.DenseFFN | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.moe = moe
        self.model = linear(one_ffn(moe, dense_ffn))

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)

    def task_loss(self, batch: Any) -> TaskOutput:
        logits = self(batch.image)
        return TaskOutput(F.cross_entropy(logits, batch.label), logits, batch.label, len(logits))

    def example_inputs(self, batch: Any) -> tuple[Tensor]:
        return (batch.image,)

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"top1": MulticlassAccuracy(10, average="micro")})

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        probability, label = self(batch.image).softmax(-1).max(-1)
        return {"label": label, "probability": probability}

    def report_callbacks(self) -> list[LinearReport]:
        return [LinearReport()]
