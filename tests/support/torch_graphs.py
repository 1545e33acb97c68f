"""Graphs of ``moesaic export`` that torch runs in place of onnxruntime: the same interfaces, and no export."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from apps.train.publish.exporting import Exported, Graph


class TorchGraph(nn.Module):
    """The network of a graph under the interface of ``apps.train.publish.exported.OnnxGraph``."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.network = (graph.network,)  # a tuple, so that the weights are no part of the model that runs it
        self.inputs, self.outputs = tuple(graph.inputs), graph.outputs
        self.session = TorchSession(graph)

    def forward(self, inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
        values = {name: None if value is None else value.numpy(force=True) for name, value in inputs.items()}
        outputs = self.session.run(None, {name: values[name] for name in self.inputs})
        return tuple(torch.from_numpy(output) for output in outputs)


class TorchSession:
    """The network of a graph under the interface of ``onnxruntime.InferenceSession``."""

    def __init__(self, graph: Graph, exported: Exported | None = None) -> None:
        self.graph, self.exported = graph, exported

    def get_modelmeta(self) -> SimpleNamespace:
        preprocessing = None if self.exported is None else self.exported.preprocessing
        return SimpleNamespace(custom_metadata_map={"moesaic.model": json.dumps({"preprocessing": preprocessing})})

    def get_inputs(self) -> list[SimpleNamespace]:
        return [self._value(name) for name in self.graph.inputs]

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.graph.outputs]

    @torch.no_grad()
    def run(self, names: None, inputs: Mapping[str, Any]) -> list[Any]:
        assert inputs.keys() == self.graph.inputs.keys()
        for name, example in self.graph.inputs.items():
            assert torch.from_numpy(inputs[name]).dtype == example.dtype, name
        outputs = self.graph.network(*(torch.from_numpy(inputs[name]) for name in self.graph.inputs))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        assert len(outputs) == len(self.graph.outputs)
        return [output.numpy() for output in outputs]

    def _value(self, name: str) -> SimpleNamespace:
        """Return what onnxruntime says of an input: names stand for sizes that may differ."""
        tensor, axes = self.graph.inputs[name], self.graph.dynamic.get(name, {})
        shape = [axes.get(axis, size) for axis, size in enumerate(tensor.shape)]
        kind = {torch.bool: "bool", torch.int64: "int64", torch.float32: "float"}[tensor.dtype]
        return SimpleNamespace(name=name, shape=shape, type=f"tensor({kind})")


def folder_of(exported: Exported, folder: Path) -> Path:
    """Write what an export has beside its graphs."""
    for name, content in exported.files.items():
        (folder / name).write_bytes(content)
    (folder / "export.json").write_text(json.dumps({"preprocessing": exported.preprocessing}), encoding="utf-8")
    return folder


def output_in_torch(code: str, exported: Exported, *arguments: str) -> str:
    """Return what a script of the documentation prints, where torch runs the graphs of ``exported``."""
    sessions = {f"{graph.name}.onnx": TorchSession(graph, exported) for graph in exported.graphs}
    runtime = SimpleNamespace(InferenceSession=lambda path: sessions[Path(path).name])
    text, argv = io.StringIO(), ["script.py", *arguments]
    with (
        mock.patch.dict(sys.modules, {"onnxruntime": runtime}),
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(text),
        np.errstate(all="raise"),
    ):
        exec(compile(code, "script.py", "exec"), {"__name__": "__main__"})
    return text.getvalue().removesuffix("\n")
