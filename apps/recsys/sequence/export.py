"""Recommenders of next items for ``moesaic export``: one graph from histories to the scores of all items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apps.recsys.encoding.vocabulary import Vocabulary
from apps.recsys.sequence.histories import Items
from apps.recsys.tables.scoring import encoding_of
from apps.train.exporting import Exported, Graph

if TYPE_CHECKING:
    from apps.recsys.sequence.module import NextItemRecommender
    from apps.train.exported import ExportedModel, OnnxGraph


def export(model: NextItemRecommender) -> Exported:
    """Return the graph, and the items by id.

    The inputs are "items", int64 (B, S) ids with 0 for padding, and, of a model that reads times, "seconds", int64
    (B, S). The output "scores" (B, num_items + 1) has the score of each item, by its id.

    Raises:
        ValueError: the model's checkpoint keeps no encoding.
    """
    state = encoding_of(model)
    items = Items.from_state(state)
    length = min(5, model.max_length)
    draw = torch.Generator().manual_seed(0)
    items_BS = torch.randint(1, model.num_items + 1, (3, length), generator=draw)
    items_BS[1, :2] = 0  # padding may stand anywhere, and a history may have no item
    items_BS[2] = 0
    inputs = {"items": items_BS}
    if model.sequence.time_buckets:
        inputs["seconds"] = torch.randint(0, 10**6, items_BS.shape, generator=draw).cumsum(1)
    axes = {name: {0: "batch", 1: "length"} for name in inputs}
    graph = Graph("model", model.model, inputs, ("scores",), axes)
    preprocessing = {
        "items": list(items.values[1:]),
        "names": list(items.names[1:]),
        "columns": dict(state.get("columns", {})),
        "min_rating": state.get("min_rating"),
        "max_length": model.max_length,
        "exclude_seen": model.exclude_seen,
    }
    return Exported("histories", (graph,), preprocessing)


def attach(model: NextItemRecommender, graphs: Mapping[str, OnnxGraph]) -> None:
    """Let the recommender run an exported graph."""
    model.model = _Histories(graphs["model"])  # type: ignore[assignment]


def encoding_state(exported: ExportedModel) -> dict[str, Any]:
    """Return the encoding of a checkpoint."""
    import pyarrow as pa

    known = exported.description.preprocessing
    texts = {part: Vocabulary.of(pa.array(known[part], pa.string())).state() for part in ("items", "names")}
    return {**texts, "columns": dict(known["columns"]), "min_rating": known["min_rating"]}


class _Histories(nn.Module):
    """A graph under the interface of ``HistoryModel``."""

    def __init__(self, graph: OnnxGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, items_BS: Tensor, seconds_BS: Tensor | None = None) -> Tensor:
        """Map histories to scores of the next item."""
        if "seconds" in self.graph.inputs and seconds_BS is None:
            seconds_BS = torch.zeros_like(items_BS)
        return self.graph({"items": items_BS, "seconds": seconds_BS})[0]
