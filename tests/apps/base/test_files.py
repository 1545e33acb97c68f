"""Files that are written whole or not at all, and held by one process."""

from __future__ import annotations

import pytest
from commands import full_disk

from apps.base.files import holding, replacing


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with full_disk(1000), pytest.raises(OSError, match=r"too large: '.*plan.json'"), replacing(path) as file:
        file.write("new" * 1000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_has_left_beside_a_file_goes_and_what_is_being_written_stays(tmp_path):
    path = tmp_path / "ladder.json"
    (tmp_path / ".ladder.json.0a1b2c3d.tmp").write_text("half")
    (tmp_path / ".ladder.json.mine.tmp").write_text("of a user")
    with replacing(path) as other:  # of a second process
        with replacing(path) as file:
            file.write("whole")
        other.write("later")
    assert path.read_text() == "later"
    assert {p.name for p in tmp_path.iterdir()} == {"ladder.json", ".ladder.json.mine.tmp"}


def test_a_lock_is_held_by_one_and_free_after_it(tmp_path):
    with (
        holding(tmp_path / ".lock", "held by none before"),
        pytest.raises(ValueError, match="it is busy"),
        holding(tmp_path / ".lock", "it is busy"),
    ):
        pass
    with holding(tmp_path / ".lock", "it is busy"):
        pass
