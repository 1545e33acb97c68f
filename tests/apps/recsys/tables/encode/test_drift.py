"""Drift of new rows against a small table, line by line."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.csv
import pytest
from own_table import config_of

from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.schema import SplitConfig
from apps.recsys.tables.encode.drift import drift

# 100 rows: half in Rome, prices 1 to 100 without one in every tenth row.
TRAIN = {
    "city": ["Rome", "Oslo"] * 50,
    "kind": ["a", "a", "a", "b"] * 25,
    "price": [None if i % 10 == 0 else i for i in range(1, 101)],
    "click": [1, 0] * 50,
}


@pytest.fixture
def encoding(own, tmp_path):
    pa.csv.write_csv(pa.table(TRAIN), tmp_path / "train.csv")
    config = config_of(categorical=("city", "kind"), continuous=("price",), split=SplitConfig(val=0, test=0))
    return own(config, test_file=None).encoding


@pytest.fixture
def lines(tmp_path):
    def of(encoding, columns):
        pa.parquet.write_table(pa.table(columns), tmp_path / "new.parquet")
        return drift(encoding, str(tmp_path / "new.parquet"))

    return of


def test_the_same_rows_have_no_drift(encoding, lines):
    assert lines(encoding, TRAIN) == []
    assert lines(encoding, {column: values[::3] for column, values in TRAIN.items()}) == []


def test_each_difference_is_a_line_and_the_largest_comes_first(encoding, lines):
    # 200 rows: kinds that are half b, a quarter in training; a quarter of the cities unknown; 60 % of the prices that
    # are there above 99, and 70 % missing.
    new = {
        "city": ["Rome", "Oslo", "Rome", "Bonn"] * 50,
        "kind": ["a", "b"] * 100,
        "price": [*[None] * 140, *range(30, 54), *range(100, 136)],
    }
    assert lines(encoding, new) == [
        "column 'price': 70.0% of the rows have no value, 10.0% in training: their predictions rest on the other "
        "columns",
        "column 'price': 60.0% of the values are outside training's 1 to 99: predictions extrapolate",
        "column 'city': 25.0% of the values are not in training: they are read as one unknown value",
        # 0.25 ln(0.5 / 0.25) + 0.25 ln(0.75 / 0.5) = 0.17329 + 0.10137
        "column 'kind': other shares of values, population stability index 0.27 ('a' 50.0%, 75.0% in training): mean "
        "predictions and calibration shift",
    ]


def test_a_checkpoint_of_an_earlier_version_has_unknown_values_and_means(encoding, lines):
    state = encoding.state()
    del state["profiles"]
    old = Encoding.from_state(state)
    assert old == encoding
    # The mean of 1 to 99 without the tens is 50, its standard deviation 28.72; (99 - 50) / 28.72 = 1.71.
    new = {"city": ["Rome", "Bonn"] * 50, "kind": ["b"] * 100, "price": [99] * 100}
    assert lines(old, new) == [
        "column 'price': mean 99, 50 in training, 1.7 standard deviations: mean predictions and calibration shift",
        "column 'city': 50.0% of the values are not in training: they are read as one unknown value",
    ]


def test_bad_files(encoding, lines, tmp_path):
    with pytest.raises(ValueError, match=r"column 'price' \(continuous\) is not in '.*new.parquet'"):
        lines(encoding, {"city": ["Rome"], "kind": ["a"]})
    with pytest.raises(ValueError, match=r"data='.*new.parquet' has no rows"):
        lines(encoding, {column: values[:0] for column, values in TRAIN.items()})
    with pytest.raises(ValueError, match=r"data='nowhere.csv': no such file"):
        drift(encoding, "nowhere.csv")
