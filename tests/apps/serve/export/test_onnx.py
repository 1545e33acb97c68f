"""An MoE layer as an ONNX file computes on onnxruntime what it computes in eager mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import core
from apps.serve.export.onnx import to_onnx
from apps.train.exporting import Graph

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def graph_of(network: nn.Module, dim: int = 8) -> Graph:
    return Graph("model", network, {"x": torch.randn(3, 6, dim)}, ("y",), {"x": {0: "batch", 1: "length"}})


@pytest.fixture(scope="module")
def layer() -> core.MoE:
    torch.manual_seed(0)
    config = core.MoEConfig(
        num_experts=4,
        router=core.TokenChoice(top_k=2),
        expert=core.FFN(hidden_dim=16, bias=True),
        capacity_factor=0.75,
    )
    return config.build(8)


@pytest.fixture(scope="module")
def session(layer, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "layer.onnx"
    written = to_onnx(graph_of(layer), path, "standard", {"app": "none"})
    assert (written.form, written.computes, layer.training, layer.backend) == ("standard", "chosen", True, "auto")
    return onnxruntime.InferenceSession(str(path))


@pytest.mark.parametrize("shape", [(3, 6), (1, 1), (2, 7), (1, 33)])
def test_a_layer_computes_on_onnxruntime_what_it_computes_here(layer, session, shape):
    x = torch.randn(*shape, 8)
    with torch.no_grad():
        expected = layer.eval()(x)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected)


def test_a_file_says_what_it_is(session):
    assert session.get_modelmeta().custom_metadata_map == {
        "app": "none",
        "moesaic.form": "standard",
        "moesaic.computes": "chosen",
    }
    assert session.get_inputs()[0].shape == session.get_outputs()[0].shape == ["batch", "length", 8]
