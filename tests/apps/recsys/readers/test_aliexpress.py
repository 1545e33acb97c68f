"""AliExpress, on files of a few rows in its layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_sources import check_config, write_aliexpress

from apps.recsys.readers.aliexpress import read_aliexpress


def test_aliexpress_of_one_country(tmp_path: Path) -> None:
    write_aliexpress(tmp_path)
    raw = read_aliexpress(tmp_path)
    check_config(raw)
    assert raw.config.domain is None
    assert (len(raw.config.categorical), len(raw.config.continuous)) == (16, 63)
    row = raw.train.to_pylist()[1]
    # the first column after the page's id is categorical_1 = 0; numerical_63 = 0.5 * 62
    assert (row["search_id"], row["categorical_1"], row["categorical_16"], row["numerical_63"]) == (82, 0, 15, 31.0)
    assert (row["click"], row["conversion"]) == (1.0, 1.0)
    assert raw.test is not None
    assert raw.test.num_rows == 1


def test_aliexpress_of_several_countries(tmp_path: Path) -> None:
    write_aliexpress(tmp_path / "AliExpress_US", train=3)
    write_aliexpress(tmp_path / "AliExpress_NL", train=1)
    raw = read_aliexpress(tmp_path)
    check_config(raw)
    assert raw.config.domain == "country"
    assert "country" in raw.config.categorical
    assert raw.train["country"].to_pylist() == ["NL", "US", "US", "US"]
    assert raw.test is not None
    assert raw.test["country"].to_pylist() == ["NL", "US"]


def test_aliexpress_truncated(tmp_path: Path) -> None:
    write_aliexpress(tmp_path)
    path = tmp_path / "train.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"train\.csv is corrupt: .*Expected 82 columns, got"):
        read_aliexpress(tmp_path)
    path.write_bytes(whole.replace(b"numerical_63", b"numerical_64", 1))
    with pytest.raises(ValueError, match=r"train\.csv has no column 'numerical_63'; its header is 'search_id,"):
        read_aliexpress(tmp_path)
    path.write_bytes(whole.split(b"\n")[0] + b"\n")
    with pytest.raises(ValueError, match=r"train\.csv is empty below its header"):
        read_aliexpress(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"train\.csv is missing"):
        read_aliexpress(tmp_path)
