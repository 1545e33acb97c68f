"""Criteo's logs, on files of a few rows in their layout."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pytest
from made_sources import check_config, criteo_line, write, write_criteo

from apps.recsys.readers.criteo import read_criteo
from apps.recsys.tables.data import TableData


def test_the_week_of_kaggle(tmp_path: Path) -> None:
    raw = read_criteo(write_criteo(tmp_path, rows=3))
    check_config(raw)
    assert (len(raw.config.categorical), len(raw.config.continuous), raw.config.min_count) == (26, 13, 10)
    assert (raw.val, raw.test, raw.config.split.kind) == (None, None, "random")
    # nine tenths of which a ninth validates: 8 : 1 : 1
    assert (1 - raw.config.split.test) * raw.config.split.val == pytest.approx(0.1)
    assert raw.train.column_names == ["click", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    assert pa.types.is_dictionary(raw.train.schema.field("C1").type)
    first, second, _ = raw.train.to_pylist()
    assert (first["click"], first["I1"], first["I2"], first["C1"], first["C26"]) == (0, 0, -1, "00000000", "ffffffff")
    assert (second["click"], second["I1"], second["I13"], second["C1"], second["C26"]) == (1, 1, None, "00000001", "")


def test_the_last_day_tests(tmp_path: Path) -> None:
    for day, rows in ((0, 2), (2, 3), (10, 4)):
        write_criteo(tmp_path, f"day_{day}", rows)
    packed = tmp_path / "day_2.gz"
    packed.write_bytes(gzip.compress((tmp_path / "day_2").read_bytes()))
    with pytest.raises(ValueError, match=r"holds both day_2 and day_2\.gz: keep one of them"):
        read_criteo(tmp_path)
    (tmp_path / "day_2").unlink()
    raw = read_criteo(tmp_path)
    check_config(raw)
    assert raw.test is not None
    assert (raw.train.num_rows, raw.test.num_rows, raw.config.split.kind) == (5, 4, "given")
    for day in (0, 10):
        (tmp_path / f"day_{day}").unlink()
    alone = read_criteo(tmp_path)
    assert (alone.train.num_rows, alone.test, alone.config.split.kind) == (3, None, "random")


def test_files_of_another_layout_are_named(tmp_path: Path) -> None:
    write_criteo(tmp_path)
    path = tmp_path / "train.txt"
    line = criteo_line(1, {1: "5"}, {1: "ab"})
    for bad, message in (
        (line.rpartition("\t")[0], r"train\.txt is corrupt: .*Expected 40 columns, got 39"),
        (criteo_line(1, {3: "many"}, {}), r"train\.txt is corrupt: In CSV column #3: .*invalid value 'many'"),
    ):
        write(path, line, bad)
        with pytest.raises(ValueError, match=message):
            read_criteo(tmp_path)
    write_criteo(tmp_path, "day_1")
    with pytest.raises(ValueError, match=r"holds both train\.txt and day_1: name the folder of one release"):
        read_criteo(tmp_path)
    path.unlink()
    write_criteo(tmp_path, "day_x")
    with pytest.raises(ValueError, match=r"day_x is no day of Criteo's logs: their names are day_0 or day_0\.gz"):
        read_criteo(tmp_path)
    with pytest.raises(ValueError, match=r"train\.txt is missing"):
        read_criteo(tmp_path / "nowhere")


def test_rare_values_share_row_0(tmp_path: Path) -> None:
    write_criteo(tmp_path, rows=100)
    with open(tmp_path / "train.txt", "a") as file:
        file.writelines(criteo_line(i % 2, {1: "7"}, {1: "rare"}) + "\n" for i in range(9))
    data = TableData("criteo", str(tmp_path), str(tmp_path / "cache"))
    assert set(data.vocabulary("C1")) == {None, "00000000", "00000001"}
    assert data.features.categorical[1].num_rows == 1  # C2 has no value
    assert {split: len(data.rows(split)) for split in ("train", "val", "test")} == {"train": 87, "val": 11, "test": 11}
