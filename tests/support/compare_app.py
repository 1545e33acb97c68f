"""A sparse model with baselines of every kind, and its data, as small as can be. Worker processes import it too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import core
from apps.data.cache import DataError
from apps.data.loader import ResumableLoader
from apps.equal_cost.comparison import Baseline, Comparison, ExampleDifference, RoutedLayers, Search
from apps.nets.place import Place
from apps.train.step.distilling import ClassLogits, DistilConfig
from apps.train.step.growing import GrowConfig
from apps.train.step.module import OptimizerConfig, SparseModule, TaskOutput

D, TOKENS, CLASSES = 8, 4, 3


class TinyModel(SparseModule):
    """Four tokens a point, one block that is an MoE layer or an FFN, the mean of the tokens.

    Args:
        moe: the MoE layer; None: a dense model.
        hidden: F of the dense model's block.
        offers: its baselines: "dense_equal_flops", "dense_double_equal_flops" (a false claim), "dense_equal_params",
            "centroids" (no torch model), "tuned_centroids" (one with settings), "none" (one that cannot exist).
        further: metrics for the table beside top1; the module logs "top2" too.
        explodes_from: least learning rate that gives a NaN loss.
        optimizer, ema_decay, average_last, grow, distil: as in ``SparseModule``.
        keeps_examples: whether a comparison has the result of each test point.
    """

    monitor: ClassVar[str] = "val/top1"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"

    def __init__(
        self,
        moe: core.MoEConfig | None = None,
        hidden: int = 16,
        offers: list[str] | None = None,
        further: list[str] | None = None,
        explodes_from: float = 1e9,
        optimizer: OptimizerConfig | None = None,
        ema_decay: float | None = None,
        average_last: int | None = None,
        keeps_examples: bool = False,
        grow: GrowConfig | None = None,
        distil: DistilConfig | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, ema_decay=ema_decay, average_last=average_last, grow=grow, distil=distil)
        self.keeps_examples, self._tested = keeps_examples, []
        self.moe, self.offers, self.explodes_from = moe, offers or ["dense_equal_flops"], explodes_from
        self.further = tuple(further or ())
        self.embed = nn.Linear(2, TOKENS * D)
        dense = nn.Sequential(nn.Linear(D, hidden, bias=False), nn.GELU(), nn.Linear(hidden, D, bias=False))
        self.block = dense if moe is None else moe.build(D)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).unflatten(1, (TOKENS, D))
        return self.head((tokens + self.block(tokens)).mean(1))

    def task_loss(self, batch: Any) -> TaskOutput:
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        if self.training and self.optimizer_config.lr >= self.explodes_from:
            loss = loss * float("nan")
        return TaskOutput(loss, logits, y, len(y))

    def distribution(self, batch: Any) -> ClassLogits:
        return ClassLogits(self(batch[0]))

    def example_inputs(self, batch: Any) -> tuple[Any, ...]:
        return (batch[0],)

    def judged(self, batch: Any, out: TaskOutput, stage: str) -> TaskOutput:
        if stage == "test":
            self._tested += (out.outputs.argmax(1) == out.targets).tolist()
        return out

    @property
    def metric_signatures(self) -> Mapping[str, str]:
        return {"top1": "micro"} if self.keeps_examples else {}

    def build_metrics(self) -> MetricCollection:
        metrics = {"top1": MulticlassAccuracy(CLASSES, average="micro")}
        metrics["top2"] = MulticlassAccuracy(CLASSES, top_k=2, average="micro")
        return MetricCollection(metrics, compute_groups=False)

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        return self.further


class TinyComparison(Comparison):
    def examples_of_test(self) -> list[dict[str, Any]]:
        return [{"right": right} for right in self.module._tested] if self.module.keeps_examples else []

    def compare_examples(
        self, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
    ) -> list[ExampleDifference]:
        difference = sum(a["right"] - b["right"] for a, b in zip(first, second, strict=True))
        whole = ExampleDifference("right points", difference, difference - 1, difference + 1, 0.5, "counted")
        return [whole, ExampleDifference("right halves", 0, 0, 0, 0.01, "counted")]

    def routed_layers(self) -> RoutedLayers | None:
        return (
            None if self.module.moe is None else RoutedLayers(self.module.moe, D, Place(type(self.module).__name__, ()))
        )

    def with_moe(self, moe: core.MoEConfig) -> TinyModel:
        return TinyModel(moe=moe, optimizer=self.module.optimizer_config, ema_decay=self.module.ema_decay)

    def baselines(self) -> Mapping[str, Baseline]:
        assert self.module.moe is not None
        flops, params = self.module.moe.flops_per_token(D), self.module.moe.num_params(D)
        every = {
            "dense_equal_flops": Baseline(Dense(self.module, round(flops / (4 * D))), "a wider FFN"),
            "dense_double_equal_flops": Baseline(Dense(self.module, round(2 * flops / (4 * D))), "twice as wide"),
            "dense_equal_params": Baseline(Dense(self.module, round(params / (2 * D))), "a much wider FFN"),
            "centroids": Baseline(Centroids, "the nearest mean"),  # type: ignore[arg-type]
            "tuned_centroids": Baseline(TunedCentroids, "means drawn together"),  # type: ignore[arg-type]
            "none": Baseline(None, "it coincides with another"),
        }
        return {name: every[name] for name in self.module.offers}


COMPARISON = TinyComparison


@dataclass(frozen=True)
class Dense:
    sparse: TinyModel
    hidden: int

    def __call__(self) -> TinyModel:
        s = self.sparse
        own = {"optimizer": s.optimizer_config, "average_last": s.average_last, "keeps_examples": s.keeps_examples}
        return TinyModel(None, self.hidden, explodes_from=s.explodes_from, **own)


class Centroids:
    """The class of the nearest mean: a baseline without steps."""

    kind = "means"

    def fit(self, data: LightningDataModule, seed: int) -> None:
        x, y = data.points(0, 96)
        self.means = torch.stack([x[y == c].mean(0) for c in range(CLASSES)])

    def evaluate(self, data: LightningDataModule, split: Literal["val", "test"]) -> Mapping[str, float]:
        x, y = data.points(1 if split == "val" else 2, 48)
        return {"top1": float((torch.cdist(x, self.means).argmin(1) == y).float().mean())}


class TunedCentroids(Centroids):
    """The class of the nearest mean; the means are drawn together by as much as is best on validation."""

    tunes = True

    def tune(self, data: LightningDataModule, seed: int, search: Search) -> dict[str, float]:
        search.total, best = 3, (-1.0, 0.0)
        for share in (0.0, 0.5, 1.0):

            def tried(share: float = share) -> float:
                self.fit(data, seed, {"share": share})
                return self.evaluate(data, "val")["top1"]

            quality = search.quality(f"share={share:g}", tried, math.inf if best[0] < 0 else 1.0)
            best = max(best, (-1.0 if quality is None else quality, share))
        return {"share": best[1]}

    def fit(self, data: LightningDataModule, seed: int, settings: Mapping[str, float]) -> None:  # type: ignore[override]
        super().fit(data, seed)
        self.means = self.means.lerp(self.means.mean(0), settings["share"])


class TinyData(LightningDataModule):
    """Noisy points on a circle, three classes.

    Args:
        n: training examples.
        batch_size: examples a step.
    """

    def __init__(self, n: int = 96, batch_size: int = 16) -> None:
        super().__init__()
        self.n, self.batch_size = n, batch_size

    def points(self, split: int, n: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(split)
        y = torch.arange(n) % CLASSES
        angle = y * (2 * torch.pi / CLASSES)
        return torch.stack((angle.cos(), angle.sin()), 1) + 0.4 * torch.randn(n, 2, generator=generator), y

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(TensorDataset(*self.points(0, self.n)), self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.points(1, 48)), batch_size=24)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.points(2, 48)), batch_size=24)


class MissingData(TinyData):
    """Points that cannot be fetched."""

    def prepare_data(self) -> None:
        raise DataError("the points cannot be fetched")
