"""A batch of a table as the tensors that graphs for other runtimes take, and back.

The inputs by name, each only where the table has such columns:

- "dense": float32 (B, C), the continuous columns, NaN if missing;
- "categorical": int64 (B, F), the row of each column with one value;
- "list_0", "list_1", ...: int64 (B, L), the rows of each multi-valued column and then of each sequence, in their order,
  with -1 behind them up to the longest;
- "vectors": float32 (B, V), the columns of vectors side by side, NaN if one is missing;
- "domain": int64 (B,).

A row that a table lacks counts as row 0, the row of values that training lacked: no graph reads another column's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from apps.recsys.encoding.features import Features
from apps.recsys.tables.rows.batch import Ragged, TableBatch

EMPTY = -1
"""What stands behind the rows of a list."""


def plain_inputs(batch: TableBatch, features: Features) -> dict[str, Tensor]:
    """Return the tensors of a batch by name."""
    inputs: dict[str, Tensor] = {}
    if features.continuous:
        inputs["dense"] = batch.dense_BC
    if len(batch.single_FB):
        inputs["categorical"] = batch.single_FB.t().long()
    inputs |= {f"list_{i}": padded(rows) for i, rows in enumerate(batch.lists)}
    if features.vectors and batch.vector_BV is not None:
        inputs["vectors"] = batch.vector_BV
    if features.num_domains and batch.domain_B is not None:
        inputs["domain"] = batch.domain_B
    return inputs


def padded(column: Ragged) -> Tensor:
    """Return the rows of a column as int64 (B, L), with ``EMPTY`` behind them; L is at least 1."""
    lists = column.values_N.long().split(column.length_B.tolist())
    rows_BL = pad_sequence(list(lists), batch_first=True, padding_value=EMPTY)
    return rows_BL if rows_BL.shape[1] else rows_BL.new_full((len(lists), 1), EMPTY)


def batch_of(inputs: Mapping[str, Tensor], features: Features) -> TableBatch:
    """Return a batch without labels of tensors by name, as a graph is given them."""
    B = next(iter(inputs.values())).shape[0]  # a length would make a graph of only this batch size
    dense_BC = inputs.get("dense", torch.empty(B, 0))
    num_rows_F = torch.tensor([f.num_rows for f in features.single], dtype=torch.int64)
    single_BF = inputs.get("categorical", torch.empty(B, 0, dtype=torch.int64))
    single_BF = torch.where((single_BF < 0) | (single_BF >= num_rows_F), 0, single_BF)
    domain_B = inputs.get("domain")
    if domain_B is not None:  # beyond the last domain a runtime stops; below the first it would count from the end
        domain_B = torch.where(domain_B < 0, features.num_domains, domain_B)
    lists = [inputs[f"list_{i}"] for i in range(len(features.several))]
    lists = [torch.where(x < f.num_rows, x, 0) for x, f in zip(lists, features.several, strict=True)]
    return TableBatch(
        dense_BC,
        single_BF.t(),
        label_Bt=dense_BC[:, :0],
        index_B=torch.arange(B),
        domain_B=domain_B,
        vector_BV=inputs.get("vectors"),
        lists=tuple(map(Ragged.of_padded, lists)),
    )


def dynamic_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Return the axes of any length of inputs: the batch, and the length of each list."""
    return {
        name: {0: "batch", 1: f"length_{name.removeprefix('list_')}"} if name.startswith("list_") else {0: "batch"}
        for name in inputs
    }


def example_inputs(features: Features, batch_size: int = 3, length: int = 4) -> dict[str, Tensor]:
    """Return random inputs of a table, with missing numbers, empty lists and rows that a table lacks."""
    draw = torch.Generator().manual_seed(0)
    B, inputs = batch_size, dict[str, Tensor]()
    if features.continuous:
        mean_C = torch.tensor([f.mean for f in features.continuous])
        std_C = torch.tensor([f.std for f in features.continuous])
        inputs["dense"] = mean_C + std_C * torch.randn(B, len(features.continuous), generator=draw)
        inputs["dense"][0, 0] = torch.nan
    single = [f.num_rows for f in features.single]
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


class GraphOfColumns(nn.Module):
    """A graph of one output under the interface of the network that it was made of.

    Args:
        graph: the graph.
        features: the columns of its inputs.
    """

    def __init__(self, graph: Any, features: Features) -> None:
        super().__init__()
        self.graph, self.features = graph, features

    def forward(self, batch: TableBatch) -> Tensor:
        """Map a batch of rows to the output."""
        return self.graph(plain_inputs(batch, self.features))[0]
