"""What has to be refused, in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def refused(rule: str, call: Callable[..., object], *arguments: object, **options: object) -> None:
    """Check that a call raises a ValueError whose message is one line that ``rule`` matches."""
    with pytest.raises(ValueError, match=rule) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value), error.value
