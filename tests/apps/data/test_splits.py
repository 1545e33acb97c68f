"""Sizes of splits: a number of examples, or a share of all."""

from __future__ import annotations

import pytest

from apps.data.splits import check_size, count_of


def test_a_size_below_1_is_a_share():
    assert count_of(0.1, 25) == 2  # 2.5, to the even number
    assert count_of(0, 25) == 0
    assert count_of(1, 25) == 1


@pytest.mark.parametrize("size", [None, 0, 1, 5000, 0.0, 0.5])
def test_numbers_and_shares_are_sizes(size):
    check_size("val_size", size)


@pytest.mark.parametrize(
    "size, message",
    [
        (-1, "val_size=-1 must not be negative"),
        (1.0, "val_size=1.0 is neither an integer nor a share below 1"),
        (1.5, "val_size=1.5 is neither an integer nor a share below 1"),
    ],
)
def test_others_are_refused(size, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_size("val_size", size)
