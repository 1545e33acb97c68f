"""An encoded table is kept: made once, anew when anything changes or is damaged."""

from __future__ import annotations

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from own_table import CONFIG, by_row, config_of, same

from apps.data import sources
from apps.recsys.schema import SplitConfig
from apps.recsys.tables import build as build_module


def count_builds(monkeypatch):
    calls = []
    original = build_module.build
    monkeypatch.setattr(build_module, "build", lambda *a: calls.append(a) or original(*a))
    return calls


def test_a_table_is_encoded_once_and_anew_when_anything_changes(own, tmp_path, monkeypatch):
    calls = count_builds(monkeypatch)
    before = own().features
    assert own().features == before
    assert len(calls) == 1
    for change in ({"split": SplitConfig("given", val=0, seed=1)}, {"exclude": ["age"]}, {"table": config_of()}):
        _ = own(**{"config": change.pop("table", CONFIG), **change}).features
    assert len(calls) == 4
    os.utime(tmp_path / "train.csv", ns=(0, 0))  # as if it had been written anew
    assert own().features == before
    assert len(calls) == 5
    assert not list((tmp_path / "cache" / "tables").glob(".*"))


def test_a_damaged_table_is_encoded_anew(own, tmp_path, monkeypatch, caplog):
    expected = by_row(own().rows("train")[:])
    calls = count_builds(monkeypatch)
    (folder,) = (tmp_path / "cache" / "tables").iterdir()
    for cut in ("categorical.bin", "manifest.json"):
        os.truncate(folder / cut, 10)
        assert same(by_row(own().rows("train")[:]), expected)
        assert "is damaged" in caplog.text
        assert cut in caplog.text
    assert len(calls) == 2


def test_of_two_that_ask_at_once_one_encodes_and_the_other_waits(own, monkeypatch):
    calls = []
    original = build_module.build

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.3)
        original(*arguments)

    monkeypatch.setattr(build_module, "build", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: own().features, range(2)))
    assert found[0] == found[1]
    assert len(calls) == 1


def test_a_data_module_goes_to_another_process(own):
    data = own()
    expected = by_row(data.rows("train")[:])
    assert same(by_row(pickle.loads(pickle.dumps(data)).rows("train")[:]), expected)
    assert same(by_row(pickle.loads(pickle.dumps(data.rows("train")))[:]), expected)


def test_a_cache_that_cannot_be_written_is_one_clear_error(own, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(sources.DataError, match=r"cannot be written .*set cache_dir"):
        _ = own().features
