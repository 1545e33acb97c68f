"""The splits of a dataset, and how much of it is held out for them."""

from __future__ import annotations

from typing import Literal

from apps.base.checks import check_at_least

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def check_size(name: str, size: int | float | None) -> None:
    """Refuse a size that is neither a number of examples nor a share of them.

    Raises:
        ValueError: a negative size, or a share that is not below 1.
    """
    check_at_least(0, **{name: size})
    if isinstance(size, float) and size >= 1:
        raise ValueError(f"{name}={size} is neither a whole number nor a share below 1")


def count_of(size: int | float, total: int) -> int:
    """Return the number of examples that a size means: a share of ``total`` where it is below 1."""
    return round(size * total) if size < 1 else int(size)
