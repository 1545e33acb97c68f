"""A small table with every kind of column, as a data module that needs no files."""

from __future__ import annotations

import numpy as np
import torch

from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature, Features
from apps.recsys.tables.rows.batch import Ragged, TableBatch

FEATURES = Features(
    categorical=(
        CategoricalFeature("kind", 6),
        CategoricalFeature("tags", 90, multi_valued=True),
        CategoricalFeature("item", 401),
    ),
    continuous=(ContinuousFeature("age", 40.0, 10.0, (30.0, 40.0, 50.0), 0.1), ContinuousFeature("none")),
    tasks=("click", "buy"),
    positives=(0.4, 0.2),
    num_domains=2,
)


class EveryColumn:
    """Clicks depend on kind, age, tag 7 and the item; buys on the age; every tenth buy is unknown.

    Args:
        sizes: rows of training, validation and test.
        one_class: all buys of training are 0.
    """

    features = FEATURES

    def __init__(self, sizes: tuple[int, int, int] = (1500, 500, 500), one_class: bool = False) -> None:
        self.sizes, self.one_class = dict(zip(("train", "val", "test"), sizes, strict=True)), one_class
        self.items = np.random.default_rng(9).normal(size=401)

    def prepare_data(self) -> None: ...

    def setup(self, stage: str) -> None: ...

    def columns(self, split: str) -> dict:
        n = self.sizes[split]
        rng = np.random.default_rng(len(split))
        kind, item = rng.integers(0, 6, n), rng.integers(0, 401, n)
        age = rng.normal(40, 10, n)
        lengths = rng.integers(0, 4, n)
        tags = rng.integers(0, 90, lengths.sum())
        tags = np.where(rng.random(len(tags)) < 0.3, 7, tags)
        has_7 = np.zeros(n)
        np.maximum.at(has_7, np.repeat(np.arange(n), lengths), tags == 7)
        z = 1.5 * (kind == 2) + 0.08 * (age - 40) + 2 * has_7 + self.items[item] - 1
        click = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(np.float32)
        buy = (rng.random(n) < 1 / (1 + np.exp(-0.2 * (age - 45)))).astype(np.float32)
        if self.one_class and split == "train":
            buy[:] = 0
        buy[::10] = np.nan
        age[rng.random(n) < 0.1] = np.nan
        domain, group = rng.integers(0, 2, n), rng.integers(0, n // 10 + 1, n)
        return locals()

    def batches(self, split: str, size: int = 128, shuffled: bool = False) -> list[TableBatch]:
        c = self.columns(split)
        starts = np.cumsum(c["lengths"]) - c["lengths"]
        order = np.random.default_rng(0).permutation(c["n"]) if shuffled else np.arange(c["n"])
        batches: list[TableBatch] = []
        if not c["n"]:
            return batches
        for rows in np.split(order, range(size, c["n"], size)):
            tags = np.concatenate([c["tags"][starts[r] : starts[r] + c["lengths"][r]] for r in rows] or [np.zeros(0)])
            batches.append(
                TableBatch(
                    dense_BC=torch.tensor(np.stack([c["age"][rows], np.full(len(rows), 5.0)], 1), dtype=torch.float32),
                    single_FB=torch.tensor(np.stack([c["kind"][rows], c["item"][rows]]), dtype=torch.int32),
                    label_Bt=torch.tensor(np.stack([c["click"][rows], c["buy"][rows]], 1)),
                    index_B=torch.tensor(rows),
                    domain_B=torch.tensor(c["domain"][rows]),
                    group_B=torch.tensor(c["group"][rows]),
                    lists=(Ragged(torch.tensor(tags, dtype=torch.int32), torch.tensor(c["lengths"][rows])),),
                )
            )
        return batches

    def train_dataloader(self) -> list[TableBatch]:
        return self.batches("train", shuffled=True)

    def val_dataloader(self) -> list[TableBatch]:
        return self.batches("val")

    def test_dataloader(self) -> list[TableBatch]:
        return self.batches("test")
