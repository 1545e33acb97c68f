"""Retrievers for ``moesaic export``: a graph for each tower, and the vectors of all items."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from apps.recsys.encoding.features import Features
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.retrieval.columns import encoding_of_part, names_of
from apps.recsys.retrieval.model import Tower
from apps.recsys.tables.export import described_columns, state_of_columns
from apps.recsys.tables.rows.plain_columns import GraphOfColumns, batch_of, dynamic_axes, example_inputs
from apps.recsys.tables.rows.scoring import encoding_of
from apps.train.publish.exporting import Exported, Graph

if TYPE_CHECKING:
    from apps.recsys.retrieval.module import TwoTowerRetriever
    from apps.train.publish.exported import ExportedModel, OnnxGraph

VECTORS, CATALOG = "items.npy", "catalogue.npz"
"""The vectors of all items, float32 (I, dim); the items' columns, and what each user had in training."""


def export(model: TwoTowerRetriever) -> Exported:
    """Return the graphs "user_tower" and "item_tower", each from encoded columns to vectors of length 1, and the items.

    Raises:
        ValueError: the model's checkpoint keeps no encoding.
    """
    state = encoding_of(model)
    encoding = Encoding.from_state(state)
    sides = {"user_tower": model.user_features, "item_tower": model.item_features}
    graphs = []
    for name, features in sides.items():
        inputs = example_inputs(features)
        network = PlainTower(getattr(model, name), features, tuple(inputs)).train(model.training)
        graphs.append(Graph(name, network, inputs, ("vectors",), dynamic_axes(inputs)))
    columns = {
        name: described_columns(encoding_of_part(encoding, names_of(features))) for name, features in sides.items()
    }
    others = {name: state[name] for name in state if name not in (*encoding.state(), "catalogue")}
    values = encoding.vocabularies[state["item_column"]].texts()
    preprocessing = {**columns, "table": described_columns(encoding), "items": list(values), "sides": others,
                     "features": state["features"]}  # fmt: skip
    files = {VECTORS: _npy(model.index().vectors_ID), CATALOG: _npz(state["catalogue"])}
    return Exported("retrieval", tuple(graphs), preprocessing, files)


def attach(model: TwoTowerRetriever, graphs: Mapping[str, OnnxGraph]) -> None:
    """Let the retriever run exported graphs."""
    model.user_tower = GraphOfColumns(graphs["user_tower"], model.user_features)  # type: ignore[assignment]
    model.item_tower = GraphOfColumns(graphs["item_tower"], model.item_features)  # type: ignore[assignment]


def encoding_state(exported: ExportedModel) -> dict[str, Any]:
    """Return the encoding of a checkpoint."""
    known = exported.description.preprocessing
    columns = state_of_columns(known["table"], known["features"])
    return {**columns, **known["sides"], "catalogue": _catalog(exported.file(CATALOG))}


class PlainTower(nn.Module):
    """A tower from plain tensors to vectors, by its weights.

    Args:
        tower: the tower.
        features: its columns.
        names: names of the inputs, in the order of the arguments of ``forward``.
    """

    def __init__(self, tower: Tower, features: Features, names: tuple[str, ...]) -> None:
        super().__init__()
        self.tower, self.features, self.names = tower, features, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the vectors, float32 (B, dim), of length 1."""
        return self.tower(batch_of(dict(zip(self.names, tensors, strict=True)), self.features), plain=True)


def _npy(values: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, values.numpy(force=True), allow_pickle=False)
    return file.getvalue()


def _npz(catalog: Mapping[str, Any]) -> bytes:
    seen = catalog["seen"] or {}
    arrays = {f"arrays.{name}": values for name, values in catalog["arrays"].items()}
    arrays |= {"count": catalog["count"], **{f"seen.{name}": values for name, values in seen.items()}}
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **{name: values.numpy() for name, values in arrays.items()})
    return file.getvalue()


def _catalog(content: bytes) -> dict[str, Any]:
    """Return the state of a catalog.

    Raises:
        ValueError: the content is damaged.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy have errors of their own
        raise ValueError(f"{CATALOG} is damaged: {error}") from error
    parts = {
        part: {n.partition(".")[2]: v for n, v in arrays.items() if n.startswith(part)} for part in ("arrays", "seen")
    }
    return {"arrays": parts["arrays"], "count": arrays["count"], "seen": parts["seen"] or None}
