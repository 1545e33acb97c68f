"""Columns of a table given only by their numbers, and a network's inputs from them on the meta device, for a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature, Features, SequenceFeature
from apps.recsys.tables.rows.batch import Ragged, TableBatch
from apps.task.sizes import Missing, Sizes, ids_on_meta


def refuse_without_columns(given: Mapping[str, Any], sizes: Sizes) -> None:
    """Reject a plan that is not told a table's columns.

    Raises:
        Missing: naming the options.
    """
    if not sizes.columns["tables"] and not sizes.columns["numbers"]:
        raise Missing("a table's columns come from the data: give --tables ROWS ..., and --numbers N")
    history = given.get("history")
    if isinstance(history, Mapping) and history.get("pooling") == "din" and not sizes.columns["histories"]:
        raise Missing("the histories that history.pooling='din' reads come from the data: give --histories ITEMS ...")


def columns_of(sizes: Sizes, tables: str, numbers: str, histories: Sequence[int] = ()) -> Features:
    """Return columns without tasks: ids with so many rows each, numbers, and histories of these ids."""
    rows_of = sizes.columns[tables]
    return Features(
        categorical=tuple(
            CategoricalFeature(f"column {i}", rows, multi_valued=sizes.columns["pooling"] > 1, hashed=True)
            for i, rows in enumerate(rows_of)
        ),
        continuous=tuple(ContinuousFeature(f"number {i}") for i in range(sizes.columns[numbers])),
        sequences=tuple(
            SequenceFeature(f"history {i}", rows_of[i], length, f"column {i}", hashed=True)
            for i, length in enumerate(histories)
        ),
        numbers="bins",
    )


def read_on_meta(model: Any, features: Features, batch: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return what ``TableColumns.read`` returns of a batch, from the pooled embeddings on, which need their gradient.

    Histories are full.

    Raises:
        Missing: there are histories together with tables that TorchRec shards.
    """
    kind = model.sparse.config.kind
    if features.sequences and kind != "joined":
        raise Missing(
            f"histories are planned with embedding.kind='joined', not {kind!r}: TorchRec's all-to-all for them is "
            "not counted"
        )
    pooled = None
    if model.sparse.dims:
        pooled = torch.empty(batch, sum(model.sparse.dims), device="meta", dtype=dtype, requires_grad=True)
        pooled = pooled.expand(model.copies, -1, -1) if model.copies > 1 else pooled
    vectors = sum(model.vectors.sizes) if model.vectors is not None else 0
    several = [Ragged(ids_on_meta(0), ids_on_meta(batch))] * model.num_multi  # their embeddings are ``pooled``
    rows = TableBatch(
        torch.empty(batch, model.num_continuous, device="meta", dtype=dtype),
        single_FB=ids_on_meta(0),
        label_Bt=ids_on_meta(batch),
        index_B=ids_on_meta(batch),
        vector_BV=torch.empty(batch, vectors, device="meta", dtype=dtype),
        lists=(*several, *(Ragged(ids_on_meta(batch * s.length), ids_on_meta(batch)) for s in features.sequences)),
    )
    return model.read_beside(pooled, rows)
