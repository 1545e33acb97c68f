"""A graph of ``moesaic export`` that torch runs in place of onnxruntime: the same interface, and no export."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from apps.train.exporting import Graph


class TorchGraph(nn.Module):
    """The network of a graph under the interface of ``apps.train.exported.OnnxGraph``."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.network = (graph.network,)  # a tuple, so that the weights are no part of the model that runs it
        self.inputs, self.outputs = tuple(graph.inputs), graph.outputs
        self.session = SimpleNamespace(get_inputs=lambda: [_value(graph, name) for name in graph.inputs])

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
        outputs = self.network[0](*(inputs[name] for name in self.inputs))
        assert len(outputs) == len(self.outputs)
        return tuple(outputs)


def _value(graph: Graph, name: str) -> SimpleNamespace:
    """Return what onnxruntime says of an input: names stand for sizes that may differ."""
    tensor, axes = graph.inputs[name], graph.dynamic.get(name, {})
    shape = [axes.get(axis, size) for axis, size in enumerate(tensor.shape)]
    kind = {torch.bool: "bool", torch.int64: "int64", torch.float32: "float"}[tensor.dtype]
    return SimpleNamespace(name=name, shape=shape, type=f"tensor({kind})")
