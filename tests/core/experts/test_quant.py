"""Quantized experts of every kind: what they compute, keep, count and refuse."""

from __future__ import annotations

import copy

import pytest
import torch

import core

BACKENDS = ("eager", "cpu", "grouped")
KINDS = {
    "FFN": core.FFN(24, bias=True),
    "GEGLU": core.GEGLU(24),
    "SwiGLU": core.SwiGLU(24, bias=True),
    "MLP": core.MLP((20, 12)),
    "MLP, batch norm": core.MLP((20, 12), norm="batch"),
    "GeneralFFN": core.GeneralFFN(24, "tanh", gated=True),
    "ClampedSwiGLU": core.ClampedSwiGLU(24, bias=True),
    "LoRA": core.LoRA(4, alpha=6.0),
    "Mixed": core.Mixed((core.FFN(24), core.Zero(), core.Constant(mix=True)), (2, 1, 1)),
    "Attention": core.AttentionExperts(6, 2),
    "Convolution": core.Convolution(6, bias=True),
}


def layer_of(kind, router=None, **options):
    torch.manual_seed(0)
    layer = core.MoEConfig(4, router or core.TokenChoice(2), kind, **options).build(12).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return layer


def dequantized(layer, quantized):
    """Return ``layer`` with the numbers that ``quantized`` stands for, in floating point."""
    layer, of = copy.deepcopy(layer), dict(quantized.named_modules())
    for name, parameter in layer.named_parameters():
        if hasattr(of.get(name), "scales"):
            parameter.data = of[name].weight.dequantized()
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_kind_computes_what_its_dequantized_matrices_do(kind, bits):
    layer = layer_of(KINDS[kind])
    quantized = core.quantize_experts(copy.deepcopy(layer), bits)
    x = torch.randn(2, 16, 12)
    expected = dequantized(layer, quantized)(x)
    assert not torch.equal(expected, layer(x))
    with torch.no_grad():
        for backend in BACKENDS:
            quantized.backend = backend
            torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("router", "options"),
    [
        (core.ExpertChoice(), {}),
        (core.SoftSlots(), {}),
        (core.Merge(), {}),
        (core.Dense(), {}),
        (core.TokenChoice(2), {"num_shared_experts": 1}),
    ],
)
@pytest.mark.parametrize("kind", ["FFN", "LoRA", "GeneralFFN"])
def test_so_does_every_way_of_asking(router, options, kind):
    if kind == "LoRA" and options:
        options = {"num_shared_experts": 1, "shared_expert": core.LoRA(2)}
    layer = layer_of(KINDS[kind], router, **options)
    quantized = core.quantize_experts(copy.deepcopy(layer), 4, group_size=2)
    x = torch.randn(2, 8, 12)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), dequantized(layer, quantized)(x), rtol=1e-5, atol=1e-5)
    if layer.shared_experts is not None:
        assert quantized.shared_experts.is_quantized


@pytest.mark.parametrize(
    "config", [core.MMoE(3), core.CGC(1, num_task_experts=1), core.OMoE(3), core.HoME(1), core.STAR()]
)
def test_so_do_layers_of_several_gates(config):
    torch.manual_seed(0)
    of_domains = isinstance(config, core.STAR)
    layer = config.build(8, 2, 3 if of_domains else 0).eval()
    quantized = core.quantize_experts(copy.deepcopy(layer), 8)
    x = torch.randn(6, 8)
    given = (core.RoutingContext(domain_ids_B=torch.arange(6) % 3),) if of_domains else ()
    with torch.no_grad():
        torch.testing.assert_close(quantized(x, *given), dequantized(layer, quantized)(x, *given), rtol=1e-5, atol=1e-5)
    assert core.active_params(quantized) == core.active_params(layer)


def test_buffers_stand_where_the_matrices_were():
    layer = layer_of(core.FFN(24, bias=True))
    state = core.quantize_experts(layer, 4, group_size=6).experts.state_dict()
    names = {name: tuple(t.shape) for name, t in state.items()}
    assert names == {
        "b_in": (4, 24),
        "b_out": (4, 12),
        "w_in.values": (4, 6, 24),  # two of the 12 inputs a byte
        "w_in.scales": (4, 2, 24),
        "w_out.values": (4, 12, 12),
        "w_out.scales": (4, 4, 12),
    }
    own = layer.experts.weights_of(3)
    assert {name: tuple(t.shape) for name, t in own.items()} == {name: shape[1:] for name, shape in names.items()}
    assert layer.experts.num_local_experts == 4
    layer.experts.w_in.values.zero_()
    assert not own["w_in.values"].any()  # a view


def test_saved_loaded_and_copied_it_puts_out_the_same():
    first, other = (core.quantize_experts(layer_of(core.SwiGLU(24)), 4, 3) for _ in range(2))
    x = torch.randn(2, 8, 12)
    with torch.no_grad():
        expected = first(x)
        for tensor in other.state_dict().values():
            tensor.zero_()
        other.load_state_dict(copy.deepcopy(first.state_dict()))
        for layer in (other, copy.deepcopy(first)):
            assert torch.equal(layer(x), expected)
    with pytest.raises(RuntimeError, match="w_in"):
        layer_of(core.SwiGLU(24)).load_state_dict(first.state_dict())


