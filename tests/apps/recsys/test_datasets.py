"""The standard tables by name: their readers, their sources, their layouts."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import pytest
from made_sources import (
    write_100k,
    write_adult,
    write_ali_ccp,
    write_aliexpress,
    write_census,
    write_criteo,
    write_grouplens_1m,
    write_kuairand,
    write_recbole_1m,
)

from apps.data import datasets
from apps.data.cache import DataError
from apps.data.sources import PythonPackage
from apps.recsys.datasets import RECSYS_DATASETS


@pytest.mark.parametrize("name", list(RECSYS_DATASETS))
def test_every_dataset_has_its_reader(name: str) -> None:
    dataset = RECSYS_DATASETS[name]
    assert dataset.name == name
    assert dataset.app == "recsys"
    assert dataset.license
    assert datasets.find(name) is dataset
    assert callable(getattr(importlib.import_module(f"apps.recsys.readers.{dataset.module}"), f"read_{name}"))
    assert pickle.loads(pickle.dumps(dataset)) == dataset


@pytest.mark.parametrize("name", [n for n, d in RECSYS_DATASETS.items() if not d.sources])
def test_a_dataset_without_source_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name} cannot be fetched: set root"):
        datasets.prepare(name, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["census_income", "adult", "movielens_1m", "movielens_100k"])
def test_packages_are_pinned_and_their_files_known_by_hash(name: str) -> None:
    packages = [s for s in RECSYS_DATASETS[name].sources if isinstance(s, PythonPackage)]
    assert packages
    for package in packages:
        assert "==" in package.requirement
        assert all(len(file.hash or "") == 64 for file in package.files)


def test_a_folder_in_each_layout_is_taken_as_it_is(tmp_path: Path) -> None:
    write_census(tmp_path / "census")
    write_recbole_1m(tmp_path / "recbole")
    write_grouplens_1m(tmp_path / "grouplens" / "ml-1m")
    write_100k(tmp_path / "100k", "grouplens")
    write_adult(tmp_path / "adult")
    write_ali_ccp(tmp_path / "ccp")
    write_aliexpress(tmp_path / "ae" / "AliExpress_ES")
    write_criteo(tmp_path / "criteo")
    write_criteo(tmp_path / "days", "day_3")
    write_kuairand(tmp_path / "kuairand" / "KuaiRand-1K" / "data", "1k")
    for name, folder in (
        ("census_income", "census"),
        ("movielens_1m", "recbole"),
        ("movielens_1m", "grouplens"),
        ("movielens_100k", "100k"),
        ("adult", "adult"),
        ("ali_ccp", "ccp"),
        ("aliexpress", "ae"),
        ("criteo", "criteo"),
        ("criteo", "days"),
        ("kuairand", "kuairand"),
    ):
        assert datasets.prepare(name, root=tmp_path / folder) == tmp_path / folder
