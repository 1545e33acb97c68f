"""The MoE layer against its definition: output, batch-mates, padding, shapes, state."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from layered import BACKENDS, EVERY_TERM, Net, identity_gate
from torch import Tensor

import core


def naive(layer: core.MoE, x: Tensor) -> Tensor:
    """Compute the definition, token by token: top-k of the logits, softmax of the chosen, the sum over experts."""
    experts, K = layer.experts, layer.router.config.top_k
    act = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[experts.activation]
    out = []
    for token in x.flatten(0, -2):
        logits = layer.router.gate.weight @ token
        chosen = logits.topk(K)
        gates = chosen.values.softmax(-1) if K > 1 else logits.softmax(-1)[chosen.indices]
        y = torch.zeros(experts.w_out.shape[-1])
        for gate, e in zip(gates, chosen.indices.tolist(), strict=True):
            up = token @ experts.w_in[e] + (0 if experts.b_in is None else experts.b_in[e])
            h = act(up) if experts.w_gate is None else act(token @ experts.w_gate[e]) * up
            y = y + gate * (h @ experts.w_out[e] + (0 if experts.b_out is None else experts.b_out[e]))
        out.append(y)
    return torch.stack(out).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    "backend, top_k, expert",
    [
        ("eager", 1, core.FFN(10, bias=True)),
        ("cpu", 2, core.SwiGLU(10)),
        ("grouped", 4, core.GEGLU(10)),
        ("triton", 1, core.SwiGLU(10)),
        ("cpu", 1, core.FFN(10, bias=True)),
    ],
    ids=str,
)
def test_layer_equals_its_definition_token_by_token(backend, top_k, expert):
    layer = core.MoEConfig(4, core.TokenChoice(top_k, init_scale=1.0), expert, backend=backend).build(6, out_dim=5)
    x = torch.randn(2, 7, 6)
    expected = naive(layer, x)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    # Every gradient, through the gates to the router too.
    inputs = list(layer.parameters())
    dy = torch.randn_like(y)
    for actual, wanted in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_with_capacity_by_batch_a_batch_mate_may_take_a_tokens_place_and_by_sequence_it_may_not():
    # Two sequences of two tokens; experts take ceil(0.5 * 4 / 2) = 1 by batch, ceil(0.5 * 2 / 2) = 1 by sequence.
    busy, quiet = [[3.0, 0.0], [3.0, 0.0]], [[0.0, 3.0], [0.0, 3.0]]
    ours = [[2.0, 0.0], [2.0, 0.0]]
    outputs = {}
    for group in ("batch", "sequence"):
        layer = identity_gate(
            core.MoEConfig(2, core.TokenChoice(1), core.FFN(4), capacity_factor=0.5, group=group).build(2).double()
        )
        for name, mate in (("busy", busy), ("quiet", quiet)):
            outputs[group, name] = layer(torch.tensor([mate, ours]).double())[1]
    # The busy mate takes expert 0's one place; the quiet one leaves it to our first token.
    assert outputs["batch", "busy"].abs().max() == 0
    assert outputs["batch", "quiet"][0].abs().max() > 0
    assert torch.equal(outputs["sequence", "busy"], outputs["sequence", "quiet"])
    assert outputs["sequence", "busy"][0].abs().max() > 0


def test_nan_in_padding_leaves_the_gradients_of_shared_experts_finite():
    layer = core.MoEConfig(4, num_shared_experts=1).build(8)
    x = torch.randn(1, 4, 8)
    x[0, 3] = torch.nan
    valid = torch.tensor([[True, True, True, False]])
    y = layer(x, core.RoutingContext(valid_BS=valid))
    y.sum().backward()
    assert not y[~valid].any()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("mixed", [False, True])
def test_padding_is_not_in_the_statistics_of_shared_experts(backend, mixed):
    shared = core.MLP((8,), norm="batch")
    options = {"shared_expert": core.Mixed((shared, shared), (1, 1)) if mixed else shared, "num_shared_experts": 2}
    padded = core.MoEConfig(4, backend=backend, **options).build(8)
    alone, x = copy.deepcopy(padded), torch.randn(2, 6, 8)
    valid = torch.arange(6) < torch.tensor([[4], [4]])
    actual, expected = padded(x, core.RoutingContext(valid_BS=valid)), alone(x[:, :4])
    torch.testing.assert_close(actual[:, :4], expected, rtol=1e-5, atol=1e-6)
    for kept, other in zip(padded.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(kept, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_run_forward_and_backward(backend):
    for shape, options in (
        ((0, 5, 8), {"capacity_factor": 0.5, "group": "sequence"}),
        ((2, 0, 8), {"num_shared_experts": 1}),
        ((0, 8), {}),
    ):
        layer = core.MoEConfig(4, expert=core.FFN(6, bias=True), balance=EVERY_TERM, backend=backend, **options).build(
            8
        )
        x = torch.zeros(shape, requires_grad=True)
        with core.record(layer) as tape:
            y = layer(x)
        assert y.shape == shape
        (y.sum() + core.aux_loss(tape)).backward()
        assert x.grad.shape == shape
        for name, p in layer.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().max() == 0, name
        assert tape.entries[0].routing.tokens_per_expert_E.tolist() == [0, 0, 0, 0]


def test_leading_dimensions_are_kept_and_those_before_the_tokens_are_sequences():
    layer = core.MoEConfig(2, core.TokenChoice(1), capacity_factor=0.5, group="sequence").build(8, out_dim=5)
    for shape in ((6, 8), (2, 3, 8), (2, 3, 4, 8), (1, 2, 3, 4, 8)):
        x = torch.randn(shape)
        y = layer(x)
        assert y.shape == (*shape[:-1], 5)
        alone = layer(x.reshape(-1, *shape[-2:]))  # (sequences, tokens, D)
        torch.testing.assert_close(y.reshape(alone.shape), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "x, valid_BS, message",
    [
        (torch.zeros(8), None, r"x has shape \(8,\): an MoE layer needs at least \(tokens, dim\)"),
        (
            *(torch.zeros(2, 3, 8), torch.ones(3, 2, dtype=torch.bool)),
            r"context.valid_BS has shape \(3, 2\), the tokens \(2, 3\)",
        ),
        (torch.zeros(2, 3, 8), torch.ones(2, 3), r"context.valid_BS is torch.float32: it must be"),
    ],
)
def test_wrong_inputs_are_refused_with_what_they_are(x, valid_BS, message):
    with pytest.raises(ValueError, match=message):
        core.MoEConfig(4).build(8)(x, core.RoutingContext(valid_BS=valid_BS))


@pytest.mark.parametrize(
    "config",
    [
        core.MoEConfig(4),
        # A gate without weights: it is the experts' products that would pad or cut theirs.
        core.MoEConfig(4, core.Hash(vocab_size=9), core.MLP((8,))),
        core.MoEConfig(4, core.Hash(vocab_size=9), backend="grouped"),
        core.MoEConfig(4, core.SoftSlots(), balance=core.Balance(0, 0)),
        core.MoEConfig(4, core.Merge("smear"), balance=core.Balance(0, 0)),
    ],
    ids=["top-2", "mlp", "grouped", "soft", "merged"],
)
def test_tokens_of_another_width_are_refused(config):
    context = core.RoutingContext(token_ids_BS=torch.arange(6).view(2, 3))
    for width in (0, 6, 10):
        with pytest.raises(ValueError, match=f"x has width {width}, the layer is for dim=8"):
            config.build(8)(torch.zeros(2, 3, width), context)


def test_moe_layers_are_listed_by_name_in_module_order():
    net = Net()
    assert list(core.moe_layers(net)) == ["blocks.0", "blocks.1"]
    assert list(core.moe_layers(net.blocks[0])) == [""]
    assert core.moe_layers(net.stem) == {}
