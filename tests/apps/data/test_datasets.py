"""Datasets by name, and folders of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_dataset import toy

from apps.data import datasets
from apps.data.cache import DataError


def test_root_is_taken_as_it_is_or_refused(tmp_path: Path) -> None:
    toy(layouts=(("toy.csv",), ("a/*.bin", "b/*.bin")))
    with pytest.raises(ValueError, match=r"root='.*nowhere' is not a folder: toy expects toy.csv in it"):
        datasets.prepare("toy", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no toy.csv"):
        datasets.prepare("toy", root=tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.bin").write_text("")
    with pytest.raises(ValueError, match=r"holds no b/\*.bin"):  # the layout it comes closest to
        datasets.prepare("toy", root=tmp_path)
    (tmp_path / "toy.csv").write_text("")
    assert datasets.prepare("toy", root=str(tmp_path)) == tmp_path


def test_data_without_a_source_says_how_to_bring_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"imagenet cannot be fetched: set root \(--data.root\).*image-net.org"):
        datasets.prepare("imagenet", cache_dir=tmp_path)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"dataset='Fashion-MNIST' is not one of .*; did you mean 'fashion_mnist'\?"):
        datasets.prepare("Fashion-MNIST")


def test_a_name_is_registered_once() -> None:
    toy()
    toy()  # the same record again: a module imported twice
    with pytest.raises(ValueError, match="dataset='toy' is registered already, by the test app"):
        toy(title="another")


def test_the_list_is_plain_rows(tmp_path: Path) -> None:
    by_name = {dataset.name: dataset for dataset in datasets.list_datasets()}
    assert datasets.available("digits", tmp_path)
    assert by_name["digits"].app == "vision"
    assert not datasets.available("imagenet", tmp_path)
    assert by_name["imagenet"].sources == ()
    assert str(by_name["fashion_mnist"].sources[-1]) == "Debian package dataset-fashion-mnist"
