"""Rows of an encoded table as a map-style dataset that is read by whole batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from apps.data.array_files import ArrayFiles, ArraysInMemory, ArrayWriter
from apps.recsys.encoding.features import Features
from apps.recsys.tables.rows.batch import Ragged, TableBatch


class TableRows(Dataset[TableBatch]):
    """Some rows of an encoded table.

    ``rows[i]`` is a batch of one row and ``rows[:]`` one of all of them; ``__getitems__`` takes positions in any order.
    A batch costs one indexed read for each kind of column, not one for each row. Nothing is random.

    Args:
        columns: arrays of the table.
        features: description of its columns.
        index: int64 (n,), the table's row of each position.
        moved: names of columns that ``batch`` can take from other rows.
        domain_moves: whether it takes the domain from them too.

    Attributes:
        kept: arrow arrays of further columns of all rows of the table, which batches carry along; None: there are none.
    """

    def __init__(
        self,
        columns: ArrayFiles | ArraysInMemory | ArrayWriter,
        features: Features,
        index: Tensor,
        moved: Collection[str] = (),
        domain_moves: bool = False,
    ) -> None:
        self.columns, self.features, self.index = columns, features, index
        self.moved, self.domain_moves = frozenset(moved), domain_moves
        self._lists = arrays_of_lists(features)
        self.kept: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int | slice) -> TableBatch:
        if isinstance(position, slice):
            return self.batch(self.index[position])
        return self.batch(self.index[position].reshape(1))

    def __getitems__(self, positions: Sequence[int] | Tensor) -> TableBatch:
        return self.batch(self.index[torch.as_tensor(positions, dtype=torch.int64)])

    def batch(self, index_B: Tensor, source_B: Tensor | None = None) -> TableBatch:
        """Return rows of the table.

        Args:
            index_B: int64 (B,), the rows.
            source_B: int64 (B,), the rows from which the columns of ``moved`` come; None: the same.
        """
        columns = self.columns
        domain_B = index_B if source_B is None or not self.domain_moves else source_B
        dense_BC = columns["dense"].index_select(0, index_B)
        vector_BV = columns["vectors"].index_select(0, index_B) if "vectors" in columns else None
        if source_B is not None:
            for own, name in ((dense_BC, "dense"), (vector_BV, "vectors")):
                if own is not None and (places := self._moved_places[name]):
                    own[:, places] = columns[name].index_select(0, source_B)[:, places]
        return TableBatch(
            dense_BC=dense_BC,
            single_FB=self._single(index_B, source_B),
            label_Bt=columns["label"].index_select(0, index_B),
            index_B=index_B,
            domain_B=columns["domain"].index_select(0, domain_B).long() if "domain" in columns else None,
            group_B=columns["group"].index_select(0, index_B) if "group" in columns else None,
            weight_Bt=columns["weight"].index_select(0, index_B) if "weight" in columns else None,
            vector_BV=vector_BV,
            lists=tuple(
                ragged(columns, array, index_B if source_B is None or name not in self.moved else source_B)
                for name, array in self._lists.items()
            ),
            cold_B=columns["cold"].index_select(0, index_B) if "cold" in columns else None,
            kept=self.kept and {name: values.take(index_B.numpy()) for name, values in self.kept.items()},
        )

    @cached_property
    def _moved_places(self) -> dict[str, list[int]]:
        """The columns of ``moved`` in each matrix of the table, by the matrix."""
        features = self.features
        in_vectors = [f.name for f in features.vectors for _ in range(f.size)]
        single = [f.name for f in features.single]
        names = {"dense": [f.name for f in features.continuous], "vectors": in_vectors, "categorical": single}
        return {of: [place for place, name in enumerate(own) if name in self.moved] for of, own in names.items()}

    def _single(self, index_B: Tensor, source_B: Tensor | None) -> Tensor:
        """Return the columns of one value, (F, B); int32, as in the files, is half the bytes to a device."""
        whole = self.columns["categorical"] if "categorical" in self.columns else torch.empty(len(index_B), 0)
        single_FB = torch.empty(whole.shape[1], len(index_B), dtype=torch.int32)
        if len(single_FB):
            single_FB.copy_(whole.index_select(0, index_B).t())
        if source_B is not None and (places := self._moved_places["categorical"]):
            single_FB[places] = whole.index_select(0, source_B)[:, places].t()
        return single_FB


def arrays_of_lists(features: Features) -> dict[str, str]:
    """Return the name of the arrays of each column with any number of values, by column."""
    multi = [f.name for f in features.categorical if f.multi_valued]
    arrays = {name: f"multi{i}" for i, name in enumerate(multi)}
    return arrays | {f.name: f"sequence{i}" for i, f in enumerate(features.sequences)}


def ragged(columns: ArrayFiles | ArraysInMemory | ArrayWriter, name: str, index_B: Tensor) -> Ragged:
    """Return the values of some rows of a table, int32."""
    offsets = columns[f"{name}_offsets"]
    starts = offsets.index_select(0, index_B)
    length_B = offsets.index_select(0, index_B + 1) - starts
    ends = length_B.cumsum(0)
    shift = torch.repeat_interleave(starts - ends + length_B, length_B)
    position = shift.add_(torch.arange(len(shift)))
    return Ragged(columns[f"{name}_values"].index_select(0, position), length_B.int())
