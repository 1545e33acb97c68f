"""Dense FFNs of equal cost, by hand."""

from __future__ import annotations

import pytest

import core
from apps.equal_cost.comparable import equal_widths


# D = 4. Plain: 2 * 2 * 4 F FLOPs, 2 * 4 F parameters, with biases F + 4 more. Gated: 3 in place of 2 matrices, 2 F + 4.
@pytest.mark.parametrize(
    "gated, bias, flops, params",
    [(False, True, 160, 94), (False, False, 160, 80), (True, True, 240, 144), (True, False, 240, 120)],
)
def test_a_hidden_dim_of_10_costs_so_much(gated, bias, flops, params):
    widths = equal_widths("dense", core.DenseFFN(gated=gated, bias=bias), 4, flops, params)
    assert widths == {"dense_equal_flops": (10, ""), "dense_equal_params": (10, "")}


def test_a_cost_between_two_widths_is_refused_where_neither_is_near():
    # One hidden unit costs 16 FLOPs, two 32: 24 is a third off both, and 163 is 10.2 units.
    widths = equal_widths("dense", core.DenseFFN(), 4, 24, 94, each=" a block")
    assert widths["dense_equal_flops"].problem == "no whole width comes within 5% of 24 flops a block"
    assert equal_widths("dense", core.DenseFFN(), 4, 163, 94)["dense_equal_flops"] == (10, "")
