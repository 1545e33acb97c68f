"""Arrays in files come back as they were written, and it is noticed when they are not."""

from __future__ import annotations

import errno
import os
import pickle

import numpy as np
import pytest
import torch

from apps.data.array_files import ArrayFiles, ArrayWriter, Damaged, read_texts, save_texts


def write(folder):
    folder.mkdir(exist_ok=True)
    writer = ArrayWriter(folder)
    writer.save("a", np.arange(6, dtype=np.int32).reshape(3, 2))
    writer.create("b", (4,), np.float32)[:] = 0.5
    writer.save("empty", np.empty((3, 0), np.int64))
    writer.finish({"name": "é"})
    writer.close()


def test_arrays_come_back_as_tensors_and_survive_pickling(tmp_path):
    write(tmp_path / "t")
    files = ArrayFiles(tmp_path / "t")
    for arrays in (files, pickle.loads(pickle.dumps(files))):
        assert torch.equal(arrays["a"], torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32))
        assert arrays["b"].tolist() == [0.5] * 4
        assert arrays["empty"].shape == (3, 0)
        assert arrays.info == {"name": "é"}
        assert "a" in arrays
        assert "c" not in arrays
    assert len(pickle.dumps(files)) < 500  # the path alone, not the table
    files["a"][0, 0] = 9  # a private copy of the page: the file is not touched
    assert ArrayFiles(tmp_path / "t")["a"][0, 0] == 0


def test_a_cut_or_missing_file_is_noticed(tmp_path):
    write(tmp_path / "t")
    os.truncate(tmp_path / "t" / "a.npy", 20)
    with pytest.raises(Damaged, match=r"a\.npy has 20 bytes, not 152"):  # a header of 128 and 6 numbers of 4
        ArrayFiles(tmp_path / "t")
    (tmp_path / "t" / "a.npy").unlink()
    with pytest.raises(Damaged, match=r"a\.npy is missing"):
        ArrayFiles(tmp_path / "t")
    os.truncate(tmp_path / "t" / "manifest.json", 20)
    with pytest.raises(Damaged, match=r"manifest\.json cannot be read"):
        ArrayFiles(tmp_path / "t")


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path, monkeypatch):
    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path)


def test_texts_are_two_arrays(tmp_path):
    writer = ArrayWriter(tmp_path)
    save_texts(writer, "name", ["é", "", "ab"])
    save_texts(writer, "none", [])
    writer.finish({})
    writer.close()
    files = ArrayFiles(tmp_path)
    assert files["name_bounds"].tolist() == [0, 2, 2, 4]  # é has two bytes
    assert read_texts(files, "name") == ["é", "", "ab"]
    assert read_texts(files, "none") == []
