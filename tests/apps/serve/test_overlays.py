"""Every overlay of routers and of experts as an ONNX file computes on onnxruntime what it computes in eager mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import core
from apps.serve.export.onnx import Form, to_onnx
from apps.train.publish.exporting import Graph
from tests.support.overlays import (
    CONFIGS,
    LENGTH,
    OVERLAYS,
    Layers,
    example,
    graph_of_layers,
    layers_of,
    model_of,
    spread,
)

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

QUANTIZED = [path for path in OVERLAYS if path.parent.name == "experts" and not path.stem.startswith("peer")]
"""Overlays of experts with matrices: those of PEER are tables."""


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


def graph_of(path: Path) -> Graph:
    torch.manual_seed(0)
    graph = model_of(path) or graph_of_layers(Layers(layers_of(path)))
    spread(graph.network)
    graph.network.eval()
    return graph


def sized(graph: Graph, B: int, S: int) -> dict[str, torch.Tensor]:
    """Return inputs of another size, where the graph takes them."""
    if isinstance(graph.network, Layers):
        return example(graph.network, B, S if "length" in graph.dynamic["x"].values() else LENGTH)
    (given,) = graph.inputs.values()
    few = given[:1].expand(B, *given.shape[1:])
    if given.ndim == 2:  # tokens
        few = few[:, torch.arange(S) % LENGTH]
    return dict.fromkeys(graph.inputs, few if given.ndim == 2 else torch.randn(few.shape))


def check(graph: Graph, path: Path, form: Form = "standard") -> None:
    """Compare the file with eager mode to 1e-5 of the largest output, for other sizes than the example's."""
    to_onnx(graph, path, form)
    session = onnxruntime.InferenceSession(str(path))
    taken = {value.name for value in session.get_inputs()}
    for B, S in ((3, LENGTH), (1, 7), (5, 21)):
        inputs = sized(graph, B, S)
        with torch.no_grad():
            expected = graph.network(*inputs.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        outputs = session.run(None, {n: value.numpy() for n, value in inputs.items() if n in taken})
        for y, y_eager in zip(outputs, expected, strict=True):
            error = (torch.from_numpy(y) - y_eager).abs().max() / y_eager.abs().max()
            assert error < 1e-5, f"{float(error)} for {B} sequences of {S}"


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_an_overlay_is_computed_as_in_eager_mode(path, tmp_path):
    check(graph_of(path), tmp_path / "overlay.onnx")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("path", QUANTIZED, ids=name)
def test_quantized_experts_of_an_overlay_are_computed_as_in_eager_mode(path, bits, tmp_path):
    graph = graph_of(path)
    core.quantize_experts(graph.network, bits)
    check(graph, tmp_path / "overlay.onnx", "fastest")
