"""A table's columns in plain tensors, for graphs that other runtimes take: TorchRec's jagged tensors stay here.

The inputs by name, each only where the table has such columns:

- "dense": float32 (B, C), the continuous columns, NaN where missing;
- "categorical": int64 (B, F), the row of each column with one value;
- "list_0", "list_1", ...: int64 (B, L), the rows of each multi-valued column and then of each sequence, in their order,
  with -1 behind them up to the longest;
- "vectors": float32 (B, V), the columns of vectors side by side, NaN where one is missing;
- "domain": int64 (B,).

A row that a table lacks counts as row 0, the row of values that training lacked: no graph reads another column's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from apps.recsys.encoding.features import Features
from apps.recsys.tables.batch import TableBatch
from apps.recsys.tables.history import HistoryArch
from apps.recsys.tables.model import TableColumns

EMPTY = -1
"""What stands behind the rows of a list."""


def plain_inputs(batch: TableBatch, features: Features) -> dict[str, Tensor]:
    """Return the tensors of a batch by name."""
    inputs: dict[str, Tensor] = {}
    if features.continuous:
        inputs["dense"] = batch.dense_BC
    single = [f.name for f in features.categorical if not f.multi_valued]
    multi = [f.name for f in features.categorical if f.multi_valued]
    if single and batch.sparse is not None:
        inputs["categorical"] = torch.stack([batch.sparse[name].values() for name in single], dim=1).long()
    jagged = ((batch.sparse, multi), (batch.sequences, [f.name for f in features.sequences]))
    lists = [padded(of, name) for of, names in jagged if of is not None for name in names]
    inputs |= {f"list_{i}": rows_BL for i, rows_BL in enumerate(lists)}
    if features.vectors and batch.vector_BV is not None:
        inputs["vectors"] = batch.vector_BV
    if features.num_domains and batch.domain_B is not None:
        inputs["domain"] = batch.domain_B
    return inputs


def padded(jagged: KeyedJaggedTensor, column: str) -> Tensor:
    """Return the rows of a column as int64 (B, L), with ``EMPTY`` behind them; L is at least 1."""
    own = jagged[column]
    lists = own.values().long().split(own.lengths().tolist())
    rows_BL = pad_sequence(list(lists), batch_first=True, padding_value=EMPTY)
    return rows_BL if rows_BL.shape[1] else rows_BL.new_full((len(lists), 1), EMPTY)


def dynamic_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Return the axes of any length of inputs: the batch, and the length of each list."""
    return {
        name: {0: "batch", 1: f"length_{name.removeprefix('list_')}"} if name.startswith("list_") else {0: "batch"}
        for name in inputs
    }


def example_inputs(features: Features, batch_size: int = 3, length: int = 4) -> dict[str, Tensor]:
    """Return drawn inputs of a table, with missing numbers, empty lists and rows that a table lacks."""
    draw = torch.Generator().manual_seed(0)
    B, inputs = batch_size, dict[str, Tensor]()
    if features.continuous:
        mean_C = torch.tensor([f.mean for f in features.continuous])
        std_C = torch.tensor([f.std for f in features.continuous])
        inputs["dense"] = mean_C + std_C * torch.randn(B, len(features.continuous), generator=draw)
        inputs["dense"][0, 0] = torch.nan
    single = [f.num_rows for f in features.categorical if not f.multi_valued]
    if single:
        columns = [torch.randint(0, rows, (B,), generator=draw) for rows in single]
        inputs["categorical"] = torch.stack(columns, dim=1)
        inputs["categorical"][0, 0] = single[0]
    for i, feature in enumerate(features.several):
        rows_BL = torch.randint(1, max(feature.num_rows, 2), (B, length), generator=draw)
        inputs[f"list_{i}"] = rows_BL.masked_fill(torch.arange(length) >= torch.arange(B)[:, None], EMPTY)
    if features.vectors:
        inputs["vectors"] = torch.randn(B, sum(f.size for f in features.vectors), generator=draw)
        inputs["vectors"][0] = torch.nan
    if features.num_domains:
        inputs["domain"] = torch.randint(0, features.num_domains, (B,), generator=draw)
    return inputs


