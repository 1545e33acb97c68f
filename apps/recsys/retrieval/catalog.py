"""The catalog: all items of the training rows with their columns, how often they are taken, and by whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apps.data.array_files import ArraysInMemory
from apps.recsys.encoding.features import Features
from apps.recsys.retrieval.columns import arrays_of
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.rows.rows import TableRows


@dataclass(frozen=True)
class Seen:
    """The items that each user had in training.

    Attributes:
        offsets: int64 (U + 1,), the bounds of the items of each row of the users' table.
        items: int32, the items' numbers, ascending for each user.
    """

    offsets: Tensor
    items: Tensor

    @classmethod
    def of(cls, user_N: Tensor, item_N: Tensor, num_users: int) -> Seen:
        """Return the different items of each user in N rows; users and items of the row 0 are unknown, and left out.

        Args:
            user_N, item_N: int64 (N,), rows of the users' and the items' tables.
            num_users: rows of the users' table.
        """
        known = (user_N > 0) & (item_N > 0)
        width = int(item_N.max()) + 1 if len(item_N) else 1
        pair = torch.unique(user_N[known] * width + item_N[known])
        ends = torch.bincount(pair // width, minlength=num_users).cumsum(0)
        return cls(torch.cat((ends.new_zeros(1), ends)), (pair % width).int())

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return the user and the item of each, int64 (N,)."""
        return torch.arange(len(self.offsets) - 1).repeat_interleave(self.offsets.diff()), self.items.long()

    def by_user(self, user_B: Tensor) -> Tensor:
        """Return the items of each user as int64 (B, H), padded with 0 to the longest, at least one column."""
        begin_B = self.offsets[user_B]
        length_B = self.offsets[user_B + 1] - begin_B
        place_H = torch.arange(max(int(length_B.max()) if len(length_B) else 0, 1))
        inside_BH = place_H < length_B[:, None]
        if not len(self.items):
            return torch.zeros(inside_BH.shape, dtype=torch.int64)
        # places past the end of the array are read at its end, and masked
        at_BH = (begin_B[:, None] + place_H).clamp_(max=len(self.items) - 1)
        return self.items[at_BH].long() * inside_BH


@dataclass(frozen=True)
class Catalog:
    """I items, numbered from 1 as the rows of ``item_column``'s table are.

    Attributes:
        arrays: the columns of the items' tower, one row per item, as ``TableRows`` reads them.
        count_I: int64 (I,), how often each item is the one that a user took, in training.
        seen: the items that each user had in training; None if they may be retrieved again.
    """

    arrays: Mapping[str, Tensor]
    count_I: Tensor
    seen: Seen | None = None

    def __len__(self) -> int:
        return len(self.count_I)

    def rows(self, features: Features) -> TableRows:
        """Return the items' rows, in their order, given the description of their columns."""
        arrays = ArraysInMemory()
        for name, values in self.arrays.items():
            arrays.save(name, values.numpy())
        return TableRows(arrays, features, torch.arange(len(self)))

    def batches(self, features: Features, size: int = 8192) -> Iterator[TableBatch]:
        """Yield all items, ``size`` at a time."""
        rows = self.rows(features)
        return (rows[begin : begin + size] for begin in range(0, len(self), size))

    def after(self, earlier: Catalog, has_I: Tensor, features: Features) -> Catalog:
        """Return this catalog with the columns of an earlier one, whose items come first, for the items that it lacks.

        What users had is that of both.

        Args:
            earlier: the catalog of a checkpoint with which a training began.
            has_I: whether this one has an item's columns.
            features: description of the columns.

        Raises:
            ValueError: the two have other columns.
        """
        here, there = ({name: a.shape[1:] for name, a in c.arrays.items()} for c in (self, earlier))
        if here != there:
            raise ValueError("item_columns are not those of the checkpoint, whose catalog has others")
        arrays = {}
        for name, old in earlier.arrays.items():
            new = self.arrays[name]
            arrays[name] = torch.cat((old, new[1:] + old[-1] if name.endswith("_offsets") else new))
        place_I = torch.arange(len(self)) + has_I * len(earlier)
        rows = Catalog(arrays, torch.cat((earlier.count_I, self.count_I))).rows(features)
        seen = self.seen
        if seen is not None and earlier.seen is not None:
            user_N, item_N = map(torch.cat, zip(seen.pairs(), earlier.seen.pairs(), strict=True))
            seen = Seen.of(user_N, item_N, len(seen.offsets) - 1)
        return Catalog(arrays_of(rows.__getitems__(place_I), features), self.count_I, seen)

    def state(self) -> dict[str, Any]:
        """Return the catalog as plain values and tensors, for a checkpoint."""
        seen = None if self.seen is None else {"offsets": self.seen.offsets, "items": self.seen.items}
        return {"arrays": dict(self.arrays), "count": self.count_I, "seen": seen}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Catalog:
        seen = state["seen"]
        return cls(state["arrays"], state["count"], None if seen is None else Seen(**seen))


def last_rows(item_N: Tensor, num_items: int) -> Tensor:
    """Return the last place of each item 1 to I in ``item_N``, int64 (I,)."""
    last_V = torch.full((num_items + 1,), -1).scatter_reduce(0, item_N, torch.arange(len(item_N)), "amax")
    return last_V[1:]
