"""The cache: folders are complete or not there, arrays come back as written, and entries are made once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from apps.data.array_files import ArrayFiles, ArrayWriter, Damaged, read_texts, save_texts
from apps.data.cache import DataError, cache_root, locked, whole_folder
from apps.data.store import EncodedStore, identity
from apps.data.subwords import SubwordConfig
from apps.nlp.language.data import TextData
from apps.nlp.text import encoded_pairs
from apps.recsys.sequence import data as sequence_data
from apps.recsys.sequence.data import HistoryData
from apps.recsys.tables import data as table_data
from apps.recsys.tables.data import TableData


def test_a_folder_is_whole_or_as_it_was_whatever_a_killed_process_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "t") as folder:
        (folder / "a").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "t") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "t") as folder:
        raise RuntimeError
    assert (tmp_path / "t/a").read_text() == "old"
    for left in (".t.killed", ".t.old"):
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
    line = f"no disk space while making tea in cache_dir='{tmp_path}' (No space left on device): nothing"
    assert fail_while_making_tea(tmp_path, full).startswith(line)
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


# ---- arrays in files


def write(folder):
    folder.mkdir(exist_ok=True)
    writer = ArrayWriter(folder)
    writer.save("a", np.arange(6, dtype=np.int32).reshape(3, 2))
    writer.create("b", (4,), np.float32)[:] = 0.5
    writer.save("empty", np.empty((3, 0), np.int64))
    save_texts(writer, "name", ["é", "", "ab"])
    save_texts(writer, "none", [])
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
    assert files["name_bounds"].tolist() == [0, 2, 2, 4]  # é has two bytes
    assert (read_texts(files, "name"), read_texts(files, "none")) == (["é", "", "ab"], [])
    assert len(pickle.dumps(files)) < 500  # the path alone, not the table
    files["a"][0, 0] = 9  # a private copy of the page: the file is not touched
    assert ArrayFiles(tmp_path / "t")["a"][0, 0] == 0


def test_a_cut_or_missing_file_is_noticed_and_a_full_disk_is_an_error_and_not_a_signal(tmp_path, monkeypatch):
    write(tmp_path / "t")
    array, manifest = tmp_path / "t" / "a.npy", tmp_path / "t" / "manifest.json"
    for damage, match in (
        (lambda: os.truncate(array, 20), r"a\.npy has 20 bytes, not 152"),  # a header of 128 and 6 numbers of 4
        (array.unlink, r"a\.npy is missing"),
        (lambda: os.truncate(manifest, 20), r"manifest\.json cannot be read"),
    ):
        damage()
        with pytest.raises(Damaged, match=match):
            ArrayFiles(tmp_path / "t")

    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path)


# ---- entries of encoded data


STORE = EncodedStore("toys", version=1)


class Maker:
    """Writes one number, and counts how often."""

    def __init__(self, number: int = 1, seconds: float = 0.0) -> None:
        self.number, self.seconds, self.calls = number, seconds, 0

    def __call__(self, writer) -> None:
        self.calls += 1
        time.sleep(self.seconds)
        writer.save("number", np.array([self.number]))
        writer.finish({"digest": f"of {self.number}"})


def test_an_entry_is_made_once_and_anew_when_what_it_is_made_from_changes(tmp_path):
    make = Maker()
    for made_from in (["a"], ["a"], ["b"]):
        assert STORE.open(tmp_path, "toy", made_from, make)["number"].tolist() == [1]
    assert make.calls == 2
    EncodedStore("toys", version=2).open(tmp_path, "toy", ["a"], make)
    assert make.calls == 3
    assert len(list((tmp_path / "toys").iterdir())) == 3


def test_a_file_that_was_exchanged_is_another_source_and_a_cache_that_cannot_be_written_an_error(tmp_path):
    (tmp_path / "a").write_text("one")
    before = identity([tmp_path / "a"])
    assert identity([tmp_path / "a"]) == before
    os.utime(tmp_path / "a", ns=(0, 0))  # as if it had been written anew
    assert identity([tmp_path / "a"]) != before
    with pytest.raises(DataError, match=r"cannot be written .*set cache_dir"):
        STORE.open(tmp_path / "a", "toy", [], Maker())


def test_a_given_encoding_has_an_entry_of_its_own_unless_the_data_taught_the_same(tmp_path):
    make = Maker()

    def opened(**options):
        return STORE.open(tmp_path, "toy", [], make, digest_of=lambda files: files.info["digest"], **options).folder

    learned = opened(learning="from all")
    assert opened(learning="from all", given="of 1") == learned
    other = opened(learning="from all", given="of 2")
    assert other != learned
    assert opened(learning="from a half", given="of 2") == other  # how it would be learned does not count
    assert make.calls == 2


def test_a_damaged_entry_is_made_anew_and_of_two_that_ask_at_once_one_makes_it(tmp_path, caplog):
    make = Maker()
    folder = STORE.open(tmp_path, "toy", [], make).folder
    for calls, cut in enumerate(("number.npy", "manifest.json"), 2):
        os.truncate(folder / cut, 2)
        assert STORE.open(tmp_path, "toy", [], make)["number"].tolist() == [1]
        assert make.calls == calls
        assert f"is damaged ({cut}" in caplog.text
    slow = Maker(seconds=0.3)
    with ThreadPoolExecutor(2) as pool:
        numbers = list(pool.map(lambda _: STORE.open(tmp_path / "new", "toy", [], slow)["number"].tolist(), range(2)))
    assert (numbers, slow.calls) == ([[1], [1]], 1)  # the other waits


# ---- what is encoded is as its version says: a change without a new version would read old entries


STORES = {"tables": table_data._STORE, "histories": sequence_data._STORE, "text": encoded_pairs.STORE}
ENCODED = {"tables": (2, "34b21285ea15"), "histories": (1, "973856241f6f"), "text": (1, "0e6609af760a")}
"""Version and digest by store. If a digest differs, raise the version in ``EncodedStore(...)``, and put both here."""


def table(folder, num_rows: int = 40):
    i = range(num_rows)
    columns: dict[str, Any] = {
        "user": [f"u{k % 7}" for k in i],
        "item": [k * k % 11 for k in i],
        "time": [f"2024-01-{1 + k % 28:02}" for k in i],
        "price": [None if k % 9 == 0 else k / 8 for k in i],
        "tags": ["a|b" if k % 3 else "c" for k in i],
        "seen": [[k % 5, k % 3] for k in i],
        "vector": [[k / 4, -1.5] for k in i],
        "bought": [k % 2 for k in i],
        "spent": [k % 4 * 2.5 for k in i],
    }
    pq.write_table(pa.table(columns), folder / "t.parquet")
    return str(folder / "t.parquet")


def encode_table(folder) -> None:
    columns: dict[str, Any] = {"categorical": ["user", "item"], "multi_valued": ["tags"], "continuous": ["price"]}
    columns |= {
        "vectors": ["vector"],
        "timestamps": ["time"],
        "sequences": {"seen": {"items": "item", "length": 2}},
        "user": "user",
    }
    columns["tasks"] = {"bought": {"column": "bought"}, "spent": {"column": "spent", "kind": "revenue"}}
    TableData("table", train_file=table(folder), table=columns, cache_dir=str(folder / "cache")).sizes()


def encode_histories(folder) -> None:
    HistoryData("table", file=table(folder), max_length=4, cache_dir=str(folder / "cache")).setup("fit")


def encode_text(folder) -> None:
    (folder / "a.txt").write_text("the dog runs\nthe cat sleeps\n\na bird sings and sings\n" * 3)
    files = dict.fromkeys(("train_files", "val_files", "test_files"), "a.txt")
    subwords = SubwordConfig(vocab_size=290)
    TextData(**files, tokenizer=subwords, root=str(folder), cache_dir=str(folder / "cache"), block_size=8).setup("fit")


def described(value: Any, has_numbers: bool) -> Any:
    """Return plain values with floats of four digits, as their last ones may differ between processors.

    Without numbers: only their types, for what a library of subwords decides.
    """
    if isinstance(value, dict):
        return {key: described(own, has_numbers) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [described(own, has_numbers) for own in value]
    if not has_numbers:
        return type(value).__name__
    return f"{value:.4g}" if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("kind", "encode"), [("tables", encode_table), ("histories", encode_histories), ("text", encode_text)]
)
def test_what_is_encoded_changes_with_the_version(kind, encode, tmp_path):
    encode(tmp_path)
    (folder,) = (own for own in (tmp_path / "cache" / kind).iterdir() if own.is_dir())
    files, has_numbers = ArrayFiles(folder), kind != "text"
    found: list[Any] = [described(files.info, has_numbers)]
    for path in sorted(folder.glob("*.npy")):
        array = files[path.stem]
        found.append([path.stem, str(array.dtype), array.ndim])
        if has_numbers:
            found.append(described(array.tolist(), has_numbers))
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
    assert (STORES[kind].version, digest) == ENCODED[kind], "raise the version, and put both into ENCODED"
