"""Files that are written whole or not at all, and held by one process."""

from __future__ import annotations

import pytest

from apps.base.files import holding


def test_a_lock_is_held_by_one_and_free_after_it(tmp_path):
    with (
        holding(tmp_path / ".lock", "held by none before"),
        pytest.raises(ValueError, match="it is busy"),
        holding(tmp_path / ".lock", "it is busy"),
    ):
        pass
    with holding(tmp_path / ".lock", "it is busy"):
        pass
