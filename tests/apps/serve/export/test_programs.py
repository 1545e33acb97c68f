"""Programs and packages compute what their network does, by operators of torch alone."""

from __future__ import annotations

import pytest
import torch
from commands import full_disk

import core
from apps.serve.export.programs import to_aoti, to_torch_export
from apps.train.publish.exporting import Graph


def test_a_program_has_torchs_operators_alone_and_computes_as_eager_mode(tmp_path):
    torch.manual_seed(0)
    config = core.MoEConfig(num_experts=2, router=core.TokenChoice(top_k=1), expert=core.FFN(hidden_dim=8))
    layers = torch.nn.Sequential(config.build(4), core.quantize_experts(config.build(4), 4)).eval()
    graph = Graph("model", layers, {"x": torch.randn(3, 6, 4)}, ("y",), {"x": {0: "batch", 1: "length"}})
    program = torch.export.load(to_torch_export(graph, tmp_path / "layer.pt2"))
    assert not any("moesaic" in str(node.target) for node in program.graph.nodes)
    for shape in ((1, 1, 4), (2, 7, 4)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), layers(x))


def test_an_example_lies_in_memory_as_inputs_do_and_a_full_disk_is_an_error_of_python(tmp_path):
    """torch's own writer would end the process."""
    transposed = torch.arange(6.0).view(3, 2).t()
    graph = Graph("model", torch.nn.Identity(), {"x": transposed}, ("y",), {})
    assert graph.inputs["x"].stride() == (3, 1)
    assert graph.inputs["x"].tolist() == [[0, 2, 4], [1, 3, 5]]
    graph = Graph("model", torch.nn.Linear(200, 200), {"x": torch.randn(2, 200)}, ("y",), {})
    with full_disk(100_000), pytest.raises(OSError, match="File too large"):
        to_torch_export(graph, tmp_path / "layer.pt2")


@pytest.mark.slow
def test_a_package_computes_as_eager_mode_whatever_the_rows_and_their_experts(tmp_path):
    torch.manual_seed(0)
    config = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=1), expert=core.SwiGLU(hidden_dim=16))
    layer = config.build(8).eval()
    example = torch.randn(8, 3, 2).permute(2, 1, 0)  # (2, 3, 8), and does not lie in memory so
    graph = Graph("model", layer, {"x": example}, ("y",), {"x": {0: "batch", 1: "length"}})
    package = torch._inductor.aoti_load_package(str(to_aoti(graph, tmp_path / "layer.pt2")))
    for shape in ((1, 1, 8), (2, 1, 8), (1, 2, 8), (50, 3, 8)):
        tokens = torch.randn(shape)
        for x in (tokens, tokens[:1, :1].expand(shape).contiguous()):  # the second: one expert has all rows
            with torch.no_grad():
                torch.testing.assert_close(package(x), layer(x), rtol=1e-5, atol=1e-6)
