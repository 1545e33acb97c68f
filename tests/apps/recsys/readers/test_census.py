"""Census-Income, on files of a few rows in the layouts of its sources."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from made_sources import CENSUS, census_line, check_config, write, write_census

from apps.recsys.readers.census import COLUMNS as CENSUS_COLUMNS, read_census_income


@pytest.mark.parametrize("names", [CENSUS, ("census-income.data", "census-income.test")])
def test_census_income(tmp_path: Path, names: tuple[str, str]) -> None:
    raw = read_census_income(write_census(tmp_path, names), num_rows=(3, 1))
    check_config(raw)
    assert raw.val is None
    assert raw.train.num_rows == 3
    assert raw.test is not None
    assert raw.test["age"].to_pylist() == [38.0]
    # values are as in the file, without the space after each comma; "NA" and "?" are no missing values
    assert raw.train["age"].to_pylist() == [73.0, 18.0, 44.0]
    assert raw.train["hispanic_origin"].to_pylist() == ["NA", "Not in universe", "Not in universe"]
    assert raw.train["migration_code_change_in_msa"].to_pylist()[1] == "?"
    assert raw.train["income"].to_pylist() == ["- 50000.", "- 50000.", "50000+."]


def test_census_protocol(tmp_path: Path) -> None:
    config = read_census_income(write_census(tmp_path), num_rows=None).config
    # 42 columns: the weight (24), marital status (7) and income (41) are no inputs; 7 + 32 = 39 are
    assert len(CENSUS_COLUMNS) == 42
    assert [CENSUS_COLUMNS[i] for i in (7, 24, 41)] == ["marital_stat", "instance_weight", "income"]
    assert (len(config.continuous), len(config.categorical)) == (7, 32)
    assert not {"marital_stat", "instance_weight", "income"} & set(config.features)
    assert config.tasks["income"].positive == ("50000+.",)
    assert config.tasks["never_married"].positive == ("Never married",)
    split = config.split
    assert (split.kind, split.val, split.stratify, split.seed) == ("given", 0.1, "income", 0)


def test_census_gzipped(tmp_path: Path) -> None:
    write_census(tmp_path, ("census-income.data", "census-income.test"))
    for name in ("census-income.data", "census-income.test"):
        plain = tmp_path / name
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    assert read_census_income(tmp_path, num_rows=(3, 1)).train.num_rows == 3
    packed = tmp_path / "census-income.data.gz"
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"census-income\.data\.gz is corrupt: it is truncated"):
        read_census_income(tmp_path, num_rows=(3, 1))


def test_truncated_census_names_the_file_in_one_line(tmp_path: Path) -> None:
    write_census(tmp_path)
    path = tmp_path / CENSUS[0]
    whole = path.read_bytes()
    cuts = {
        whole[: whole.rindex(b"\n", 0, -1) + 1]: "is truncated: 2 rows, not 3",  # a whole line is missing
        whole[:-300]: "Expected 42 columns",  # in mid-line
        whole[:-5]: "column 'income' holds '500'",  # in the last value of the last line
        b"": "is empty",
    }
    for content, reason in cuts.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason) as caught:
            read_census_income(tmp_path, num_rows=(3, 1))
        assert CENSUS[0] in str(caught.value)
        assert "\n" not in str(caught.value)


def test_census_of_another_kind(tmp_path: Path) -> None:
    write_census(tmp_path)
    with pytest.raises(ValueError, match=r"train\.csv is not the original: 3 rows, not 2"):
        read_census_income(tmp_path, num_rows=(2, 1))
    write(tmp_path / CENSUS[1], census_line(age="old"))
    with pytest.raises(ValueError, match=r"test\.csv is corrupt: .*'old'"):
        read_census_income(tmp_path, num_rows=None)
    (tmp_path / CENSUS[1]).unlink()
    with pytest.raises(ValueError, match=r"holds no census_income_1994_1995_test\.csv and no census-income\.test"):
        read_census_income(tmp_path, num_rows=None)
