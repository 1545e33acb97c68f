"""Calls that must be refused in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def refused(message: str, call: Callable[[], object]) -> None:
    """Check that a call raises a ``ValueError`` of one line in which ``message``, a pattern, is found."""
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
