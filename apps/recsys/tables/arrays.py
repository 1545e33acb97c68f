"""A whole split of a table as numpy arrays, for models that are no networks and for checks of a whole split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from apps.recsys.encoding.features import Features
from apps.recsys.tables.batch import TableBatch


@dataclass(frozen=True)
class MultiValued:
    """A column with any number of values a row, row by row.

    Attributes:
        values: int64, the values of all rows.
        lengths_N: int64 (N,), values of each row.
    """

    values: np.ndarray
    lengths_N: np.ndarray

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
        dense_NC: float32 (N, C), the continuous columns; NaN where missing or infinite.
        ids_NF: int64 (N, F), row numbers of the categorical columns of one value, in the order of the features.
        multi: the other categorical columns and the sequences, by name.
        label_Nt: float32 (N, t), as ``TableBatch`` has them; NaN for no label.
        domain_N: int64 (N,), the domain; None where there is one.
        group_N: int64 (N,), the user; None where none is named.
        weight_Nt: float32 (N, t), weights of the labels; None: 1.
        vector_NV: float32 (N, V), the columns of vectors side by side; None where there are none.
        cold_N: uint8 (N,), flags of what has no row in training; None where all have some.
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
            from ``train_dataloader`` where there is none.
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
    single = [f.name for f in features.categorical if not f.multi_valued]
    several = [f.name for f in features.several]
    columns: dict[str, list[np.ndarray]] = {}

    def add(column: str, value: Any) -> None:
        columns.setdefault(column, []).append(value.cpu().numpy())

    for batch in batches:
        add("dense", batch.dense_BC)
        add("label", batch.label_Bt)
        add("index", batch.index_B)
        for optional in ("domain_B", "group_B", "weight_Bt", "vector_BV", "cold_B"):
            if getattr(batch, optional) is not None:
                add(optional, getattr(batch, optional))
        by_key = {} if batch.sparse is None else batch.sparse.to_dict()
        by_key |= {} if batch.sequences is None else batch.sequences.to_dict()
        for column in single:
            add(f"ids {column}", by_key[column].values())
        for column in several:
            add(f"values {column}", by_key[column].values())
            add(f"lengths {column}", by_key[column].lengths())
    if "label" not in columns or not sum(map(len, columns["label"])):
        raise ValueError(f"the {split} split has no rows")
    whole = {column: np.concatenate(parts) for column, parts in columns.items()}
    order = np.argsort(whole["index"], kind="stable")
    ids = [whole[f"ids {column}"][order] for column in single]
    return TableArrays(
        features=features,
        dense_NC=np.where(np.isfinite(whole["dense"]), whole["dense"], np.float32(np.nan))[order],
        ids_NF=np.stack(ids, 1) if ids else np.zeros((len(order), 0), dtype=np.int64),
        multi={c: _reordered(whole[f"values {c}"], whole[f"lengths {c}"].astype(np.int64), order) for c in several},
        label_Nt=whole["label"][order],
        domain_N=whole["domain_B"][order] if "domain_B" in whole else None,
        group_N=whole["group_B"][order] if "group_B" in whole else None,
        weight_Nt=whole["weight_Bt"][order] if "weight_Bt" in whole else None,
        vector_NV=whole["vector_BV"][order] if "vector_BV" in whole else None,
        cold_N=whole["cold_B"][order] if "cold_B" in whole else None,
    )


def _reordered(values: np.ndarray, lengths_N: np.ndarray, order: np.ndarray) -> MultiValued:
    starts_N = np.cumsum(lengths_N) - lengths_N
    lengths_N, starts_N = lengths_N[order], starts_N[order]
    before_N = np.cumsum(lengths_N) - lengths_N
    position = np.repeat(starts_N - before_N, lengths_N) + np.arange(lengths_N.sum())
    return MultiValued(values[position], lengths_N)
