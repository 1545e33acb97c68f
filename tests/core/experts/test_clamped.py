"""Gated experts with clamps, a slope, a shift and biases of both halves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from core import ClampedSwiGLU, MoEConfig, SwiGLU, TokenChoice


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        # g = x + 0.5, u = 2 x - 1, y = 3 (u + 1) g sigmoid(1.702 g) + 0.25.
        (0.5, 3 * (0.0 + 1) * 1.0 * sigmoid(1.702) + 0.25),
        # g = 4.5 is clamped to 2 and u = 7 to 2.
        (4.0, 3 * (2.0 + 1) * 2.0 * sigmoid(1.702 * 2) + 0.25),
        # g = -2.5 has no limit below; u = -7 is clamped to -2.
        (-3.0, 3 * (-2.0 + 1) * -2.5 * sigmoid(1.702 * -2.5) + 0.25),
    ],
)
def test_an_expert_by_hand(x, expected):
    experts = ClampedSwiGLU(1, bias=True, limit=2.0, alpha=1.702, shift=1.0).build(1, 1)
    values = {"w_gate": 1.0, "b_gate": 0.5, "w_in": 2.0, "b_in": -1.0, "w_out": 3.0, "b_out": 0.25}
    with torch.no_grad():
        for name, value in experts.weights_of(0).items():
            value.fill_(values[name])
    assert experts(torch.tensor([[x]]), "each").item() == pytest.approx(expected, rel=1e-6)


def test_without_limits_it_is_swiglu():
    plain, clamped = SwiGLU(6).build(3, 4), ClampedSwiGLU(6, limit=None).build(3, 4)
    clamped.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(clamped(x, "each"), plain(x, "each"))
    assert (ClampedSwiGLU().hidden(48), SwiGLU().hidden(48)) == (128, 128)


def test_numbers_beyond_a_limit_have_no_gradient():
    experts = ClampedSwiGLU(1, limit=1.0).build(1, 1)
    with torch.no_grad():
        for value in experts.weights_of(0).values():
            value.fill_(1.0)
    x = torch.tensor([[2.0], [-2.0], [0.5]], requires_grad=True)
    experts(x, "each").sum().backward()
    # Both halves are clamped at 2; at -2 the gate alone is not, and u = -1 stays.
    g = torch.tensor([-2.0], requires_grad=True)
    (-F.silu(g)).sum().backward()
    assert x.grad[:2, 0].tolist() == pytest.approx([0.0, g.grad.item()])


def test_finer_experts_are_narrower_ones():
    config = MoEConfig(5, TokenChoice(2), ClampedSwiGLU(6, bias=True))
    # 3 * 4 * 6 = 72 weights, and 2 * 6 + 4 biases.
    assert config.num_params(4) == 5 * (72 + 16) + 4 * 5
    assert replace(config, granularity=3).build(4).experts.w_gate.shape == (15, 4, 2)
    with pytest.raises(ValueError, match=r"^granularity=4 does not divide hidden_dim=6 of ClampedSwiGLU$"):
        replace(config, granularity=4)
