"""Delimited text that unpacks to far more than its file explains."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from apps.recsys.readers.delimited import read_delimited

TYPES = {"a": pa.int64(), "b": pa.int64()}


@pytest.mark.parametrize("separator", [",", "::"])
def test_gzipped_text_is_read_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    monkeypatch.setattr("apps.base.inflate.Inflated.__init__.__defaults__", (1 << 20, 50))
    path, line = tmp_path / "t.csv.gz", f"1{separator}2\n".encode()
    path.write_bytes(gzip.compress(line * 1000))
    table = read_delimited(path, TYPES, columns=("a", "b"), separator=separator)
    assert (table.num_rows, table["b"][999].as_py()) == (1000, 2)
    path.write_bytes(gzip.compress(line * 1_000_000))  # 4 or 5 MB, 1 MiB is allowed
    with pytest.raises(
        ValueError, match=r"t\.csv\.gz is compressed over \d+ times .* no data shrinks so much"
    ) as error:
        read_delimited(path, TYPES, columns=("a", "b"), separator=separator)
    assert "\n" not in str(error.value)


def test_a_gzipped_file_of_one_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.base.inflate.Inflated.__init__.__defaults__", (1 << 20, 50))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(bytes(4 << 20)))
    with pytest.raises(ValueError, match=r"t\.csv\.gz is compressed over \d+ times"):
        read_delimited(tmp_path / "t.csv.gz", TYPES, columns=("a", "b"))
