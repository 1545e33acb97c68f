"""A bias of the layer's output (JetMoE, arXiv 2404.07413)."""

from __future__ import annotations

import pytest
import torch

from core import FFN, MLP, Merge, MoEConfig, RoutingContext, SoftSlots, TokenChoice, active_params

BIASED = MoEConfig(4, expert=FFN(8), output_bias=True)


@pytest.mark.parametrize("router", [TokenChoice(2), SoftSlots(), Merge()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("shared", [{}, {"num_shared_experts": 1, "shared_gate": "mix"}], ids=["alone", "shared"])
def test_it_is_added_to_every_token_once(router, shared):
    layer = MoEConfig(4, router, FFN(8), output_bias=True, **shared).build(6, 5)
    x = torch.randn(2, 3, 6)
    before = layer(x)
    bias = torch.arange(5.0)
    layer.output_bias.data.copy_(bias)
    torch.testing.assert_close(layer(x), before + bias)
    valid = RoutingContext(torch.tensor([[True, True, False], [True, True, True]]))
    layer(x, valid).sum().backward()
    assert layer.output_bias.grad.tolist() == [6.0] * 5  # padding too


@pytest.mark.parametrize(("config", "width"), [(BIASED, 6), (MoEConfig(4, expert=MLP((3,)), output_bias=True), 3)])
def test_it_counts_as_parameters(config, width):
    layer = config.build(6)
    assert layer.output_bias.shape == (width,)
    assert config.num_params(6) == sum(p.numel() for p in layer.parameters())
    assert config.active_params(6) == active_params(layer)
    assert MoEConfig.from_dict(config.to_dict()) == config
    assert "output_bias" not in MoEConfig(4, expert=FFN(8)).build(6).state_dict()


def test_it_starts_at_zero_and_keeps_the_dtype():
    with torch.device("meta"):
        layer = BIASED.build(6)
    layer.to_empty(device="cpu").output_bias.data.fill_(77)
    layer.reset_parameters()
    assert not layer.output_bias.any()
    x = torch.randn(1, 4, 6)
    assert BIASED.build(6).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert BIASED.build(6)(x).dtype == MoEConfig(4, expert=FFN(8)).build(6)(x).dtype
