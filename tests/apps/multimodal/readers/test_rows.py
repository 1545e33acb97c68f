"""Tables of every kind give the same rows, and a bad file is one line that names file, row and rule."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apps.multimodal.readers.rows import as_texts, find_table, rows_of

ROWS = [{"image": "a.png", "caption": "one, two"}, {"image": "b.png", "caption": 'say "three"'}]
ROLES = {"image": "image_column", "caption": "caption_column"}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_every_kind_of_table_gives_the_same_rows(tmp_path):
    quoted = 'image,caption\na.png,"one, two"\n\nb.png,"say ""three"""\n'
    tables = [
        write(tmp_path / "t.csv", quoted),
        write(tmp_path / "t.tsv", 'image\tcaption\na.png\tone, two\nb.png\t"say ""three"""\n'),
        write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, ROWS))),
        tmp_path / "t.csv.gz",
        tmp_path / "t.parquet",
    ]
    tables[3].write_bytes(gzip.compress(quoted.encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tables[4])
    for table in tables:
        assert list(rows_of(table, ROLES)) == [(f"{table}, row {n}", row) for n, row in enumerate(ROWS, 1)]


def test_a_mark_of_byte_order_and_line_ends_of_windows_are_no_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfimage,caption\r\na.png,one\r\n")
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"image": "a.png", "caption": "one"}\r\n')
    for name in ("t.csv", "t.jsonl"):
        assert [row for _, row in rows_of(tmp_path / name, ROLES)] == [{"image": "a.png", "caption": "one"}]


def test_a_caption_may_go_over_lines_and_a_list_has_several(tmp_path):
    table = write(tmp_path / "t.csv", 'image,caption\na.png,"one\ntwo"\n')
    ((_, row),) = rows_of(table, ROLES)
    assert row["caption"] == "one\ntwo"
    assert as_texts(["a", 7, None, float("nan")], "row 1", "caption") == ["a", "7", "", ""]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("t.csv", "image,title\na.png,x\n", "caption_column='caption' is not one of image, title"),
        ("t.csv", "image,captoin\na.png,x\n", "did you mean 'captoin'"),
        ("t.csv", "image,caption,image\na,b,c\n", "t.csv has two columns 'image'"),
        ("t.csv", "image,caption\na,b\nc\n", "row 2 has 1 values, and the header names 2 columns"),
        ("t.csv", 'image,caption\na,b\nc,"d\n', "row 2 cannot be read: .*is a quote not closed"),
        ("t.csv", "", "t.csv is empty"),
        ("t.jsonl", '{"image": "a", "caption": "b"}\n{"image"\n', "line 2 is no JSON"),
        ("t.jsonl", "[1, 2]\n", r"line 1 is \[1, 2\], not an object"),
        ("t.jsonl", '{"image": "a"}\n', "caption_column='caption' is not one of image"),
        ("t.parquet", "no parquet", "t.parquet cannot be read"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message) as error:
        list(rows_of(write(tmp_path / name, text), ROLES))
    assert "\n" not in str(error.value)


def test_text_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"image,caption\na,caf\xe9\n")
    with pytest.raises(ValueError, match=r"t.csv, line 2: byte 0xe9 is not valid UTF-8"):
        list(rows_of(tmp_path / "t.csv", ROLES))


def test_the_only_table_needs_no_name(tmp_path):
    with pytest.raises(ValueError, match=r"holds no .csv, .* file: name one by table"):
        find_table(tmp_path, None)
    table = write(tmp_path / "t.csv", "x\n")
    write(tmp_path / "notes.txt", "x\n")
    assert find_table(tmp_path, None) == table
    write(tmp_path / "u.jsonl", "{}\n")
    with pytest.raises(ValueError, match=r"holds several tables \(t.csv, u.jsonl\): name one"):
        find_table(tmp_path, None)
    assert find_table(tmp_path, "t.csv") == table
    with pytest.raises(ValueError, match=r"table='v.csv': no such file"):
        find_table(tmp_path, "v.csv")
    with pytest.raises(ValueError, match=r"table='notes.txt' is no .csv"):
        find_table(tmp_path, "notes.txt")
