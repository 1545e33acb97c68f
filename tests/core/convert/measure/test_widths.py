"""Widths of equal cost, by hand."""

from __future__ import annotations

import pytest

import core
from core.convert import hidden_width, nearest_width, same_width, solve_width, widened


def test_the_nearest_width_by_hand():
    # A unit costs 16: 40 lies between two and three units and 41 is nearer to three. Nothing is narrower than one.
    assert [nearest_width(lambda width: 16 * width, target) for target in (39, 41, 160, 1)] == [2, 3, 10, 1]


def test_a_width_that_is_not_near_enough_has_a_problem():
    assert solve_width(lambda width: 16 * width, 163, "flops") == (10, "")
    assert solve_width(lambda width: 16 * width, 24, "flops").problem == "no whole width comes within 5% of 24 flops"


def test_widths_within_a_percent_are_the_same_model():
    assert same_width(100, 101)
    assert not same_width(100, 102)


def test_all_kinds_of_mixed_experts_grow_alike():
    mixed = core.Mixed((core.FFN(8), core.Zero(), core.SwiGLU(4)), (2, 1, 1))
    assert widened(mixed, 16) == core.Mixed((core.FFN(16), core.Zero(), core.SwiGLU(8)), (2, 1, 1))
    assert [hidden_width(kind) for kind in (mixed, core.FFN(8), core.MLP((8, 4)))] == [
        "dims 8, 4",
        "dim 8",
        "dims 8, 4",
    ]
    with pytest.raises(ValueError, match="none of the Mixed experts has a hidden_dim"):
        widened(core.Mixed((core.Zero(), core.Identity()), (1, 1)), 16)
