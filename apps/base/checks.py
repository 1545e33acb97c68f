"""Checks of options. Each raises a ValueError of one line that names the value and the rule."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from apps.base.messages import unknown_name

INSTALL = 'pip install -e ".[{}]" in the source tree of moesaic'
"""What to type for an extra of this package, which is on no index."""


def check_at_least(least: float, **values: float | None) -> None:
    """Raise a ValueError that names the first value below ``least``; None is not a value."""
    for name, value in values.items():
        if value is not None and not value >= least:  # also a NaN
            rule = "not be negative" if least == 0 else f"be at least {least:g}"
            raise ValueError(f"{name}={value} must {rule}")


def check_name(option: str, value: str, valid: Sequence[str]) -> None:
    """Raise a ValueError for a name that is not in ``valid``; it names the nearest one."""
    if value not in valid:
        raise ValueError(unknown_name(option, value, list(valid)))


def check_installed(what: str, names: Sequence[str], extra: str) -> None:
    """Raise a ValueError that says how to install the first of the packages that is missing and ``what`` needs."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{what} needs {name}, which is not installed: {INSTALL.format(extra)}")
