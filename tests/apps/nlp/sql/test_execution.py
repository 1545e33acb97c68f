"""Queries can only read, end in time, and are judged by what they return."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from apps.nlp.sql.execution import execute, execution_match, query_match, valid


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE items (name TEXT, price REAL, stock INTEGER);"
            "INSERT INTO items VALUES ('pen', 1.5, 10), ('book', 12.0, 3), ('cup', 4.25, 0), ('pen', 2.0, 7)"
        )
    return path


def test_a_query_returns_its_rows_within_limits_of_time_and_number(shop: Path):
    counted = execute(shop, "SELECT name, COUNT(*) FROM items GROUP BY name ORDER BY name")
    assert counted == [("book", 1), ("cup", 1), ("pen", 2)]
    endless = "SELECT COUNT(*) FROM " + ", ".join(f"items AS i{n}" for n in range(30))
    with pytest.raises(ValueError, match=r"took more than 0.1 s$"):
        execute(shop, endless, seconds=0.1)
    assert len(execute(shop, "SELECT * FROM items", rows=4)) == 4
    with pytest.raises(ValueError, match=r"returns more than 3 rows$"):
        execute(shop, "SELECT * FROM items", rows=3)


MORE_THAN_READING = (
    *("DELETE FROM items", "DROP TABLE items", "UPDATE items SET price = 0", "INSERT INTO items VALUES ('x', 1, 1)"),
    *("CREATE TABLE more (a)", "PRAGMA user_version = 5", "PRAGMA table_info(items)", "BEGIN IMMEDIATE"),
    *("ATTACH DATABASE 'other.sqlite' AS other", "VACUUM INTO 'copy.sqlite'", "SELECT load_extension('evil')"),
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
)


@pytest.mark.parametrize("query", MORE_THAN_READING)
def test_a_query_that_does_more_than_read_is_an_error_and_changes_nothing(shop: Path, query: str, monkeypatch) -> None:
    monkeypatch.chdir(shop.parent)
    before = shop.read_bytes()
    with pytest.raises(ValueError, match=r"would do more than read: only SELECT is allowed$"):
        execute(shop, query)
    assert shop.read_bytes() == before
    assert [path.name for path in shop.parent.iterdir()] == ["shop.sqlite"]


def test_a_database_with_a_write_ahead_log_is_read_without_files_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "wal.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (a)")
        connection.execute("INSERT INTO t VALUES (7)")
        connection.commit()
        assert execute(path, "SELECT a FROM t") == [(7,)]  # from the log, which is not in the file yet
    assert [own.name for own in tmp_path.iterdir()] == ["wal.sqlite"]
    assert execute(path, "SELECT a FROM t") == [(7,)]
    assert [own.name for own in tmp_path.iterdir()] == ["wal.sqlite"]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT gone FROM items", r"cannot be run: no such column: gone$"),
        ("SELECT name FROM items; SELECT 1", r"cannot be run: You can only execute one statement at a time"),
        ("this is no SQL", r"cannot be run: near \"this\": syntax error$"),
        ("SELECT randomblob(2000000)", r"cannot be run: string or blob too big$"),
        ("SELECT name\0 FROM items", r"cannot be run: "),
    ],
)
def test_a_query_that_cannot_be_run_is_an_error(shop: Path, query: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        execute(shop, query)


@pytest.mark.parametrize(
    ("content", "message"), [(b"name,price\npen,1\n", "is not an SQLite database"), (None, "is not a file")]
)
def test_a_file_that_is_no_database_is_an_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "items.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^database='.*items.csv' {message}$"):
        execute(path, "SELECT 1")


@pytest.mark.parametrize(
    ("gold", "prediction", "same"),
    [
        ("SELECT name FROM items", "SELECT name FROM items ORDER BY price DESC", 1.0),  # another order of one multiset
        ("SELECT name FROM items", "SELECT DISTINCT name FROM items", 0.0),  # pen is there twice
        ("SELECT name FROM items ORDER BY price ASC", "SELECT name FROM items ORDER BY price DESC", 0.0),
        ("SELECT name FROM items ORDER BY price ASC", "SELECT name FROM items ORDER BY price", 1.0),
        ("SELECT SUM(price) FROM items", "SELECT 19.75", 1.0),
        ("SELECT AVG(price) FROM items", "SELECT 4.93750000001", 1.0),  # nine digits: 4.9375
        ("SELECT name FROM items WHERE name = 'order by'", "SELECT name FROM items WHERE price > 99", 1.0),
        ("SELECT COUNT(*) FROM items", "SELECT COUNT(* FROM items", 0.0),
        ("SELECT COUNT(*) FROM items WHERE stock > 99", "", 0.0),
        ("SELECT name FROM items WHERE stock > 99", "DROP TABLE items", 0.0),
    ],
)
def test_a_prediction_is_right_if_it_returns_the_same(shop: Path, gold: str, prediction: str, same: float) -> None:
    assert execution_match(prediction, {"references": [gold], "database": str(shop)}) == same


def test_a_prediction_is_valid_if_it_runs_and_a_wrong_reference_is_an_error(shop: Path) -> None:
    row = {"references": ["SELECT gone FROM items"], "database": str(shop)}
    with pytest.raises(ValueError, match="no such column"):
        execution_match("SELECT 1", row)
    assert [valid(f"SELECT {column}", row) for column in ("stock FROM items", "stok FROM items", " ")] == [1, 0, 0]
    with pytest.raises(ValueError, match="is not a file"):
        valid("SELECT 1", {**row, "database": str(shop) + "x"})


@pytest.mark.parametrize(
    ("prediction", "same"),
    [
        ("select NAME from items where name='A  b' ;", 1.0),
        ("SELECT name FROM items WHERE name = 'a  b'", 0.0),
        ("SELECT name FROM items WHERE name = 'A b'", 0.0),
        ("SELECT name, name FROM items WHERE name = 'A  b'", 0.0),
    ],
)
def test_queries_are_the_same_but_for_spaces_and_case(prediction: str, same: float) -> None:
    row = {"references": ["SELECT name FROM items\nWHERE name = 'A  b'"]}
    assert query_match(prediction, row) == same
