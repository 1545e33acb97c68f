"""A batch of table rows in plain tensors, as the data serve it and the models take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class Batch:
    """A batch whose tensors, including its parts' tensors, can be moved; a base of dataclasses with ``index_B``."""

    index_B: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch on ``device``, itself where it is there already.

        Lightning names no ``non_blocking``, which CUDA can always do.
        """
        if self.index_B.device == torch.device(device):
            return self
        return _each(self, "to", device, non_blocking=non_blocking or torch.device(device).type == "cuda")

    def pin_memory(self) -> Self:
        return _each(self, "pin_memory")


@dataclass(frozen=True)
class Ragged:
    """A column of any number of values per row: the values of all rows, one row after the other.

    Attributes:
        values_N: row numbers of the column's table.
        length_B: number of values of each row.
        padded_N: int64 (N,), the row of the batch that has each value, where some are padding, whose row is B. None: no
            padding.
    """

    values_N: Tensor
    length_B: Tensor
    padded_N: Tensor | None = None

    @classmethod
    def of_padded(cls, rows_BL: Tensor) -> Ragged:
        """Return the values of (B, L), in which -1 is padding; it becomes row 0 of no row of the batch."""
        B, is_there_BL = rows_BL.shape[0], rows_BL >= 0
        own_BL = torch.where(is_there_BL, torch.arange(B)[:, None], B)
        return cls(rows_BL.clamp_min(0).flatten(), is_there_BL.sum(1), own_BL.flatten())

    @property
    def row_N(self) -> Tensor:
        """The row of the batch that has each value, int64 (N,); B for padding."""
        if self.padded_N is not None:
            return self.padded_N
        row_B = torch.arange(len(self.length_B), device=self.values_N.device)
        return row_B.repeat_interleave(self.length_B, output_size=len(self.values_N))


@dataclass(frozen=True)
class TableBatch(Batch):
    """B rows of a table.

    Attributes:
        dense_BC: float32 (B, C), the continuous columns as they are in the table; NaN if missing.
        single_FB: int32 (F, B), row numbers of the tables of the categorical columns of one value, in their
            order.
        label_Bt: float32 (B, t), the labels: 0 or 1 of a binary task, the number of one of "regression" or "count", the
            place of a level or a class; NaN if an example has no label for the task.
        index_B: int64 (B,), the row's number in the table.
        domain_B: int64 (B,), the domain; None if there is one.
        group_B: int64 (B,), the user, for metrics by user; None if none is named.
        weight_Bt: float32 (B, t), weights of the labels in the losses; None: 1.
        vector_BV: float32 (B, V), the columns of vectors side by side; NaN if one is missing. None: there are none.
        lists: the multi-valued columns, then the sequences, the oldest value first and without row 0, in the order of
            ``Features.several``.
        kept: arrow arrays (B,) of the columns that predictions repeat, by name; None: there are none.
        cold_B: uint8 (B,), the sum of ``COLD_USER`` where the user has no row in training, and ``COLD_ITEM`` where the
            item has none (``apps.recsys.binary_metrics``). None: all have some, or are not named.
        offset_Bt: float32 (B, t), added to the logits in the losses of binary tasks, since negative rows are left out
            (``apps.recsys.tables.negatives.sampled_rows``) or sampled (``sampled_items``); metrics add it too. None:
            nothing.
    """

    dense_BC: Tensor
    single_FB: Tensor
    label_Bt: Tensor
    index_B: Tensor
    domain_B: Tensor | None = None
    group_B: Tensor | None = None
    weight_Bt: Tensor | None = None
    vector_BV: Tensor | None = None
    lists: tuple[Ragged, ...] = ()
    kept: Mapping[str, Any] | None = None
    cold_B: Tensor | None = None
    offset_Bt: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label_Bt)


def _each(value: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Return a value with a method of its tensors called; what holds none is returned as it is."""
    if isinstance(value, Tensor):
        return getattr(value, method)(*args, **kwargs)
    if isinstance(value, tuple):
        return tuple(_each(part, method, *args, **kwargs) for part in value)
    if isinstance(value, (Batch, Ragged)):
        own: Any = value
        return replace(own, **{f.name: _each(getattr(own, f.name), method, *args, **kwargs) for f in fields(own)})
    return value