def test_offloaded_it_puts_out_the_same():
    layer = core.quantize_experts(layer_of(core.FFN(24, bias=True)), 4, group_size=6)
    x = torch.randn(2, 8, 12)
    with torch.no_grad():
        expected = layer(x)
        offloaded = core.offload_experts(layer, core.expert_bytes(layer) // 2)
        torch.testing.assert_close(layer(x), expected)
    assert offloaded.statistics.misses


def test_cast_to_half_precision_it_computes_in_it():
    layer = core.quantize_experts(layer_of(core.FFN(24)), 8)
    x = torch.randn(2, 8, 12).bfloat16()
    with torch.no_grad():
        expected = layer(x.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(layer(x.float()).float(), expected, rtol=3e-2, atol=3e-2)
        layer = layer.bfloat16()
        assert layer.experts.w_in.values.dtype == torch.int8
        y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
        in_half = core.quantize_experts(layer_of(core.FFN(24)).bfloat16(), 8)
        torch.testing.assert_close(in_half(x).float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_exported_it_puts_out_the_same():
    layer = core.quantize_experts(layer_of(KINDS["Mixed"]), 4, group_size=2)
    x, longer, dynamic = torch.randn(2, 8, 12), torch.randn(3, 5, 12), torch.export.Dim.DYNAMIC
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: dynamic, 1: dynamic}, None)[:1])
        torch.testing.assert_close(program.module()(longer), layer(longer))
    assert all(not value.is_floating_point() for name, value in program.state_dict.items() if "values" in name)


def test_what_is_counted_is_that_of_the_model():
    layer = layer_of(core.SwiGLU(24), num_shared_experts=1)
    x = torch.randn(1, 8, 12)
    before = core.num_params(layer), core.active_params(layer), core.count_flops(layer, x)
    assert core.expert_bytes(layer) == 5 * 3 * 12 * 24 * 4
    core.quantize_experts(layer, 4)
    assert (core.num_params(layer), core.active_params(layer), core.count_flops(layer, x)) == before
    # Half a byte a number; 24, 24 and 12 channels with a scale of 4 bytes.
    assert core.expert_bytes(layer) == 5 * (3 * 12 * 24 // 2 + (24 + 24 + 12) * 4)
    sparse = core.sparsify(
        torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)),
        core.MoEConfig(4),
        modules="",
    )
    before, after = core.summary(sparse), core.summary(core.quantize_experts(sparse, 8))
    assert (after.params_after, after.active_params) == (before.params_after, before.active_params)
    assert after.expert_bytes == core.expert_bytes(sparse) < before.expert_bytes
    assert f"bytes of the experts {after.expert_bytes:,}" in str(after)


@pytest.mark.parametrize("backend, bits", [("eager", 8), ("cpu", 4), ("cpu", 8), ("grouped", 4)])
def test_gradients_pass_through_frozen_matrices(backend, bits):
    layer = core.quantize_experts(layer_of(core.FFN(24, bias=True)), bits)
    other = layer_of(core.FFN(24, bias=True))
    for name in ("w_in", "w_out"):
        getattr(other.experts, name).data = getattr(layer.experts, name).weight.dequantized()
    assert not any(p.requires_grad for p in layer.experts.parameters())
    x, grads = torch.randn(2, 8, 12), []
    for own in (layer, other):
        own.backend = backend
        x_own = x.clone().requires_grad_()
        own(x_own).square().sum().backward()
        grads.append((x_own.grad, *(p.grad for p in own.router.parameters())))
    for quantized, plain in zip(*grads, strict=True):
        torch.testing.assert_close(quantized, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_what_is_refused():
    for bits, group_size, rule in (
        (3, None, "experts.w_in cannot be quantized: bits=3 is not one of 4, 8"),
        (8, 8, "experts.w_in cannot be quantized: group_size=8 does not divide the 12 inputs"),
        (4, 7, "group_size=7 does not divide"),
    ):
        layer = layer_of(core.FFN(24))
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(ValueError, match=rule):
            core.quantize_experts(layer, bits, group_size)
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    layer = layer_of(core.FFN(24))
    layer.experts.w_out.data[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"experts.w_out has weights that are not finite"):
        core.quantize_experts(layer)
    assert not layer.experts.is_quantized
    with pytest.raises(ValueError, match="a Linear has no experts with matrices to quantize"):
        core.quantize_experts(torch.nn.Linear(2, 2))
    layer = core.quantize_experts(layer_of(core.FFN(24)))
    with pytest.raises(ValueError, match="the experts experts are quantized already"):
        core.quantize_experts(layer)
    offloaded = layer_of(core.FFN(24))
    _kept = core.offload_experts(offloaded, 2 * core.expert_bytes(offloaded) // 4)
    with pytest.raises(ValueError, match="the experts experts are offloaded: they are quantized before"):
        core.quantize_experts(offloaded)
    with pytest.raises(ValueError, match="are quantized and cannot be initialized"):
        layer.experts.init_each(torch.nn.init.xavier_uniform_)
    if torch.accelerator.is_available():
        return
    layer.experts.w_in.to("meta")
    with pytest.raises(ValueError, match=r"FFNExperts.w_in.values is on device meta"):
        layer(torch.randn(2, 8, 12))


def test_conversions_come_before():
    layer = core.quantize_experts(layer_of(core.FFN(24)), 8)
    for convert in (
        lambda: core.keep_experts(layer, [0, 1]),
        lambda: core.grow_experts(layer, 1),
        lambda: core.average_experts(layer),
        lambda: core.densify(layer),
        lambda: core.cut_out(layer, expert=0),
    ):
        with pytest.raises(ValueError, match=r"FFNExperts are quantized: .* before core\.quantize_experts"):
            convert()
