"""A program of torch.export computes what its network does, by operators of torch alone."""

from __future__ import annotations

import pytest
import torch

import core
from apps.serve.export.programs import to_torch_export
from apps.train.exporting import Graph


@pytest.mark.parametrize("bits", [None, 4])
def test_a_program_has_torchs_operators_alone_and_computes_as_eager_mode(tmp_path, bits):
    torch.manual_seed(0)
    config = core.MoEConfig(num_experts=2, router=core.TokenChoice(top_k=1), expert=core.FFN(hidden_dim=8))
    layer = config.build(4).eval()
    if bits is not None:
        core.quantize_experts(layer, bits)
    graph = Graph("model", layer, {"x": torch.randn(3, 6, 4)}, ("y",), {"x": {0: "batch", 1: "length"}})
    program = torch.export.load(to_torch_export(graph, tmp_path / "layer.pt2"))
    assert not any("moesaic" in str(node.target) for node in program.graph.nodes)
    for shape in ((1, 1, 4), (2, 7, 4)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), layer(x))
