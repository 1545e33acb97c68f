"""Feed-forward experts of any activation, biases and dropout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from core import FFN, GeneralFFN, MoEConfig, SwiGLU, TokenChoice


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_gated_expert_by_hand():
    experts = GeneralFFN(1, "sigmoid", gated=True, bias_gate=True, bias_out=False).build(1, 1)
    values = {"w_gate": 1.0, "b_gate": 0.5, "w_in": 2.0, "b_in": -1.0, "w_out": 3.0}
    with torch.no_grad():
        for name, value in experts.weights_of(0).items():
            value.fill_(values[name])
    # sigmoid(x + 0.5) (2 x - 1) 3 at x = 2.
    assert experts(torch.tensor([[2.0]]), "each").item() == pytest.approx(sigmoid(2.5) * 3 * 3, rel=1e-6)
    with pytest.raises(ValueError, match="bias_gate=True needs gated=True"):
        GeneralFFN(bias_gate=True)


@pytest.mark.parametrize(
    ("general", "plain"),
    [
        (GeneralFFN(6, "relu"), FFN(6, "relu", bias=True)),
        (GeneralFFN(6, "silu", gated=True, bias_in=False, bias_out=False), SwiGLU(6)),
    ],
)
def test_it_is_the_plain_expert_where_that_computes_the_same(general, plain):
    layers = [MoEConfig(3, TokenChoice(2), expert).build(4) for expert in (plain, general)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(layers[1](x), layers[0](x))
    assert general.num_params(4, 5) == plain.num_params(4, 5)
    assert general.flops_per_row(4, 5) == plain.flops_per_row(4, 5)


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        ("relu2", lambda x: F.relu(x) ** 2),
        ("mish", torch.nn.Mish()),
        ("leaky_relu", torch.nn.LeakyReLU()),
    ],
)
def test_activations_are_torch_s(name, act):
    experts = GeneralFFN(3, name, bias_in=False, bias_out=False).build(1, 2)
    x, weights = torch.randn(4, 2), experts.weights_of(0)
    torch.testing.assert_close(experts(x, "dense"), act(x @ weights["w_in"]) @ weights["w_out"])


def test_dropout_is_of_the_hidden_layer_in_training_alone():
    experts = GeneralFFN(1000, "relu", bias_in=False, bias_out=False, dropout=0.25).build(1, 1)
    with torch.no_grad():
        for value in experts.weights_of(0).values():
            value.fill_(1.0)
    x, output = torch.ones(1, 1), 1000.0
    assert experts.eval()(x, "dense").item() == output
    kept = experts.train()(x, "dense").item() * 0.75  # each of those kept counts 1 / 0.75
    assert kept == pytest.approx(round(kept), abs=1e-2)
    assert 680 < kept < 820  # 750 of 1000, with a standard deviation of 14
