"""Columns of a table by their numbers alone, and what a network reads of them on the meta device, for a plan."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature, Features, SequenceFeature
from apps.task.sizes import Missing, Sizes, ids_on_meta


def refuse_without_columns(given: Mapping[str, Any], sizes: Sizes) -> None:
    """Refuse a plan that is not told a table's columns.

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
    )


def read_on_meta(model: Any, features: Features, batch: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return what ``TableColumns.read`` returns of a batch, from the pooled embeddings on, which need their gradient.

    Histories are full.

    Raises:
        Missing: there are histories beside tables that TorchRec shards.
    """
    if features.sequences and model.sparse.collection is not None:
        kind = model.sparse.config.kind
        raise Missing(
            f"histories are planned with embedding.kind='joined', not {kind!r}: what TorchRec exchanges for them is "
            "not counted"
        )
    parts = []
    if model.sparse.dims:
        pooled = torch.empty(batch, sum(model.sparse.dims), device="meta", dtype=dtype, requires_grad=True)
        parts.append(pooled.expand(model.copies, -1, -1) if model.copies > 1 else pooled)
    if model.vectors is not None:
        parts.append(model.vectors(torch.empty(batch, sum(model.vectors.sizes), device="meta", dtype=dtype)))
    if model.history is not None:
        lengths = {s.name: s.length for s in features.sequences}
        items = _jagged({name: lengths[name] for name in model.history.names}, batch)
        parts.append(model.history(items, model.sparse, parts[0]))
    dense = model.dense(torch.empty(batch, model.num_continuous, device="meta", dtype=dtype))
    return dense, torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0] if parts else None


def _jagged(lengths: Mapping[str, int], batch: int) -> Any:
    """Return rows of items, so many of an example in each column, without values: offsets are given in their place."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    sizes = [batch * length for length in lengths.values()]
    return KeyedJaggedTensor(
        keys=list(lengths),
        values=ids_on_meta(sum(sizes)),
        lengths=ids_on_meta(len(lengths) * batch),
        stride=batch,
        length_per_key=sizes,
        offset_per_key=[0, *itertools.accumulate(sizes)],
    )
