"""The cache's folders are complete or not there, and what the disk refuses is one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from apps.data.cache import DataError, cache_root, locked, whole_folder


def test_a_block_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "t") as folder:
        (folder / "a").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "t") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "t") as folder:
        raise RuntimeError
    assert (tmp_path / "t/a").read_text() == "old"


def test_what_a_killed_process_left_is_removed_and_an_old_folder_replaced(tmp_path: Path) -> None:
    for left in (".t.killed", ".t.old", "t"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "a").touch()
    with whole_folder(tmp_path / "t") as folder:
        (folder / "b").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["b"]
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o755  # others may read it


def fail_while_making_tea(cache: Path, error: Exception | None = None) -> str:
    with pytest.raises(DataError) as caught, locked(cache, "tea", "making tea"):
        if error is not None:
            raise error
    return str(caught.value)


def test_what_the_disk_refuses_is_one_line_that_names_the_cache_or_the_file(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = fail_while_making_tea(tmp_path, full)
    assert message.startswith(
        f"no disk space while making tea in cache_dir='{tmp_path}' (No space left on device): nothing"
    )
    (tmp_path / "file").touch()
    message = fail_while_making_tea(tmp_path / "file")
    assert message.startswith(f"cache_dir='{tmp_path}/file' cannot be written (")
    assert "set cache_dir (--data.cache_dir)" in message
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/data/own.csv")
    message = fail_while_making_tea(tmp_path / "cache", missing)
    assert message == "'/data/own.csv' cannot be read while making tea (No such file or directory)"


def test_the_default_cache_honors_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / "moesaic"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root(None) == tmp_path / "home/.cache/moesaic"
