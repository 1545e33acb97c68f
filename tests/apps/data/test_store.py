"""Encoded data are made once, and anew when anything they were made from changes."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from apps.data.cache import DataError
from apps.data.store import EncodedStore, identity

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


def test_a_file_that_was_exchanged_is_another_source(tmp_path):
    (tmp_path / "a").write_text("one")
    before = identity([tmp_path / "a"])
    assert identity([tmp_path / "a"]) == before
    os.utime(tmp_path / "a", ns=(0, 0))  # as if it had been written anew
    assert identity([tmp_path / "a"]) != before


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


def test_a_damaged_entry_is_made_anew(tmp_path, caplog):
    make = Maker()
    folder = STORE.open(tmp_path, "toy", [], make).folder
    for calls, cut in enumerate(("number.npy", "manifest.json"), 2):
        os.truncate(folder / cut, 2)
        assert STORE.open(tmp_path, "toy", [], make)["number"].tolist() == [1]
        assert make.calls == calls
        assert f"is damaged ({cut}" in caplog.text


def test_of_two_that_ask_at_once_one_makes_it_and_the_other_waits(tmp_path):
    make = Maker(seconds=0.3)
    with ThreadPoolExecutor(2) as pool:
        numbers = list(pool.map(lambda _: STORE.open(tmp_path, "toy", [], make)["number"].tolist(), range(2)))
    assert numbers == [[1], [1]]
    assert make.calls == 1


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"cannot be written .*set cache_dir"):
        STORE.open(tmp_path / "cache", "toy", [], Maker())
