"""A batch of users, each with an item that the user took, as the data serve it and the two towers take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from apps.recsys.tables.rows.batch import Batch, TableBatch


@dataclass(frozen=True)
class PairBatch(Batch):
    """B pairs of a user and an item, with further items as negatives in training; or B users only.

    All fields of items are None for users only.

    Attributes:
        user: the users' columns.
        index_B: int64 (B,), the row's number in the table.
        item: the columns of U different items: the pairs' items, and further negatives.
        item_B: int64 (B,), the number of each pair's item in the catalog, from 1; 0: the catalog lacks it.
        own_B: int64 (B,), the place of each pair's item among the U; of no meaning where the catalog lacks it.
        count_U: int64 (U,), the pairs and further negatives that have each item.
        log_q_U: float32 (U,), log of the probability with which a place of a training batch holds each item.
        seen_BH: int64 (B, H), the items that the user had in training, padded with 0; None: all items may be retrieved.
    """

    user: TableBatch
    index_B: Tensor
    item: TableBatch | None = None
    item_B: Tensor | None = None
    own_B: Tensor | None = None
    count_U: Tensor | None = None
    log_q_U: Tensor | None = None
    seen_BH: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index_B)
