"""What the grammar of a schema generates runs, and the made questions are in it."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from apps.nlp.decode.grammar import Ref
from apps.nlp.sql.execution import execute
from apps.nlp.sql.schema import Rules, grammar_of, read_schema

_SCHEMAS = {
    "plain": "CREATE TABLE airports (faa TEXT, name TEXT, alt INTEGER, lat REAL)",
    "keys": (
        "CREATE TABLE school (id INTEGER PRIMARY KEY, city VARCHAR(20));"
        "CREATE TABLE pupil (name TEXT, age INT, school INT REFERENCES school, lost INT REFERENCES gone(id),"
        " odd INT REFERENCES school(missing))"
    ),
    "names": 'CREATE TABLE "order" ("group" TEXT, "unit price" REAL, "a""b" BLOB, left DATE, "1st" INT)',
    "shared": "CREATE TABLE flights (dest TEXT, hour INT, late); CREATE TABLE weather (hour INT, temp REAL, dest TEXT)",
    "text": "CREATE TABLE words (word TEXT)",
    "numbers": "CREATE TABLE points (x REAL, y REAL)",
}
_QUESTIONS = (
    "How many airports are above 5,000 feet?",
    "Which are in Land's End or 'New York', between -3.5 and 99999999999999999999?",
    "",
)


def _database(folder: Path, name: str) -> Path:
    path = folder / f"{name}.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(_SCHEMAS[name])
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = connection.execute(f'SELECT COUNT(*) FROM pragma_table_info("{table}")').fetchone()[0]
            connection.execute(f'INSERT INTO "{table}" VALUES ({", ".join("?" * columns)})', range(columns))
        connection.commit()
    return path


def _sentence(rules: Rules, rng: random.Random, name: str = "start", depth: int = 0) -> str:
    alternatives = rules[name]
    own = min(alternatives, key=len) if depth > 25 else rng.choice(alternatives)
    return "".join(_sentence(rules, rng, part.name, depth + 1) if isinstance(part, Ref) else part for part in own)


@pytest.mark.parametrize("name", _SCHEMAS)
def test_every_sentence_of_the_grammar_runs(tmp_path: Path, name: str) -> None:
    path, rng = _database(tmp_path, name), random.Random(0)
    schema = read_schema(path)
    for question in _QUESTIONS:
        rules = grammar_of(schema, question)
        for _ in range(120):
            execute(path, _sentence(rules, rng))
