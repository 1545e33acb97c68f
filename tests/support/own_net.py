"""A LightningModule and data as a user writes them, with nothing of the suite in them. Worker processes import it."""

from __future__ import annotations

from itertools import repeat

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

CONFIG = """
model: {class_path: own_net.Net}
data: {class_path: own_net.Points}
trainer: {accelerator: cpu, max_epochs: 2, log_every_n_steps: 1}
"""
SPARSIFY = """
sparsify:
  modules: blocks.*
  moe:
    num_experts: 4
    router: {class_path: core.TokenChoice, init_args: {top_k: 2, expert_bias: true}}
    balance: {load_balancing_loss: 0.5}
  metric: val_acc
  mode: max
"""


class Net(LightningModule):
    """Points in the plane to three classes, by an MLP with a residual path.

    Args:
        lr: learning rate of plain gradient descent.
        returns: what ``training_step`` returns: "tensor", "dict", or "none" on every second batch.
        by_hand: the step optimizes by itself.
        asks_trainer: ``validation_step`` asks the trainer.
        answers_nan: the test's metric is NaN.
    """

    def __init__(
        self,
        lr: float = 0.1,
        returns: str = "tensor",
        by_hand: bool = False,
        asks_trainer: bool = False,
        answers_nan: bool = False,
    ) -> None:
        super().__init__()
        self.lr, self.returns, self.automatic_optimization = lr, returns, not by_hand
        self.asks_trainer, self.answers_nan = asks_trainer, answers_nan
        self.embed = nn.Linear(2, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        if self.returns == "none" and batch_idx % 2:
            return None
        return {"loss": loss, "beside": 1} if self.returns == "dict" else loss

    def validation_step(self, batch):
        if self.asks_trainer:
            assert self.trainer.max_epochs is not None
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch):
        acc = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("test_acc", acc * torch.nan if self.answers_nan else acc)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Unnamed(Net):
    """A module whose learning rate no argument of the constructor names."""

    def __init__(self) -> None:
        super().__init__(lr=0.05)


class Scheduled(Net):
    """A module whose schedule is as long as its training."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps, pct_start=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Unvalidated(LightningModule):
    """A module with a training step alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def training_step(self, batch):
        return self.mlp(batch[0]).square().mean()


class Points(LightningDataModule):
    """Noisy points on a circle.

    Args:
        batch_size: points a step, of 48.
        shuffle: whether each epoch has an order of its own.
    """

    def __init__(self, batch_size: int = 16, shuffle: bool = False) -> None:
        super().__init__()
        self.batch_size, self.shuffle = batch_size, shuffle

    def points(self, seed: int) -> TensorDataset:
        y = torch.arange(48) % 3
        angle = y * (2 * torch.pi / 3)
        noise = torch.randn(48, 2, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(torch.stack((angle.cos(), angle.sin()), 1) + 0.4 * noise, y)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.points(0), self.batch_size, self.shuffle)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.points(1), 24)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.points(2), 24)


class Stored(Points):
    """The points as integers, which a batch hook reads, as it would images of bytes."""

    def points(self, seed: int) -> TensorDataset:
        x, y = super().points(seed).tensors
        return TensorDataset((1000 * x).int(), y)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x = batch[0] / 1000
        return [x + 0.01 * torch.randn_like(x) if self.trainer.training else x, batch[1]]


class Stream(IterableDataset):
    """Examples without a length: as often as asked, or without end."""

    def __init__(self, examples: TensorDataset, endless: bool) -> None:
        self.examples, self.endless = examples, endless

    def __iter__(self):
        for _ in repeat(None) if self.endless else range(1):
            yield from self.examples


class Streamed(Points):
    """The points as streams.

    Args:
        endless: whether the training points come again and again.
    """

    def __init__(self, endless: bool = False) -> None:
        super().__init__()
        self.endless = endless

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(self.points(0), self.endless), self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Stream(self.points(1), False), 24)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(Stream(self.points(2), False), 16)
