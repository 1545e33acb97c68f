"""``DenseFFN``: the equation, the costs, and what is refused."""

import pytest
import torch
from torch.testing import assert_close

import core


def test_a_plain_ffn_and_quick_gelu_by_hand():
    # D = 1, F = 2: relu(2 * 3 + 1) = 7 and relu(2 * -1 + 0) = 0; 7 * 0.5 + 0 * 4 + 10 = 13.5.
    layer = core.DenseFFN(2, "relu").build(1).double()
    layer.load_state_dict(
        {
            "w_in.weight": torch.tensor([[3.0], [-1.0]]),
            "w_in.bias": torch.tensor([1.0, 0.0]),
            "w_out.weight": torch.tensor([[0.5, 4.0]]),
            "w_out.bias": torch.tensor([10.0]),
        }
    )
    assert layer(torch.tensor([[2.0]], dtype=torch.float64)).item() == 13.5
    # x sigmoid(1.702 x): at 1 it is 1 / (1 + e^-1.702) = 0.845796.
    layer = core.DenseFFN(1, "quick_gelu", bias=False).build(1)
    layer.w_in.weight.data.fill_(1.0)
    layer.w_out.weight.data.fill_(1.0)
    assert layer(torch.ones(1, 1)).item() == pytest.approx(0.845796, rel=1e-5)


def test_a_gated_ffn_is_the_expert_of_the_same_kind():
    dense, expert = core.DenseFFN(6, "silu", gated=True, bias=False).build(4), core.SwiGLU(6).build(1, 4)
    with torch.no_grad():
        for name in ("w_in", "w_gate", "w_out"):
            getattr(expert, name)[0].copy_(getattr(dense, name).weight.T)
        x = torch.randn(5, 4)
        assert_close(dense(x), expert(x, "dense"))


@pytest.mark.parametrize("bias", [False, True])
def test_costs_are_those_of_the_layer(bias):
    for gated, flops in ((False, 160), (True, 240)):  # one token: 2 or 3 products of 4 x 10, two FLOPs a multiply-add
        config = core.DenseFFN(10, gated=gated, bias=bias)
        layer = config.build(4)
        assert config.num_params(4) == config.active_params(4) == sum(p.numel() for p in layer.parameters())
        assert config.flops_per_token(4) == flops == core.count_flops(layer, torch.randn(1, 4))


def test_the_hidden_dim_is_four_times_the_width_unless_it_is_given_and_is_dropped_out_in_training_alone():
    assert core.DenseFFN().build(8).w_in.weight.shape == (32, 8)
    assert core.DenseFFN(5).build(8, out_dim=3).w_out.weight.shape == (3, 5)
    layer, x = core.DenseFFN(64, "relu", dropout=0.5).build(4), torch.randn(3, 4)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
