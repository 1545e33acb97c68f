"""Rows of files to predict come as batches, piece by piece, in their order."""

from __future__ import annotations

import datetime
import threading

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from own_table import by_row, same

from apps.recsys.tables.rows import streaming
from apps.recsys.tables.rows.scoring import one_ahead
from apps.recsys.tables.rows.streaming import FileRows, as_json_has_it

CITIES = ["Oslo", "Paris", "", "Rome", "Rome", "Oslo", "NA"]
ROWS = {
    "key": [f"k{i}" for i in range(7)],
    "city": CITIES,
    "tags": ["z|y", "", "w", "x", "x|y", "", "y"],
    "user": [1, 2, 77, 3, 1, 5, 6],
    "age": [25.0, None, 30.0, 5.0, 40.0, 1.0, 2.0],
    "shop": ["fr", "de", "de", "fr", "de", "de", "fr"],
}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_pieces_and_files_join_to_one_table(own, tmp_path, monkeypatch, kind):
    table = pa.table(ROWS)
    for number, part in enumerate((table.slice(0, 3), table.slice(3))):
        path = tmp_path / f"new-{number}.{kind}"
        if kind == "csv":
            pa.csv.write_csv(part, path)
        else:
            pa.parquet.write_table(part, path)
    data = own(predict_file=f"new-*.{kind}", predict_columns=["key", "city"], eval_batch_size=2)
    (whole,) = FileRows(sorted(tmp_path.glob(f"new-*.{kind}")), data.encoding, 10)
    assert whole.kept is None
    monkeypatch.setattr(streaming, "_PIECE_ROWS", 4)  # a piece is two batches, and one lies in both files
    batches = list(data.predict_dataloader())
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    assert torch.cat([batch.index_B for batch in batches]).tolist() == list(range(7))
    assert same([row for b in batches for row in by_row(b, data.features)], by_row(whole, data.features))
    assert [key for batch in batches for key in batch.kept["key"].to_pylist()] == ROWS["key"]
    expected = [None if kind == "csv" and city == "" else city for city in CITIES]
    assert [city for batch in batches for city in batch.kept["city"].to_pylist()] == expected
    assert batches[0].to("meta").kept is batches[0].kept


def test_each_process_takes_its_batches(own, tmp_path):
    pa.parquet.write_table(pa.table(ROWS), tmp_path / "new.parquet")
    encoding = own().encoding
    parts = [
        [batch.index_B.tolist() for batch in FileRows([tmp_path / "new.parquet"], encoding, 2, {}, rank, 3)]
        for rank in range(3)
    ]
    assert parts == [[[0, 1], [6]], [[2, 3]], [[4, 5]]]


def test_kept_values_are_those_of_json():
    moment = datetime.datetime(2024, 5, 31, 12)
    for values, expected in (
        ([1, None], [1, None]),
        ([1.5, float("nan"), float("-inf")], [1.5, None, None]),
        ([moment, None], ["2024-05-31 12:00:00", None]),
        ([[1.0, float("nan")], None], [[1.0, None], None]),
        (["007", ""], ["007", ""]),
        ([b"x"], ["b'x'"]),
    ):
        assert as_json_has_it(pa.chunked_array([values])).to_pylist() == expected
    texts = pa.chunked_array([pa.array(["a", "b", "a"]).dictionary_encode()])
    assert as_json_has_it(texts).type == pa.string()


def test_one_item_is_made_ahead():
    made = []

    def items():
        for i in range(3):
            made.append((i, threading.current_thread() is threading.main_thread()))
            yield i
        raise ValueError("the fourth")

    coming = one_ahead(items())
    assert made == []
    assert next(coming) == 0
    assert [next(coming), next(coming)] == [1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(coming)
    assert made == [(0, False), (1, False), (2, False)]
