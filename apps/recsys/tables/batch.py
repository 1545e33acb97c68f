"""A batch of table rows, as the data serve it and the models take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class TableBatch:
    """B rows of a table.

    Attributes:
        dense_BC: float32 (B, C), the continuous columns as they are in the table; NaN where missing.
        sparse: row numbers of the categorical columns' tables, by column; None where there are none.
        label_Bt: float32 (B, t), the labels: 0 or 1 of a binary task, the number of one of "regression" or "count", the
            place of a level or a class; NaN where an example has no label for the task.
        index_B: int64 (B,), the row's number in the table.
        domain_B: int64 (B,), the domain; None where there is one.
        group_B: int64 (B,), the user, for metrics by user; None where none is named.
        weight_Bt: float32 (B, t), weights of the labels in the losses; None: 1.
        vector_BV: float32 (B, V), the columns of vectors side by side; NaN where one is missing. None: there are none.
        sequences: row numbers of the columns of sequences, the oldest first, without row 0. None: there are none.
        kept: arrow arrays (B,) of the columns that predictions repeat, by name; None: there are none.
        cold_B: uint8 (B,), the sum of ``COLD_USER`` where the user has no row in training, and ``COLD_ITEM`` where the
            item has none (``apps.recsys.binary_metrics``). None: all have some, or are not named.
        offset_Bt: float32 (B, t), what the losses of binary tasks add to their logits, since negative rows are left out
            (``apps.recsys.tables.negatives``) or drawn (``drawn_items``); metrics add it too. None: nothing.
    """

    dense_BC: Tensor
    sparse: KeyedJaggedTensor | None
    label_Bt: Tensor
    index_B: Tensor
    domain_B: Tensor | None = None
    group_B: Tensor | None = None
    weight_Bt: Tensor | None = None
    vector_BV: Tensor | None = None
    sequences: KeyedJaggedTensor | None = None
    kept: Mapping[str, Any] | None = None
    cold_B: Tensor | None = None
    offset_Bt: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label_Bt)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TableBatch:
        """Return the batch on ``device``, itself where it is there already.

        Lightning names no ``non_blocking``, which CUDA can always do.
        """
        if self.dense_BC.device == torch.device(device):
            return self  # a jagged tensor would be built anew
        return self._each("to", device, non_blocking=non_blocking or torch.device(device).type == "cuda")

    def pin_memory(self) -> TableBatch:
        return self._each("pin_memory")

    def _each(self, method: str, *args: Any, **kwargs: Any) -> TableBatch:
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kept"}
        return replace(self, **{k: getattr(v, method)(*args, **kwargs) for k, v in parts.items() if v is not None})
