"""Rows of an encoded table as a map-style dataset that is read by whole batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from apps.data.array_files import ArrayFiles, ArraysInMemory
from apps.recsys.encoding.features import Features
from apps.recsys.tables.batch import TableBatch


class TableRows(Dataset[TableBatch]):
    """Some rows of an encoded table.

    ``rows[i]`` is a batch of one row and ``rows[:]`` one of all of them; ``__getitems__`` takes positions in any order.
    A batch costs one indexed read for each kind of column, not one for each row. Nothing is drawn at random.

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
        columns: ArrayFiles | ArraysInMemory,
        features: Features,
        index: Tensor,
        moved: Collection[str] = (),
        domain_moves: bool = False,
    ) -> None:
        self.columns, self.features, self.index = columns, features, index
        self.moved, self.domain_moves = frozenset(moved), domain_moves
        self._single = [f.name for f in features.categorical if not f.multi_valued]
        self._multi = [f.name for f in features.categorical if f.multi_valued]
        self._keys = [*self._single, *self._multi]
        self._sequences = [f.name for f in features.sequences]
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
            sparse=self._sparse(index_B, source_B) if self._keys else None,
            label_Bt=columns["label"].index_select(0, index_B),
            index_B=index_B,
            domain_B=columns["domain"].index_select(0, domain_B).long() if "domain" in columns else None,
            group_B=columns["group"].index_select(0, index_B) if "group" in columns else None,
            weight_Bt=columns["weight"].index_select(0, index_B) if "weight" in columns else None,
            vector_BV=vector_BV,
            sequences=self._sequences_of(index_B) if self._sequences else None,
            cold_B=columns["cold"].index_select(0, index_B) if "cold" in columns else None,
            kept=self.kept and {name: values.take(index_B.numpy()) for name, values in self.kept.items()},
        )

    @cached_property
    def _moved_places(self) -> dict[str, list[int]]:
        """The columns of ``moved`` in each matrix of the table, by the matrix."""
        features = self.features
        in_vectors = [f.name for f in features.vectors for _ in range(f.size)]
        names = {"dense": [f.name for f in features.continuous], "vectors": in_vectors, "categorical": self._single}
        return {of: [place for place, name in enumerate(own) if name in self.moved] for of, own in names.items()}

    def _sparse(self, index_B: Tensor, source_B: Tensor | None) -> KeyedJaggedTensor:
        B, F = len(index_B), len(self._single)
        # Feature by feature, as a KeyedJaggedTensor has it; int32, as in the files, is half the bytes to a device.
        single = torch.empty(F, B, dtype=torch.int32)
        if F:
            single.copy_(self.columns["categorical"].index_select(0, index_B).t())
        if source_B is not None and (places := self._moved_places["categorical"]):
            single[places] = self.columns["categorical"].index_select(0, source_B)[:, places].t()
        values, lengths, length_per_key = [single.view(-1)], [torch.ones(F * B, dtype=torch.int32)], [B] * F
        for i, name in enumerate(self._multi):
            own_B = source_B if source_B is not None and name in self.moved else index_B
            of_column, length_B = ragged(self.columns, f"multi{i}", own_B)
            values.append(of_column)
            lengths.append(length_B)
            length_per_key.append(len(of_column))
        return KeyedJaggedTensor(
            self._keys, torch.cat(values), lengths=torch.cat(lengths), stride=B, length_per_key=length_per_key
        )

    def _sequences_of(self, index_B: Tensor) -> KeyedJaggedTensor:
        columns = [ragged(self.columns, f"sequence{i}", index_B) for i in range(len(self._sequences))]
        values, lengths = (torch.cat(parts) for parts in zip(*columns, strict=True))
        return KeyedJaggedTensor(
            self._sequences,
            values,
            lengths=lengths,
            stride=len(index_B),
            length_per_key=[len(of_column) for of_column, _ in columns],
        )


def ragged(columns: ArrayFiles | ArraysInMemory, name: str, index_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of some rows, one row after the other, and how many each row has, int32."""
    offsets = columns[f"{name}_offsets"]
    starts = offsets.index_select(0, index_B)
    length_B = offsets.index_select(0, index_B + 1) - starts
    ends = length_B.cumsum(0)
    shift = torch.repeat_interleave(starts - ends + length_B, length_B)
    position = shift.add_(torch.arange(len(shift)))
    return columns[f"{name}_values"].index_select(0, position), length_B.int()
