"""The columns of an encoded table, row by row: whether two rows have one value, and that value."""

from __future__ import annotations

import torch
from torch import Tensor

from apps.data.array_files import ArrayFiles
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.tables.rows.arrays import MultiValued
from apps.recsys.tables.rows.rows import arrays_of_lists, ragged

_PIECE = 2**18
"""Rows whose values are compared at a time."""


class ItemColumns:
    """The columns that may belong to an item: all but sequences, and the domain.

    Args:
        columns: arrays of the table.
        encoding: its encoding.

    Attributes:
        single: names of the categorical columns of one value.
        names: names of all columns.
    """

    def __init__(self, columns: ArrayFiles, encoding: Encoding) -> None:
        self.columns, self.encoding, features = columns, encoding, encoding.features
        self.single = [f.name for f in features.single]
        multi = {f.name for f in features.categorical if f.multi_valued}
        self._several = {name: array for name, array in arrays_of_lists(features).items() if name in multi}
        self._numbers = [f.name for f in features.continuous]
        # The array and the places in it of each column that has them; a domain may be a categorical column too.
        self._places = {} if encoding.domain is None else {encoding.domain: ("domain", slice(0, 1))}
        for array, names in (("categorical", self.single), ("dense", self._numbers)):
            self._places |= {name: (array, slice(place, place + 1)) for place, name in enumerate(names)}
        end = 0
        for vector in features.vectors:
            self._places[vector.name], end = ("vectors", slice(end, end + vector.size)), end + vector.size
        self.names = [*self._places, *self._several]

    def read(self, name: str, index_N: Tensor) -> Tensor:
        """Return the values of a column that is not multi-valued, (N, 1), or (N, size) of vectors."""
        array, places = self._places[name]
        whole = self.columns[array]
        return (whole[:, None] if whole.ndim == 1 else whole)[:, places].index_select(0, index_N)

    def same(self, name: str, a_N: Tensor, b_N: Tensor) -> Tensor:
        """Tell whether two rows of the table have the same value in a column, bool (N,). Missing is a value too."""
        pieces = zip(a_N.split(_PIECE), b_N.split(_PIECE), strict=True)
        return torch.cat([self._same(name, a, b) for a, b in pieces])

    def _same(self, name: str, a_N: Tensor, b_N: Tensor) -> Tensor:
        if name in self._several:  # in any order
            own = ragged(self.columns, self._several[name], torch.cat((a_N, b_N)))
            a, b = torch.from_numpy(MultiValued.of(own).sets_N()).split(len(a_N))
            return a == b
        a_NV, b_NV = self.read(name, a_N), self.read(name, b_N)
        return ((a_NV == b_NV) | (a_NV.isnan() & b_NV.isnan())).all(dim=1)

    def text(self, name: str, row: int) -> str:
        """Return a column's value in a row of the table, for a message."""
        index_1 = torch.tensor([row])
        if name in self._several:
            values_N = ragged(self.columns, self._several[name], index_1).values_N
            return f"[{', '.join(self._word(name, value) for value in values_N.tolist())}]"
        values = self.read(name, index_1)[0]
        if len(values) > 1:
            return f"the vector of {values[0]:.4g}, {values[1]:.4g}, ..."
        number = values.item()
        if name in self.single:
            return self._word(name, int(number))
        if name in self._numbers:
            return "no value" if number != number else f"{number:.7g}"
        assert self.encoding.domains is not None
        return repr(self.encoding.domains.texts()[int(number)])

    def _word(self, name: str, value: int) -> str:
        known = self.encoding.vocabularies.get(name)
        if known is None:
            return str(value)
        return repr(known.texts()[value - 1]) if value else "no known value"
