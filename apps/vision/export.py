"""Image classifiers for ``moesaic export``: one graph from normalised images to the logits of the classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import core
from apps.train.exporting import Exported, Graph

if TYPE_CHECKING:
    from apps.train.exported import ExportedModel, OnnxGraph
    from apps.vision.module import VisionClassifier


def export(model: VisionClassifier) -> Exported:
    """Return the graph, and the encoding of images: a script scales, cuts and normalises them by it.

    Raises:
        ValueError: the model's checkpoint keeps no encoding.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, model.in_chans, model.image_size, model.image_size, generator=generator)
    graph = Graph("model", model.model, {"image": image}, ("logits",), {"image": {0: "batch"}})
    return Exported("vision", (graph,), model.encoding.state())


def attach(model: VisionClassifier, graphs: Mapping[str, OnnxGraph]) -> None:
    """Let the classifier run an exported graph."""
    model.model = _Classifier(graphs["model"])  # type: ignore[assignment]


def encoding_state(exported: ExportedModel) -> dict[str, Any]:
    """Return the encoding of a checkpoint."""
    return dict(exported.description.preprocessing)


class _Classifier(nn.Module):
    """A graph under the interface of ``VMoE``."""

    def __init__(self, graph: OnnxGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, image: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Map normalised images to logits."""
        return self.graph({"image": image})[0]
