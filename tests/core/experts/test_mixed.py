"""Experts of several kinds in one layer."""

from __future__ import annotations

import pytest
import torch

from core import FFN, MLP, Identity, Mixed, MoEConfig, SwiGLU, TokenChoice, Zero, active_params


def test_costs_are_those_of_each_kind_at_balance():
    config = MoEConfig(4, TokenChoice(2), Mixed((FFN(8), Zero(), Identity()), (2, 1, 1)))
    # An FFN has 2 * 4 * 8 = 64 parameters, the gate 4 * 4; a token takes 2 of 4 experts, half of which are FFNs.
    assert config.num_params(4) == 2 * 64 + 16
    assert config.active_params(4) == active_params(config.build(4)) == 64 + 16
    assert config.flops_per_token(4) == 2 * 64 + 2 * 16


def test_rows_of_each_kind_are_computed_by_it():
    layer = MoEConfig(6, TokenChoice(3), Mixed((FFN(8), Identity(), SwiGLU(16)), (3, 1, 2))).build(8)
    x = torch.randn(2, 9, 8)
    y, routing = layer(x).flatten(0, 1), layer.router(x)
    alone = layer.experts(x.flatten(0, 1), "each")
    # Expert 3 is the copy.
    torch.testing.assert_close(alone[:, 3], x.flatten(0, 1))
    expected = torch.zeros(18, 8)
    for t, e, gate in zip(routing.token_index_N, routing.expert_ids_N, routing.gates_N, strict=True):
        expected[t] += gate * alone[t, e]
    torch.testing.assert_close(y, expected)


def test_bad_mixtures_are_one_line():
    for build, message in (
        (lambda: Mixed((FFN(),), (1, 2)), "has 2 numbers for 1 experts"),
        (lambda: Mixed((Mixed((FFN(),), (1,)),), (1,)), "Mixed, which cannot be one of several kinds"),
        (lambda: MoEConfig(4, expert=Mixed((FFN(), Zero()), (1, 2))), "sum to 3, not to num_experts=4"),
        (lambda: MoEConfig(3, expert=Mixed((MLP((4,)), Zero()), (1, 2))).build(8), "widths 4, 8: they must agree"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_shared_experts_may_be_of_another_kind():
    config = MoEConfig(4, expert=FFN(8), num_shared_experts=2, shared_expert=FFN(16))
    layer = config.build(4)
    assert layer.shared_experts.w_in.shape == (2, 4, 16)
    assert config.num_params(4) == sum(p.numel() for p in layer.parameters())
    with pytest.raises(ValueError, match="needs num_shared_experts, which is 0"):
        MoEConfig(4, shared_expert=FFN(16))
