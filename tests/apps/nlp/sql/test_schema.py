"""The schema of an SQLite file, as text and back, and the values that its grammar copies from a question."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from apps.nlp.decode.grammar import Grammar
from apps.nlp.sql.schema import Schema, grammar_of, parsed, read_schema, serialized, sql_name

_FLIGHTS = Schema(
    {"airports": {"faa": "text", "alt": "number"}, "flights": {"dest": "text", "delay": "any"}},
    (("flights", "dest", "airports", "faa"),),
)


def _made(path: Path, script: str) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def test_tables_columns_types_and_keys_are_read(tmp_path: Path) -> None:
    path = _made(
        tmp_path / "x.sqlite",
        "CREATE TABLE airports (faa VARCHAR(3) PRIMARY KEY, alt INT);"
        "CREATE TABLE flights (dest TEXT REFERENCES Airports, delay);"
        "CREATE VIEW high AS SELECT * FROM airports",
    )
    assert read_schema(path) == _FLIGHTS


def test_columns_of_equal_names_join_tables_where_no_key_is_declared(tmp_path: Path) -> None:
    path = _made(tmp_path / "x.sqlite", "CREATE TABLE a (id INT, Code TEXT); CREATE TABLE b (id INT, code TEXT)")
    assert read_schema(path).joins == (("a", "Code", "b", "code"),)


def test_a_schema_is_written_as_text_and_read_from_it() -> None:
    text = serialized(_FLIGHTS)
    assert text == " |airports:faa,alt#|flights:dest=airports.faa,delay~|"
    assert parsed("How many | which?" + text) == ("How many | which? ", _FLIGHTS)
    odd = Schema({'the "order"': {"a|b:c,d=e": "text", "größe in m": "number"}})
    assert parsed(f"What?{serialized(odd)}") == ("What? ", odd)


def test_a_table_that_is_cut_is_left_out() -> None:
    assert parsed("How? |airports:faa,alt#|flights:dest=airports.fa") == (
        "How? ",
        Schema({"airports": _FLIGHTS.tables["airports"]}),
    )
    with pytest.raises(ValueError, match=r"^'How\? \|airports:fa' has no tables after the question"):
        parsed("How? |airports:fa")


@pytest.mark.parametrize("script", ["", "CREATE TABLE t (a); DROP TABLE t"])
def test_a_database_without_tables_is_an_error(tmp_path: Path, script: str) -> None:
    with pytest.raises(ValueError, match=r"^database='.*empty.sqlite' has no tables$"):
        read_schema(_made(tmp_path / "empty.sqlite", script or "VACUUM"))


def test_names_are_quoted_where_sql_needs_it() -> None:
    names = ("alt", "order", "unit price", 'a"b', "1st", "größe", "left", "key")
    assert [sql_name(name) for name in names] == [
        "alt",
        '"order"',
        '"unit price"',
        '"a""b"',
        '"1st"',
        '"größe"',
        "left",
        "key",
    ]


def _is_in(query: str, question: str) -> bool:
    grammar = Grammar(grammar_of(_FLIGHTS, question))
    state = grammar.start()
    for byte in query.encode():
        if (state := grammar.steps(state).get(byte)) is None:
            return False
    return grammar.ends(state)


@pytest.mark.parametrize(
    ("query", "allowed"),
    [
        ("SELECT faa FROM airports WHERE alt > 5000", True),
        ("SELECT faa FROM airports WHERE alt > 500", False),  # not a number of the question
        ("SELECT dest FROM airports", False),  # a column of another table
        ("SELECT flights.dest FROM flights JOIN airports ON flights.dest = airports.faa LIMIT 3", True),
        ("SELECT dest FROM flights JOIN airports ON flights.dest = airports.faa", False),
        ("SELECT faa FROM airports WHERE faa = 'St John''s'", True),
        ("SELECT faa FROM airports WHERE faa LIKE 'St%' OR alt BETWEEN 3 AND 5000", True),
        ("SELECT AVG(faa) FROM airports", False),  # text
        ("SELECT AVG(delay), COUNT(*) FROM flights GROUP BY dest HAVING COUNT(*) > 3 ORDER BY COUNT(*) DESC", True),
        ("SELECT dest FROM flights ORDER BY COUNT(*) DESC", False),  # needs GROUP BY
        ("SELECT dest FROM flights; DROP TABLE flights", False),
    ],
)
def test_a_query_names_what_is_there_and_copies_its_values(query: str, allowed: bool) -> None:
    assert _is_in(query, "Which 3 are above 5,000 in St John's?") == allowed
