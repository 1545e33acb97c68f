"""Parquet files: their values, and the limit of what they may unpack to."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apps.data.documents import documents_in
from apps.data.parquet_files import parquet_tables, read_parquet
from apps.multimodal.readers.rows import rows_of
from apps.recsys.own_files import read_tables
from apps.recsys.readers import user_tables
from apps.recsys.sequence.semantic_ids import read_vectors


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any file unpack to a megabyte, in place of 256."""
    monkeypatch.setattr("apps.base.inflate.FREE", 1 << 20)


def written(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


READERS = {
    "documents": lambda path: list(documents_in(path, "line")),
    "captions": lambda path: list(rows_of(path, {"text": "captions"})),
    "table": lambda path: read_tables([path]),
    "columns": lambda path: user_tables.read_columns(path, {"text": "categorical"}),
    "chunks": lambda path: list(user_tables.iter_columns(path, {"text": "categorical"})),
    "vectors": lambda path: read_vectors(path, ("x",)),
}
INT32 = (pa.array([7] * 1_000_000, pa.int32()), 4_000_000)


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize(
    ("read", "values", "unpacked"),
    [
        *((read, *INT32) for read in READERS),
        ("table", pa.array([7] * 500_000, pa.int64()), 2_000_000),  # 4 bytes a value are taken for granted
        ("documents", pa.array([[7] * 1_000_000]), 4_000_000),  # one row
        ("chunks", pa.array([b"x" * 1000] * 3000, pa.binary(1000)), 3_000_000),
    ],
)
def test_a_value_that_comes_a_million_times_is_not_read(tmp_path, read, values, unpacked):
    path = written(tmp_path / "t.parquet", {"text": values, "vector": pa.nulls(len(values), pa.int8())})
    size = path.stat().st_size
    assert 200 * size < unpacked
    with pytest.raises(ValueError, match=rf"t\.parquet holds over [\d,]+ bytes of rows in {size:,} bytes") as error:
        READERS[read](path)
    assert int(str(error.value).split(" over ")[1].split()[0].replace(",", "")) >= unpacked
    assert "at most 200 times is read" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize(
    "read, nested", [("documents", False), ("captions", True), ("table", True), ("vectors", False)]
)
def test_a_text_that_is_repeated_is_counted_as_often_as_it_comes(tmp_path, read, nested):
    # The footer tells of one text and 2000 places in a dictionary.
    one = ["Rome" * 250] if nested else "Rome" * 250
    path = written(tmp_path / "t.parquet", {"text": [one] * 2000, "vector": [0] * 2000})
    with pytest.raises(ValueError, match=r"t\.parquet holds over 2,0\d\d,\d\d\d bytes in [\d,]+ bytes: no data"):
        READERS[read](path)
    written(path, {"text": ["Rome" * 250] * 1000, "vector": [0] * 1000})
    if read != "vectors":
        READERS[read](path)


@pytest.mark.usefixtures("little")
def test_ordinary_rows_are_read_however_many_they_are(tmp_path):
    # 3.2 MB of ids, and a place of two letters in each row: above the megabyte, and far below 200 times the file.
    places = [f"p{i % 100:02}" for i in range(200_000)]
    rows = {"user": list(range(200_000)), "place": places, "none": pa.nulls(200_000)}
    path = written(tmp_path / "t.parquet", rows, row_group_size=50_000)
    assert read_parquet(path).equals(pa.table(rows))
    assert sum(map(len, parquet_tables(path, lambda names: ["place"], 4096))) == 200_000


def test_columns_have_the_types_of_the_file(tmp_path):
    rows = pa.table(
        {
            "text": ["x", None],
            "lists": [["y", "z"], None],
            "parts": [{"a": "k", "b": [1.5]}, None],
            "pairs": pa.array([[("k", "v")], None], pa.map_(pa.string(), pa.string())),
            "kinds": pa.array(["u", "v"]).dictionary_encode(),
            "large": pa.array(["u", "v"], pa.large_string()),
            "bytes": [b"q", b""],
            "views": pa.array(["u", "v"], pa.string_view()),
            "views_of_lists": pa.array([["u"], None], pa.list_(pa.string_view())),
            "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
            "price": [Decimal("1.5"), None],
            "deep": [[["a"], []], None],
        }
    )
    pq.write_table(rows, tmp_path / "t.parquet")
    table = read_parquet(tmp_path / "t.parquet")
    assert table.to_pylist() == rows.to_pylist()
    changed = [f.name for f, own in zip(table.schema, rows.schema, strict=True) if f.type != own.type]
    assert changed == ["views", "views_of_lists"]
    pq.write_table(rows[:0], tmp_path / "t.parquet")
    assert read_parquet(tmp_path / "t.parquet").schema.equals(rows.schema)
