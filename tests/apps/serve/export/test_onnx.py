"""MoE layers as ONNX files compute on onnxruntime what they compute in eager mode, in both forms."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import core
from apps.base.sealed import seal
from apps.serve.export.contrib import misfit
from apps.serve.export.onnx import _fastest, to_onnx
from apps.train.publish.exported import OnnxGraph
from apps.train.publish.exporting import Graph

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
DIM = 16


class SideBySide(nn.Module):
    """Layers that get the same tokens, with an output each."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def layer(expert: core.ExpertConfig, router: core.RouterConfig = core.TokenChoice(top_k=2), **options) -> core.MoE:
    return core.MoEConfig(num_experts=3, router=router, expert=expert, **options).build(DIM)


def graph_of(network: nn.Module, length: int = 6, axis: str = "length") -> Graph:
    outputs = tuple(f"y_{i}" for i in range(len(network.layers))) if isinstance(network, SideBySide) else ("y",)
    return Graph("model", network, {"x": torch.randn(3, length, DIM)}, outputs, {"x": {0: "batch", 1: axis}})


def check(network: SideBySide, path: Path, form: str, axis: str = "length") -> Counter[str]:
    """Write a network, compare it with eager mode in sizes of which none is the example's, and count its operators."""
    to_onnx(graph_of(network, axis=axis), path, form, {"app": "none"})
    assert network.training  # as it was
    assert {part.backend for part in network.layers} == {"auto"}
    session = onnxruntime.InferenceSession(str(path))
    computes = "all" if any(isinstance(part, core.SoftMoE) for part in network.layers) else "chosen"
    said = {"app": "none", "moesaic.form": form, "moesaic.computes": computes}
    assert session.get_modelmeta().custom_metadata_map == said
    assert session.get_inputs()[0].shape == session.get_outputs()[0].shape == ["batch", axis, DIM]
    for shape in ((1, 1), (2, 7), (1, 33)):
        x = torch.randn(*shape, DIM)
        with torch.no_grad():
            expected = network.eval()(x)
        for y, y_eager in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(y), y_eager)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_the_standard_form_computes_as_eager_mode_quantized_experts_too(tmp_path):
    torch.manual_seed(0)
    whole = layer(core.FFN(hidden_dim=16, bias=True), capacity_factor=0.75)  # some pairs are not computed
    # Of a shared expert as large as this the whole numbers are unpacked in the graph, not before.
    by_group = core.quantize_experts(layer(core.SwiGLU(hidden_dim=2048), num_shared_experts=1), 4, 4)
    by_channel = core.quantize_experts(layer(core.FFN(hidden_dim=16)), 8)
    # Routers whose experts choose their tokens, or mix them.
    by_expert, mixed = (layer(core.FFN(hidden_dim=16), router) for router in (core.ExpertChoice(), core.SoftSlots()))
    written = check(SideBySide(whole, by_group, by_channel, by_expert, mixed), tmp_path / "standard.onnx", "standard")
    assert (written["DequantizeLinear"], written["BitShift"]) == (3 * 3 + 3 * 2, 3)


def test_onnxruntimes_operator_computes_as_eager_mode_whatever_the_gate(tmp_path):
    torch.manual_seed(0)
    sigmoid = core.TokenChoice(top_k=2, score_func="sigmoid", scale=1.5)
    clamped = core.ClampedSwiGLU(hidden_dim=16, bias=True, limit=0.5, alpha=1.702, shift=1.0)
    dropped = layer(core.FFN(hidden_dim=16, activation="relu", bias=True), capacity_factor=0.75)
    kept = layer(core.FFN(hidden_dim=16))  # GELU stays as it is
    int8 = core.quantize_experts(layer(core.FFN(hidden_dim=16, activation="relu", bias=True), sigmoid), 8)
    int4 = core.quantize_experts(layer(core.FFN(hidden_dim=24, bias=True)), 4)  # a block of 16 and half of one
    layers = SideBySide(dropped, layer(clamped, sigmoid), kept, int8, int4)
    written = check(layers, tmp_path / "contrib.onnx", "contrib")
    assert (written["MoE"], written["QMoE"], written["MatMulNBits"]) == (2, 1, 3 * 2)


