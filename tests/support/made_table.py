"""Table batches and a data module made here, for tests of the recommender and the processes they start."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature, Features
from apps.recsys.tables.rows.batch import Ragged, TableBatch

AGE = ContinuousFeature("age", mean=40.0, std=10.0, quantiles=(20.0, 30.0, 50.0), missing=0.1)
FLAT = ContinuousFeature("flat", mean=3.0, std=1.0, quantiles=(), missing=0.0)


def features(tags: bool = True, num_domains: int = 0) -> Features:
    """Describe two categorical columns, the second multi-valued with ``tags``, and two continuous ones."""
    return Features(
        categorical=(CategoricalFeature("city", 5), CategoricalFeature("film.tags", 7, multi_valued=tags)),
        continuous=(AGE, FLAT),
        tasks=("click", "buy"),
        positives=(0.5, 0.2),
        num_domains=num_domains,
    )


def ragged(*columns: list[list[int]]) -> tuple[Ragged, ...]:
    """Join the rows of each example, column by column."""
    return tuple(
        Ragged(
            torch.tensor([row for rows in column for row in rows], dtype=torch.int32),
            torch.tensor([len(rows) for rows in column], dtype=torch.int32),
        )
        for column in columns
    )


def columns(given: dict[str, list[list[int]]]) -> tuple[Tensor, tuple[Ragged, ...]]:
    """Return the rows of each example as a batch has them; columns of tags have several."""
    single = [[row for (row,) in rows] for name, rows in given.items() if not name.endswith("tags")]
    lists = ragged(*(rows for name, rows in given.items() if name.endswith("tags")))
    return torch.tensor(single, dtype=torch.int32).view(len(single), len(next(iter(given.values())))), lists


def rows_of(batch: TableBatch, own: Features, column: str) -> list[int] | list[list[int]]:
    """Return the rows of a column in a batch, a list of each example's where it may have several."""
    single, several = ([f.name for f in kind] for kind in (own.single, own.several))
    if column in single:
        return batch.single_FB[single.index(column)].tolist()
    lists = batch.lists[several.index(column)]
    return [rows.tolist() for rows in lists.values_N.split(lists.length_B.tolist())]


def batch(size: int = 6, tags: bool = True, seed: int = 0, num_domains: int = 0) -> TableBatch:
    """Draw rows of ``features``. A purchase implies a click; the first row's age is missing, the second's infinite."""
    g = torch.Generator().manual_seed(seed)

    def draw(high: int, n: int) -> list[int]:
        return torch.randint(high, (n,), generator=g).tolist()

    counts = draw(4, size) if tags else [1] * size
    city, tag = draw(5, size), [draw(7, n) for n in counts]
    single = [city] if tags else [city, [own for (own,) in tag]]
    dense_BC = torch.stack((40 + 10 * torch.randn(size, generator=g), torch.full((size,), 3.0)), dim=1)
    dense_BC[0, 0] = torch.nan
    if size > 1:
        dense_BC[1, 0] = torch.inf
    click_B = (torch.rand(size, generator=g) < 0.5).float()
    buy_B = click_B * (torch.rand(size, generator=g) < 0.4).float()
    return TableBatch(
        dense_BC,
        torch.tensor(single, dtype=torch.int32).view(len(single), size),
        torch.stack((click_B, buy_B), dim=1),
        torch.arange(size),
        domain_B=torch.randint(num_domains, (size,), generator=g) if num_domains else None,
        group_B=torch.arange(size) // 2,
        lists=ragged(tag) if tags else (),
    )


class MadeTable(LightningDataModule):
    """``steps`` training batches, one validation and one test batch.

    Args:
        steps: training batches an epoch.
        size: rows of a batch.
        tags: whether a column is multi-valued.
    """

    def __init__(self, steps: int = 4, size: int = 16, tags: bool = True) -> None:
        super().__init__()
        self.steps, self.size, self.tags = steps, size, tags
        self.features = features(tags)

    def _batches(self, seeds: range) -> DataLoader[Tensor]:
        return DataLoader([batch(self.size, self.tags, seed=s) for s in seeds], batch_size=None)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Tensor]:
        return self._batches(range(self.steps))

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self._batches(range(100, 101))

    def test_dataloader(self) -> DataLoader[Tensor]:
        return self._batches(range(200, 201))

    def predict_dataloader(self) -> DataLoader[Tensor]:
        return self._batches(range(200, 201))
