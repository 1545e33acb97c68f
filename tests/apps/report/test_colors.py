"""Colors of experts, and of what is written on them."""

from __future__ import annotations

import pytest

from apps.report.colors import color_of, expert_colors, ink_on


@pytest.mark.parametrize("num_experts", [2, 8, 9, 64, 256])
def test_colors_of_experts_differ(num_experts):
    assert len(set(expert_colors(num_experts))) == num_experts


def test_what_is_written_on_a_color_is_clear():
    assert (ink_on("#0072B2"), ink_on("#F0E442")) == ("#fff", "#000")


def test_a_label_has_the_color_of_its_first_number():
    colors = expert_colors(4)
    assert [color_of(label, colors) for label in ("3 1", "4", "", "x")] == [colors[3], None, None, None]