def test_a_step_of_decoding_has_one_operator_a_layer_of_4_bits(tmp_path):
    torch.manual_seed(0)
    blocks = core.quantize_experts(layer(core.SwiGLU(hidden_dim=32)), 4, 16)
    written = check(SideBySide(blocks), tmp_path / "contrib.onnx", "contrib", "past")
    assert (written["QMoE"], written["MatMulNBits"]) == (1, 0)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (layer(core.FFN()), "onnxruntime has no activation 'gelu'"),
        (layer(core.GEGLU()), "its experts are gated by gelu, not silu"),
        (layer(core.LoRA(rank=2)), "its experts are LoRAExperts"),
        (layer(core.SwiGLU(), core.SoftSlots()), "SoftMoE is no plain MoE layer"),
        (layer(core.SwiGLU(), core.TokenChoice(gates_on="input")), "its gates scale the experts' input"),
        (core.quantize_experts(layer(core.SwiGLU()), 8, 16),
         "its experts have 8 bits and several scales a channel: onnxruntime would round the tokens too"),
        (core.quantize_experts(layer(core.SwiGLU(hidden_dim=16)), 4, 8),
         "its experts share scales among 8 inputs, which is no multiple of 16"),
        (core.quantize_experts(layer(core.FFN()), 8), "onnxruntime has no activation 'gelu'"),
        (core.quantize_experts(layer(core.FFN()), 4), None),
        (layer(core.SwiGLU()), None),
    ],
)  # fmt: skip
def test_a_layer_that_does_not_fit_onnxruntimes_operator_has_a_reason(made, reason):
    assert misfit(made) == reason


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_what_has_no_form_is_named_with_its_layer_and_nothing_is_written(tmp_path):
    no_form = graph_of(SideBySide(layer(core.FFN()), layer(core.LoRA(rank=2))))
    reasons = "layer 'layers.0': onnxruntime has no activation 'gelu'; layer 'layers.1': its experts are LoRAExperts"
    operator = r"operator aten.special_bessel_j0.default of layer 'layers.0' \(Bessel\) has no form in ONNX"
    for graph, form, message in (
        (no_form, "contrib", reasons),
        (graph_of(layer(core.FFN()), length=1), "fastest", r"has length 1 along axis 1 \(length\)"),
        (graph_of(SideBySide(Bessel())), "fastest", operator),
    ):
        with pytest.raises(ValueError, match=message):
            to_onnx(graph, tmp_path / "no.onnx", form)
    assert not list(tmp_path.iterdir())


def test_weights_beside_a_file_are_read_and_refused_once_they_are_changed_or_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("apps.serve.export.onnx.LARGEST", 0)
    path, network, x = tmp_path / "linear.onnx", nn.Linear(DIM, DIM), torch.randn(2, 5, DIM)
    to_onnx(graph_of(network), path)
    seal(path)
    (data,) = set(tmp_path.iterdir()) - {path}
    torch.testing.assert_close(OnnxGraph(path)({"x": x})[0], network(x).detach())
    whole = data.read_bytes()
    for damaged in (whole[:-1], b"\xff" + whole[1:], whole + b"\0"):
        data.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"linear\.onnx\.data is cut or damaged"):
            OnnxGraph(path)
    data.unlink()
    with pytest.raises(ValueError, match=r"has its weights in linear\.onnx\.data beside it"):
        OnnxGraph(path)


def test_the_fastest_form_is_onnxruntimes_for_4_bits_and_where_a_graph_goes_step_by_step():
    fits, other, int8 = layer(core.SwiGLU()), layer(core.FFN()), core.quantize_experts(layer(core.SwiGLU()), 8)
    by_step = [_fastest(graph_of(network, axis="past")) for network in (fits, other, int8)]
    assert by_step == ["contrib", "standard", "contrib"]
    int4 = core.quantize_experts(layer(core.FFN()), 4)
    assert [_fastest(graph_of(network)) for network in (fits, int8, int4)] == ["standard", "standard", "contrib"]
