"""A whole split of a table as numpy arrays, for models that are not networks and for checks of a whole split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from apps.recsys.encoding.features import Features
from apps.recsys.tables.rows.batch import Ragged, TableBatch


@dataclass(frozen=True)
class MultiValued:
    """A column with any number of values per row, row by row.

    Attributes:
        values: int64, the values of all rows.
        lengths_N: int64 (N,), values of each row.
    """

    values: np.ndarray
    lengths_N: np.ndarray

    @classmethod
    def of(cls, column: Ragged) -> MultiValued:
        """Return a column of a batch."""
        return cls(column.values_N.cpu().numpy(), column.length_B.cpu().numpy().astype(np.int64))

    def sets_N(self) -> np.ndarray:
        """Return a number for each row, int64 (N,), equal for rows of the same values in any order."""
        distinct, code = np.unique(self.values, return_inverse=True)
        # Sums of 64 random bits a value: two different rows have equal sums with a chance of 2^-64.
        bits = np.random.default_rng(0).integers(2**64, size=len(distinct), dtype=np.uint64)
        total = np.concatenate((np.zeros(1, np.uint64), np.cumsum(bits[code], dtype=np.uint64)))
        ends_N = np.cumsum(self.lengths_N)
        return np.unique(total[ends_N] - total[ends_N - self.lengths_N], return_inverse=True)[1]


@dataclass(frozen=True)
class TableArrays:
    """The rows of a split.

    Attributes:
        features: description of the columns.
        dense_NC: float32 (N, C), the continuous columns; NaN if missing or infinite.
        ids_NF: int64 (N, F), row numbers of the categorical columns of one value, in the order of the features.
        multi: the other categorical columns and the sequences, by name.
        label_Nt: float32 (N, t), as ``TableBatch`` has them; NaN for no label.
        domain_N: int64 (N,), the domain; None if there is one.
        group_N: int64 (N,), the user; None if none is named.
        weight_Nt: float32 (N, t), weights of the labels; None: 1.
        vector_NV: float32 (N, V), the columns of vectors side by side; None if there are none.
        cold_N: uint8 (N,), flags of what has no row in training; None if all have some.
    """

    features: Features
    dense_NC: np.ndarray
    ids_NF: np.ndarray
    multi: dict[str, MultiValued]
    label_Nt: np.ndarray
    domain_N: np.ndarray | None = None
    group_N: np.ndarray | None = None
    weight_Nt: np.ndarray | None = None
    vector_NV: np.ndarray | None = None
    cold_N: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label_Nt)


def gather(data: Any, split: Literal["train", "val", "test"]) -> TableArrays:
    """Return all rows of a split, in the table's order.

    Args:
        data: data module of ``TableBatch`` that is set up. Training rows come from its ``train_eval_dataloader``, or
            from ``train_dataloader`` if there is none.
        split: the split.

    Raises:
        ValueError: the split has no rows.
    """
    name = "train_eval" if split == "train" and hasattr(data, "train_eval_dataloader") else split
    return join(getattr(data, f"{name}_dataloader")(), data.features, split)


def join(batches: Iterable[TableBatch], features: Features, split: str = "given") -> TableArrays:
    """Return all rows of ``batches``, ordered by their number in the table.

    Raises:
        ValueError: there are none.
    """
    given = list(batches)
    if not sum(map(len, given)):
        raise ValueError(f"the {split} split has no rows")
    order = np.argsort(torch.cat([batch.index_B for batch in given]).cpu().numpy(), kind="stable")

    def whole(name: str, dim: int = 0) -> Any:
        parts = [getattr(batch, name) for batch in given]
        return None if parts[0] is None else torch.cat(parts, dim).cpu().numpy().swapaxes(0, dim)[order]

    def several(place: int) -> MultiValued:
        parts = [MultiValued.of(batch.lists[place]) for batch in given]
        lengths_N = np.concatenate([part.lengths_N for part in parts])
        starts_N = np.cumsum(lengths_N) - lengths_N
        lengths_N, starts_N = lengths_N[order], starts_N[order]
        before_N = np.cumsum(lengths_N) - lengths_N
        position = np.repeat(starts_N - before_N, lengths_N) + np.arange(lengths_N.sum())
        return MultiValued(np.concatenate([part.values for part in parts])[position], lengths_N)

    dense_NC = whole("dense_BC")
    return TableArrays(
        features=features,
        dense_NC=np.where(np.isfinite(dense_NC), dense_NC, np.float32(np.nan)),
        ids_NF=np.ascontiguousarray(whole("single_FB", 1)),
        multi={feature.name: several(place) for place, feature in enumerate(features.several)},
        label_Nt=whole("label_Bt"),
        domain_N=whole("domain_B"),
        group_N=whole("group_B"),
        weight_Nt=whole("weight_Bt"),
        vector_NV=whole("vector_BV"),
        cold_N=whole("cold_B"),
    )
