"""MoE layers as ONNX files compute on onnxruntime what they compute in eager mode, in both forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import core
from apps.serve.export.contrib import misfit
from apps.serve.export.onnx import _fastest, to_onnx
from apps.train.exporting import Graph

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class SideBySide(nn.Module):
    """Layers that get the same tokens, with an output each."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def layer(expert: core.ExpertConfig, router: core.RouterConfig = core.TokenChoice(top_k=2), **options) -> core.MoE:
    return core.MoEConfig(num_experts=4, router=router, expert=expert, **options).build(8)


def graph_of(network: nn.Module, length: int = 6) -> Graph:
    outputs = tuple(f"y_{i}" for i in range(len(network.layers))) if isinstance(network, SideBySide) else ("y",)
    return Graph("model", network, {"x": torch.randn(3, length, 8)}, outputs, {"x": {0: "batch", 1: "length"}})


def check(network: SideBySide, path: Path, form: str) -> None:
    """Write a network and compare it with eager mode in sizes of which none is the example's."""
    written = to_onnx(graph_of(network), path, form, {"app": "none"})
    assert (written.form, written.computes) == (form, "chosen")
    assert network.training  # as it was
    assert {part.backend for part in network.layers} == {"auto"}
    session = onnxruntime.InferenceSession(str(path))
    assert session.get_modelmeta().custom_metadata_map == {
        "app": "none",
        "moesaic.form": form,
        "moesaic.computes": "chosen",
    }
    assert session.get_inputs()[0].shape == session.get_outputs()[0].shape == ["batch", "length", 8]
    for shape in ((1, 1), (2, 7), (1, 33)):
        x = torch.randn(*shape, 8)
        with torch.no_grad():
            expected = network.eval()(x)
        for y, y_eager in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(y), y_eager)


def test_the_standard_form_computes_as_eager_mode_quantised_experts_too(tmp_path):
    torch.manual_seed(0)
    whole = layer(core.FFN(hidden_dim=16, bias=True), capacity_factor=0.75)  # some pairs are not computed
    by_group = core.quantize_experts(layer(core.SwiGLU(hidden_dim=16)), 4, 4)
    by_channel = core.quantize_experts(layer(core.FFN(hidden_dim=16)), 8)
    check(SideBySide(whole, by_group, by_channel), tmp_path / "standard.onnx", "standard")


def test_onnxruntimes_operator_computes_as_eager_mode_whatever_the_gate(tmp_path):
    torch.manual_seed(0)
    sigmoid = core.TokenChoice(top_k=2, score_func="sigmoid", scale=1.5)
    clamped = core.ClampedSwiGLU(hidden_dim=16, bias=True, limit=0.5, alpha=1.702, shift=1.0)
    dropped = layer(core.FFN(hidden_dim=16, activation="relu", bias=True), capacity_factor=0.75)
    kept = layer(core.FFN(hidden_dim=16))  # GELU stays as it is
    check(SideBySide(dropped, layer(clamped, sigmoid), kept), tmp_path / "contrib.onnx", "contrib")


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (layer(core.FFN()), "onnxruntime has no activation 'gelu'"),
        (layer(core.GEGLU()), "its experts are gated by gelu, not silu"),
        (layer(core.LoRA(rank=2)), "its experts are LoRAExperts"),
        (layer(core.SwiGLU(), core.SoftSlots()), "SoftMoE is no plain MoE layer"),
        (layer(core.SwiGLU(), core.TokenChoice(gates_on="input")), "its gates scale the experts' input"),
        (core.quantize_experts(layer(core.SwiGLU()), 8), "its experts are quantised"),
        (layer(core.SwiGLU()), None),
    ],
)
def test_a_layer_that_does_not_fit_onnxruntimes_operator_has_a_reason(made, reason):
    assert misfit(made) == reason


def test_a_form_that_fits_no_layer_names_each_with_its_reason(tmp_path):
    graph = graph_of(SideBySide(layer(core.FFN()), layer(core.LoRA(rank=2))))
    message = "layer 'layers.0': onnxruntime has no activation 'gelu'; layer 'layers.1': its experts are LoRAExperts"
    with pytest.raises(ValueError, match=message):
        to_onnx(graph, tmp_path / "no.onnx", "contrib")


def test_an_example_of_one_element_along_a_free_axis_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has length 1 along axis 1 \(length\)"):
        to_onnx(graph_of(layer(core.FFN()), length=1), tmp_path / "no.onnx")
    assert not list(tmp_path.iterdir())


def test_an_opset_without_gelu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="opset=18 is below 20"):
        to_onnx(graph_of(layer(core.FFN())), tmp_path / "no.onnx", opset=18)


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_operator_without_a_form_in_onnx_is_named_with_its_layer(tmp_path):
    message = r"operator aten.special_bessel_j0.default of layer 'layers.0' \(Bessel\) has no form in ONNX"
    with pytest.raises(ValueError, match=message):
        to_onnx(graph_of(SideBySide(Bessel())), tmp_path / "no.onnx")
    assert not list(tmp_path.iterdir())


def test_the_fastest_form_is_onnxruntimes_operator_where_a_graph_goes_step_by_step():
    x, axes = torch.randn(3, 6, 8), {"x": {0: "batch", 1: "past"}}
    fits, other = layer(core.SwiGLU()), layer(core.FFN())
    made = [Graph("model", network, {"x": x}, ("y",), axes) for network in (fits, other)]
    assert [_fastest(graph) for graph in (*made, graph_of(fits))] == ["contrib", "standard", "standard"]