class PlainColumns(nn.Module):
    """What ``TableColumns.read`` returns, from plain tensors and by the same weights.

    Args:
        columns: the columns, with any kind of embeddings.
        features: their description.
    """

    def __init__(self, columns: TableColumns, features: Features) -> None:
        super().__init__()
        sparse = columns.sparse
        self.dense, self.vectors, self.copies = columns.dense, columns.vectors, sparse.copies
        self.sums = sparse.config.pooling == "sum"
        self.multi_valued = [f.multi_valued for f in features.categorical]
        self.averaged = [name in columns.averaged for name in columns.sequence_names]
        self.is_joined = sparse.collection is None
        # Buffers, so that a graph has each table once.
        weights = sparse.tables()
        if self.is_joined and sparse.weight is not None:
            self.register_buffer("weight", sparse.weight.detach())
            starts, begin = {}, 0
            for name, weight in weights.items():
                starts[name], begin = begin, begin + len(weight)
            self.starts = starts
        else:
            for i, weight in enumerate(weights.values()):
                self.register_buffer(f"weight_{i}", weight)
        self.tables = {name: (i, len(weight)) for i, (name, weight) in enumerate(weights.items())}
        self.column_tables = [f.name for f in features.categorical]
        self.bin_tables = [f.name for f in columns.dense.bin_features]
        self.sequence_tables = [str(s.items or s.name) for s in features.sequences]
        self.order_H = sparse._order_H.tolist() if sparse.copies > 1 else []
        self.history = None if columns.history is None else PlainHistory(columns.history)

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Return the numbers of the rows, and their embeddings, vectors and histories side by side.

        Args:
            inputs: as the module's head says.
        """
        dense_BC = inputs.get("dense")
        parts = self._columns(inputs)
        if self.bin_tables and dense_BC is not None:
            bins_CB = self.dense.bins(dense_BC)
            assert bins_CB is not None
            parts.append(self._single(self.bin_tables, bins_CB.t()))
        first = sum(self.multi_valued)
        lists = [inputs[f"list_{first + i}"] for i in range(len(self.averaged))]
        histories = list(zip(self.sequence_tables, lists, self.averaged, strict=True))
        parts += [self._pooled(table, rows_BL, False) for table, rows_BL, averaged in histories if averaged]
        embedded = [self._by_copy(torch.cat(parts, dim=1))] if parts else []
        if self.vectors is not None:
            embedded.append(self.vectors(inputs["vectors"]))
        if self.history is not None:
            attended = [(self._rows(table, rows_BL), rows_BL >= 0) for table, rows_BL, own in histories if not own]
            embedded.append(self.history(attended, embedded[0]))
        sparse = torch.cat(embedded, dim=-1) if embedded else None
        return None if dense_BC is None else self.dense(dense_BC), sparse

    def _columns(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the embeddings of the categorical columns, in their order; columns of one value at a time."""
        parts: list[Tensor] = []
        single, multi, begin = 0, 0, 0
        for end, several in enumerate([*self.multi_valued, True]):
            if not several:
                continue
            if end > begin:  # a run of columns of one value
                tables, width = self.column_tables[begin:end], end - begin
                parts.append(self._single(tables, inputs["categorical"][:, single : single + width]))
                single += width
            if end < len(self.multi_valued):
                parts.append(self._pooled(self.column_tables[end], inputs[f"list_{multi}"], self.sums))
                multi += 1
            begin = end + 1
        return parts

    def _rows(self, table: str, rows: Tensor) -> Tensor:
        """Return the rows of a table, (..., copies * width)."""
        number, count = self.tables[table]
        rows = torch.where((rows < 0) | (rows >= count), 0, rows)
        if self.is_joined:
            return nn.functional.embedding(rows + self.starts[table], self.weight)  # type: ignore[arg-type]
        return nn.functional.embedding(rows, getattr(self, f"weight_{number}"))

    def _single(self, tables: Sequence[str], rows_BF: Tensor) -> Tensor:
        """Return one row of each table side by side, (B, sum of the widths)."""
        if not self.is_joined:
            return torch.cat([self._rows(table, rows_BF[:, f]) for f, table in enumerate(tables)], dim=1)
        count_F = torch.tensor([self.tables[table][1] for table in tables])
        start_F = torch.tensor([self.starts[table] for table in tables])
        rows_BF = torch.where((rows_BF < 0) | (rows_BF >= count_F), 0, rows_BF) + start_F
        return nn.functional.embedding(rows_BF, self.weight).flatten(1)  # type: ignore[arg-type]

    def _pooled(self, table: str, rows_BL: Tensor, sums: bool) -> Tensor:
        """Return the sum or the mean of the rows of each list, (B, width); 0 of an empty one."""
        is_there_BL1 = (rows_BL >= 0).unsqueeze(-1)
        sum_BH = torch.where(is_there_BL1, self._rows(table, rows_BL), 0.0).sum(1)
        return sum_BH if sums else sum_BH / is_there_BL1.sum(1).clamp_min(1)

    def _by_copy(self, y_BH: Tensor) -> Tensor:
        """Return the embeddings of several copies as (copies, B, H)."""
        if self.copies == 1:
            return y_BH
        return y_BH[:, self.order_H].unflatten(1, (self.copies, -1)).transpose(0, 1)


class PlainHistory(nn.Module):
    """``HistoryArch`` on padded histories.

    Args:
        history: the attention.
    """

    def __init__(self, history: HistoryArch) -> None:
        super().__init__()
        self.units: Any = history.units
        self.starts, self.dims = history.starts, history.dims
        self.copies, self.normalize = history.copies, history.normalize

    def forward(self, histories: Sequence[tuple[Tensor, Tensor]], embedded: Tensor) -> Tensor:
        """Return the vectors of all sequences side by side.

        Args:
            histories: the items' embeddings of each sequence (B, L, copies * d), and which of them are there (B, L).
            embedded: (B, H) or (copies, B, H), with the embeddings of the examples' own items.
        """
        embedded_KBH = embedded if self.copies > 1 else embedded[None]
        pooled = []
        for units, start, dim, (key_BLD, is_there_BL) in zip(
            self.units, self.starts, self.dims, histories, strict=True
        ):
            own = []
            for k, unit in enumerate(units):
                key_BLd = key_BLD[:, :, k * dim : (k + 1) * dim]
                query_BLd = embedded_KBH[k, :, None, start : start + dim].expand_as(key_BLd)
                weight_BL = unit(query_BLd.flatten(0, 1), key_BLd.flatten(0, 1)).view_as(is_there_BL)
                if self.normalize:
                    least = torch.finfo(torch.float32).min
                    weight_BL = weight_BL.float().masked_fill(~is_there_BL, least).softmax(1)
                weight_BL = torch.where(is_there_BL, weight_BL, 0.0)
                own.append((weight_BL.unsqueeze(-1) * key_BLd).sum(1))
            pooled.append(torch.stack(own))
        y_KBH = torch.cat(pooled, dim=-1)
        return y_KBH if self.copies > 1 else y_KBH[0]
