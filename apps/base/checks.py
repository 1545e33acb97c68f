"""Checks of options: each ends in one line that names the value and the rule."""

from __future__ import annotations

from collections.abc import Sequence

from apps.base.messages import unknown_name


def check_at_least(least: float, **values: float | None) -> None:
    """Refuse a value below ``least``; None is no value.

    Raises:
        ValueError: naming the first one.
    """
    for name, value in values.items():
        if value is not None and value < least:
            rule = "not be negative" if least == 0 else f"be at least {least:g}"
            raise ValueError(f"{name}={value} must {rule}")


def check_name(option: str, value: str, valid: Sequence[str]) -> None:
    """Refuse a name that is none of ``valid``.

    Raises:
        ValueError: naming it, and the nearest one.
    """
    if value not in valid:
        raise ValueError(unknown_name(option, value, list(valid)))
