"""A model and data that are as small as they can be with every moving part, for tests and the processes they start."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import core
from apps.data.loader import ResumableLoader
from apps.train.publish.predicting import Prediction, PredictionStream
from apps.train.step.distilling import ClassLogits, DistilConfig
from apps.train.step.growing import GrowConfig
from apps.train.step.module import OptimizerConfig, SparseModule, TaskOutput

CONFIG = """
model:
  class_path: tiny_app.TinyModule
  init_args:
    moe:
      num_experts: 4
      router: {class_path: TokenChoice, init_args: {top_k: 2}}
      expert: {class_path: FFN, init_args: {hidden_dim: 8}}
data: {class_path: tiny_app.TinyData, init_args: {n: 24}}
trainer: {accelerator: cpu, max_epochs: 1, log_every_n_steps: 1}
"""
"""A run of one epoch with three steps."""


class TinyModule(SparseModule):
    """Points in the plane to classes: linear, dropout, an MoE layer, linear.

    Args:
        num_classes: classes of the data.
        width: model dim D.
        moe: the MoE layer; None: none.
        dropout: probability.
        explode_at: optimizer step, from 0, whose loss is NaN.
        seconds: sleep in each step.
        optimizer, ema_decay, average_last, grow, distil: as in ``SparseModule``.
    """

    data_arguments: ClassVar[tuple[str, ...]] = ("num_classes",)

    def __init__(
        self,
        num_classes: int,
        width: int = 8,
        moe: core.MoEConfig | None = None,
        dropout: float = 0.1,
        explode_at: int | None = None,
        seconds: float = 0.0,
        optimizer: OptimizerConfig | None = None,
        ema_decay: float | None = None,
        average_last: int | None = None,
        grow: GrowConfig | None = None,
        distil: DistilConfig | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, ema_decay=ema_decay, average_last=average_last, grow=grow, distil=distil)
        if width % 2:
            raise ValueError(f"width={width} is not even")
        self.num_classes, self.explode_at, self.seconds = num_classes, explode_at, seconds
        layers: list[nn.Module] = [nn.Linear(2, width), nn.LayerNorm(width), nn.Dropout(dropout)]
        if moe is not None:
            layers.append(moe.build(width))
        self.net = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def task_loss(self, batch: Any) -> TaskOutput:
        x, y = batch
        if self.training and self.seconds:
            time.sleep(self.seconds)
        predicted = self.distribution(batch)
        logits = predicted.logits_NC
        loss = nn.functional.cross_entropy(logits, y)
        if self.training and self.global_step == self.explode_at:
            loss = loss * float("nan")
        return TaskOutput(loss, logits, y, len(y), distribution=predicted)

    def distribution(self, batch: Any) -> ClassLogits:
        return ClassLogits(self(batch[0]))

    def example_inputs(self, batch: Any) -> tuple[Any, ...]:
        return (batch[0],)

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"top1": MulticlassAccuracy(self.num_classes, average="micro")})


class LooseModule(TinyModule):
    """A model with arguments in whose place a text may stand for a class.

    Args:
        num_classes: classes of the data.
        start, starts: classes of the engine, of which the first may be a word.
        weights: a tensor.
        note: anything.
        kwargs: arguments of ``TinyModule``.
    """

    def __init__(
        self,
        num_classes: int,
        start: str | core.convert.Start = "copy",
        starts: tuple[core.convert.Start, ...] = (),
        weights: Tensor | None = None,
        note: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)


class NoisyPoints(Dataset):
    """Points around ``num_classes`` centers on a circle, moved at random each time they are read."""

    def __init__(self, n: int, num_classes: int) -> None:
        self.label = torch.arange(n) % num_classes
        angle = self.label * (2 * torch.pi / num_classes)
        self.point = torch.stack((angle.cos(), angle.sin()), dim=1)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.point[i] + 0.1 * torch.randn(2), self.label[i]


class TinyData(LightningDataModule):
    """Noisy points.

    Args:
        num_classes: classes of the points.
        n: training examples.
        batch_size: examples a step.
        num_workers: processes of the training loader.
    """

    def __init__(self, num_classes: int = 3, n: int = 66, batch_size: int = 8, num_workers: int = 0) -> None:
        super().__init__()
        self.num_classes, self.n, self.batch_size, self.num_workers = num_classes, n, batch_size, num_workers

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(NoisyPoints(self.n, self.num_classes), self.batch_size, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        points = NoisyPoints(24, self.num_classes)
        return DataLoader(TensorDataset(points.point, points.label), batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader


@core.register_config
@dataclass(frozen=True)
class Names:
    """The names of the classes, which are learned from the data and saved with the model.

    Attributes:
        words: a name a class.
    """

    words: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(" ".join(self.words).encode()).hexdigest()[:12]


class NamedData(TinyData):
    """Noisy points whose classes have names, and points of the user's.

    Args:
        num_classes: classes of the training points.
        names: names of the classes; None: they are read with the training points.
        text: points to be named, such as "0.5 1".
    """

    from_checkpoint: ClassVar[tuple[str, ...]] = ("names", "num_classes")

    def __init__(
        self, num_classes: int | None = None, names: Names | None = None, text: list[str] | str | None = None
    ) -> None:
        self._names, self.text = names, text
        super().__init__(num_classes or len(self.names.words), n=24)

    @property
    def names(self) -> Names:
        if self._names is None:
            with open("names.txt") as file:
                self._names = Names(tuple(file.read().split()))
        return self._names


class NamingModule(TinyModule):
    """A model that says the names of points.

    Args:
        names: names of the classes.
        kwargs: arguments of ``TinyModule``.
    """

    data_arguments: ClassVar[tuple[str, ...]] = ("num_classes", "names")

    def __init__(self, names: Names | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        assert names is not None
        self.names = names

    def predict_stream(self, data: NamedData) -> PredictionStream | None:
        if data.text is None:
            return None
        lines = [data.text] if isinstance(data.text, str) else data.text

        def predict(start: int) -> Iterator[Prediction]:
            for index, line in enumerate(lines[start:], start):
                name = self.names.words[int(self(torch.tensor([[float(x) for x in line.split()]])).argmax())]
                yield Prediction(index, {"index": index, "name": name}, [name])

        return PredictionStream(predict, lambda: len(lines), {"input": lines})
