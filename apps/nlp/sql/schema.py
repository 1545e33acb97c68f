"""The tables of an SQLite file, and as text that a model reads."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from apps.nlp.sql.execution import opened

_MARKS = {"number": "#", "any": "~", "text": ""}
_NAME = r'(?:"(?:[^"]|"")*+"|\w+)'
_COLUMN = re.compile(rf"({_NAME})([#~]?)(?:=({_NAME})\.({_NAME}))?")
_TABLE = re.compile(rf'\|({_NAME}):((?:"(?:[^"]|"")*+"|[\w#~=.,])+)(?=\|)')


@dataclass(frozen=True)
class Schema:
    """The tables of a database.

    Attributes:
        tables: of each table its columns, each with what its declared type holds: "number", "text" or "any".
        joins: (table, column, other table, other column) that may be joined: the declared foreign keys; in a database
            without any, the columns of equal names, but for "id" and "name".
    """

    tables: Mapping[str, Mapping[str, str]]
    joins: tuple[tuple[str, str, str, str], ...] = ()


def read_schema(database: str | Path) -> Schema:
    """Return the schema of an SQLite file, which is only read.

    Raises:
        ValueError: no such file, one that is not an SQLite database, or one without tables.
    """
    names = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    keys = 'SELECT "from", "table", "to", seq + 1 FROM pragma_foreign_key_list(?)'
    with opened(database) as connection:
        tables = {name: connection.execute("SELECT name, type, pk FROM pragma_table_info(?)", (name,)).fetchall()
                  for (name,) in connection.execute(names).fetchall()}  # fmt: skip
        declared = [(name, *key) for name in tables for key in connection.execute(keys, (name,))]
    if not tables:
        raise ValueError(f"database={str(database)!r} has no tables")
    joins = [
        (name, own, other, column)
        for name, own, referred, to, place in declared
        for other in tables
        for column, _, primary in tables[other]  # the key may name a table or column that is not there
        if other.lower() == referred.lower() and other != name
        if (column.lower() == to.lower() if to else primary == place)
    ]
    equal = [
        (name, own, other, column)
        for (name, columns), (other, others) in itertools.combinations(tables.items(), 2)
        for own, _, _ in columns for column, _, _ in others
        if own.lower() == column.lower() and own.lower() not in ("id", "name")
    ]  # fmt: skip
    kinds = {name: {column: _kind(kind.upper()) for column, kind, _ in own} for name, own in tables.items()}
    return Schema(kinds, tuple(dict.fromkeys(joins or equal)))


def _kind(declared: str) -> str:
    if re.search("CHAR|TEXT|CLOB", declared):
        return "text"
    return "number" if re.search("INT|REAL|FLOA|DOUB|NUMERIC|DEC", declared) else "any"


def serialized(schema: Schema) -> str:
    """Return the schema as a model reads it after a question: `` |airports:name,alt#|flights:dest=airports.faa|``.

    A column of numbers has a "#", one of any values a "~", a key its other table and column; names are as in SQL.
    """
    refers = {key[:2]: f"={sql_name(key[2])}.{sql_name(key[3])}" for key in schema.joins}
    tables = []
    for name, columns in schema.tables.items():
        spelled = [f"{sql_name(c)}{_MARKS[kind]}{refers.get((name, c), '')}" for c, kind in columns.items()]
        tables.append(f"|{sql_name(name)}:{','.join(spelled)}")
    return f" {''.join(tables)}|"


def parsed(source: str) -> tuple[str, Schema]:
    """Return the question and the schema of a source. A table that is cut, since the source is too long, is left out.

    Raises:
        ValueError: no whole table.
    """
    tables: dict[str, dict[str, str]] = {}
    joins = []
    for name, columns in _TABLE.findall(source):
        own = tables.setdefault(_raw(name), {})
        for column, mark, other, theirs in _COLUMN.findall(columns):
            own[_raw(column)] = next(kind for kind, known in _MARKS.items() if known == mark)
            joins += [(_raw(name), _raw(column), _raw(other), _raw(theirs))] if other else []
    if not tables:
        raise ValueError(f"{source[:60]!r} has no tables after the question: give a database (--data.database)")
    question = source[: next(_TABLE.finditer(source)).start()]
    there = [key for key in joins if key[3] in tables.get(key[2], ())]
    return question, Schema(tables, tuple(there))


def _raw(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


@functools.cache
def resource(name: str) -> Any:
    """Return the content of a YAML file of this folder."""
    return yaml.safe_load(Path(__file__).with_name(name).read_text())


def join(name: str, own: str, other: str, theirs: str) -> str:
    """Return one of a schema's ``joins`` as it follows FROM."""
    first, second = sql_name(name), sql_name(other)
    return f"{first} JOIN {second} ON {first}.{sql_name(own)} = {second}.{sql_name(theirs)}"


@functools.lru_cache(1 << 16)
def sql_name(name: str) -> str:
    """Return a table's or column's name as SQL spells it: in quotes if it is a keyword or no plain word."""
    if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            try:
                connection.execute(f"CREATE TABLE {name} ({name} INTEGER)")
                connection.execute(f"SELECT {name}, SUM({name}.{name}) FROM {name} WHERE {name} > 1 GROUP BY {name}")
                return name
            except sqlite3.Error:
                pass
    return '"' + name.replace('"', '""') + '"'
