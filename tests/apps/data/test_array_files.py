"""Column files: complete or not there, and noticed when they are not as they were written."""

from __future__ import annotations

import errno
import os
import pickle

import numpy as np
import pytest
import torch

from apps.data.array_files import ArrayFiles, ArrayWriter, Damaged
from apps.data.sources import DataError


def write(target):
    with ArrayWriter.open(target) as writer:
        writer.save("a", np.arange(6, dtype=np.int32).reshape(3, 2))
        writer.create("b", (4,), np.float32)[:] = 0.5
        writer.save("empty", np.empty((3, 0), np.int64))
        writer.finish({"name": "é"})


def test_arrays_come_back_as_tensors_and_survive_pickling(tmp_path):
    write(tmp_path / "t")
    files = ArrayFiles(tmp_path / "t")
    for found in (files, pickle.loads(pickle.dumps(files))):
        assert torch.equal(found["a"], torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32))
        assert found["b"].tolist() == [0.5] * 4
        assert found["empty"].shape == (3, 0)
        assert found.info == {"name": "é"}
        assert "a" in found
        assert "c" not in found
    assert len(pickle.dumps(files)) < 500  # the path alone, not the table
    files["a"][0, 0] = 9  # a private copy of the page: the file is not touched
    assert ArrayFiles(tmp_path / "t")["a"][0, 0] == 0


def test_a_block_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), ArrayWriter.open(tmp_path / "t") as writer:
        writer.save("a", np.zeros(3))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "t")
    with pytest.raises(RuntimeError), ArrayWriter.open(tmp_path / "t") as writer:
        raise RuntimeError
    assert ArrayFiles(tmp_path / "t")["b"].tolist() == [0.5] * 4


def test_what_a_killed_process_left_is_removed_and_a_damaged_folder_replaced(tmp_path):
    (tmp_path / ".t.killed").mkdir()
    (tmp_path / "t").mkdir()
    write(tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert ArrayFiles(tmp_path / "t").info == {"name": "é"}


def test_a_cut_or_missing_file_is_noticed(tmp_path):
    write(tmp_path / "t")
    os.truncate(tmp_path / "t" / "a.bin", 20)
    with pytest.raises(Damaged, match=r"a\.bin has 20 bytes, not 24"):
        ArrayFiles(tmp_path / "t")
    (tmp_path / "t" / "a.bin").unlink()
    with pytest.raises(Damaged, match=r"a\.bin is missing"):
        ArrayFiles(tmp_path / "t")
    os.truncate(tmp_path / "t" / "manifest.json", 20)
    with pytest.raises(Damaged, match=r"manifest\.json cannot be read"):
        ArrayFiles(tmp_path / "t")


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path, monkeypatch):
    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match="no disk space for the encoded data"):
        write(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file" / "t")
