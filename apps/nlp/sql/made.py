"""Made questions: templates of English and SQL, filled with the names and values of any SQLite file.

Training and validation ask made databases; the test asks real tables that come with Python, scikit-learn and the time
zones. Validation and test have other databases than training, and other templates.
"""

from __future__ import annotations

import functools
import html.entities
import http
import random
import re
import sqlite3
import zoneinfo
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from apps.data.splits import Split
from apps.nlp.sql.execution import execute, opened
from apps.nlp.sql.schema import Schema, join, read_schema, serialized, sql_name

_DATABASES = {"train": 400, "val": 20}
_QUESTIONS = {"train": 50, "val": 25, "test": 100}
"""Questions per database."""
_JOINED = 0.25
"""Share of questions that join two tables, where tables can be joined."""
_CONDITIONS = (0, 0, 1, 1, 1, 2)
_VALUE = re.compile(r"[A-Za-z][\w-]*( [\w-]+){0,2}|\d+(\.\d{1,3})?", re.ASCII)
"""What may be a value in a question: one to three words, or a number of few digits."""

Table = tuple[str, Mapping[str, str], list[tuple[Any, ...]]]
"""A table's name, the declarations of its columns, and its rows."""
Values = Mapping[str, list[Any]]
"""What a question may name of each column of a table."""


@functools.cache
def _words() -> Any:
    return yaml.safe_load(Path(__file__).with_name("questions.yaml").read_text())


def write_databases(folder: Path, split: Split, seed: int) -> list[Path]:
    """Write the databases of a split into a folder, each an SQLite file, and return their paths.

    Equal seeds give equal bytes. The test's databases are real tables, the same for all seeds.
    """
    numbers = range(_DATABASES.get(split, 0))
    made = ((f"{split}_{number:03}", _made(random.Random(f"{seed} {split} {number}"))) for number in numbers)
    paths = []
    for name, tables in _real() if split == "test" else made:
        paths.append(folder / f"{name}.sqlite")
        paths[-1].unlink(missing_ok=True)
        with closing(sqlite3.connect(paths[-1], isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("BEGIN")
            for table, columns, rows in tables:
                declared = ", ".join(f"{sql_name(column)} {kind}" for column, kind in columns.items())
                connection.execute(f"CREATE TABLE {sql_name(table)} ({declared})")
                marks = ", ".join("?" * len(columns))
                connection.executemany(f"INSERT INTO {sql_name(table)} VALUES ({marks})", rows)
            connection.execute("COMMIT")
    return paths


def questions(database: str | Path, split: Split, seed: int) -> Iterator[dict[str, str]]:
    """Yield rows that ask a database: source (question and schema), question, target, database and template.

    Each query returns something, and no question comes twice.
    """
    rng, part = random.Random(f"{seed} {split} {Path(database).name}"), "train" if split == "train" else "held_out"
    schema = read_schema(database)
    values = _values(database, schema)
    asked: set[str] = set()
    for _ in range(20 * _QUESTIONS[split]):
        row = _question(rng, part, schema, values)
        if row is None or row["question"] in asked:
            continue
        if not any(value for answer in execute(database, row["target"]) for value in answer):
            continue
        asked.add(row["question"])
        yield {"source": row["question"] + serialized(schema), **row, "database": str(database)}
        if len(asked) == _QUESTIONS[split]:
            return


def _values(database: str | Path, schema: Schema) -> dict[str, Values]:
    """Return the values of each table, without the columns that join tables."""
    keys = {key for name, own, other, theirs in schema.joins for key in ((name, own), (other, theirs))}
    values: dict[str, Values] = {}
    with opened(database) as connection:
        for table, columns in schema.tables.items():
            names = [c.name for c in columns if (table, c.name) not in keys and c.name != "id"]
            query = "SELECT DISTINCT {} FROM {} LIMIT 500"
            rows = {n: connection.execute(query.format(sql_name(n), sql_name(table))).fetchall() for n in names}
            found = {name: [v for (v,) in own if _VALUE.fullmatch(str(v))] for name, own in rows.items()}
            values[table] = {name: own for name, own in found.items() if len(own) > 1}
    return values


def _columns(values: Values, kind: type | tuple[type, ...]) -> list[str]:
    return [name for name, own in values.items() if isinstance(own[0], kind)]


def _question(rng: random.Random, part: str, schema: Schema, values: Mapping[str, Values]) -> dict[str, str] | None:
    """Return a question with its query and template, or None if the chosen tables do not have what it needs."""
    key = rng.choice(schema.joins) if schema.joins and rng.random() < _JOINED else None
    table = key[0] if key else rng.choice(list(values))
    other = key[2] if key else table
    texts, numbers = _columns(values[other], str), _columns(values[table], (int, float))
    if not texts or not numbers or len(values[table]) < 2:
        return None
    name, shape = rng.choice(list(_words()["joins" if key else "shapes"].items()))
    number, template = rng.choice(list(enumerate(shape[part])))
    said, spelled, used = "", "", [f"{name}.{number}"]
    for place in range(max(rng.choice(_CONDITIONS), bool(key)) if "{w}" in template else 0):
        link = rng.choice(("and", "or")) if place else "where"
        english, sql, condition = _condition(rng, part, values[other], f"{sql_name(other)}." if key else "")
        said += f" {link} {english}" if place else f" {english}"
        spelled += f" {link.upper()} {sql}"
        used.append(condition)
    aggregate, names = rng.choice(list(_words()["aggregates"].items()))
    first, second = rng.sample(list(values[table]), 2)
    columns = {"c": first, "e": second, "d": rng.choice(texts), "n": rng.choice(numbers), "t": table, "o": other}
    shared = {"A": aggregate, "a": rng.choice(names), "k": rng.randint(2, 9), "j": join(*key) if key else ""}
    question = template.format(**{k: _said(name) for k, name in columns.items()}, **shared, w=said)
    query = shape["sql"].format(**{k: sql_name(name) for k, name in columns.items()}, **shared, w=spelled)
    return {"question": question, "target": query, "template": "/".join(used)}


def _said(name: str) -> str:
    return name.replace("_", " ")


def _condition(rng: random.Random, part: str, values: Values, prefix: str) -> tuple[str, str, str]:
    """Return a condition as it is said and in SQL, and its template."""
    columns = {"d": _columns(values, str), "n": _columns(values, (int, float))}
    fitting = [(name, own) for name, own in _words()["conditions"].items() if columns[own["sql"][1]]]
    name, condition = rng.choice(fitting)
    number, template = rng.choice(list(enumerate(condition[part])))
    key = condition["sql"][1]
    column = rng.choice(columns[key])
    first, second = sorted(rng.sample(values[column], 2), key=str if key == "d" else float)
    fills = {"v": first, "u": second, "p": str(first).split()[0]}
    sql = condition["sql"].format(**fills, **{key: prefix + sql_name(column)})
    return template.format(**fills, **{key: _said(column)}), sql, f"{name}.{number}"


def _made(rng: random.Random) -> list[Table]:
    """Return one to three tables of a made database; the later ones refer to the first."""
    words, space = _words(), rng.choices("_ ", (19, 1))[0]
    domain = rng.choice(list(words["domains"].values()))

    def invented() -> str:
        return "".join(rng.choices(words["syllables"], k=rng.randint(2, 4)))

    def renamed(name: str) -> str:
        kind = rng.choices(("known", "modified", "noun", "both", "invented"), (4, 2, 1, 1, 2))[0]
        name = rng.choice(words["nouns"]) if kind in ("noun", "both") else name
        modified = f"{rng.choice(words['modifiers'])}{space}{name}"
        return invented() if kind == "invented" else modified if kind in ("modified", "both") else name

    tables: list[Table] = []
    for table in rng.sample(domain["tables"], rng.choice((1, 1, 2, 2, 3))):
        size = rng.randint(20, 60)
        columns: dict[str, tuple[str, list[Any]]] = {}
        for base in rng.sample(domain["names"], rng.randint(1, 2)):
            columns[renamed(base)] = "TEXT", [
                " ".join(invented().capitalize() for _ in range(rng.choice((1, 1, 2)))) for _ in range(size)
            ]
        for base in rng.sample(list(domain["categories"]), rng.randint(1, 2)):
            columns[renamed(base)] = "TEXT", rng.choices(domain["categories"][base], k=size)
        for base in rng.sample(domain["numbers"], rng.randint(2, 6)):
            digits, most = rng.choice((None, None, 1, 2)), 10 ** rng.randint(1, 4)
            numbers = [round(rng.uniform(1, most), digits) for _ in range(size)]
            columns[renamed(base)] = "INTEGER" if digits is None else "REAL", numbers
        columns = dict(rng.sample(list(columns.items()), len(columns)))
        if tables:
            parent, rows = tables[0][0], len(tables[0][2])
            refers = f"INTEGER REFERENCES {sql_name(parent)}(id)"
            columns[f"{parent.removesuffix('s')}{space}id"] = refers, rng.choices(range(1, rows + 1), k=size)
        columns = {"id": ("INTEGER PRIMARY KEY", list(range(1, size + 1))), **columns}
        rows = list(zip(*(own for _, own in columns.values()), strict=True))
        tables.append((table, {column: kind for column, (kind, _) in columns.items()}, rows))
    return tables


def _real() -> Iterator[tuple[str, list[Table]]]:
    """Yield the real databases: each name with its tables."""
    from sklearn import datasets

    for name, table, label, load in (
        ("wine", "wines", "cultivar", datasets.load_wine()),
        ("iris", "flowers", "species", datasets.load_iris()),
        ("breast_cancer", "tumors", "diagnosis", datasets.load_breast_cancer()),
    ):
        columns = [re.sub(r"\W+", "_", column).strip("_") for column in load["feature_names"]]
        labels = [str(load["target_names"][target]) for target in load["target"]]
        rows = [(*row, target) for row, target in zip(load["data"].tolist(), labels, strict=True)]
        yield name, [(table, {**dict.fromkeys(columns, "REAL"), label: "TEXT"}, rows)]
    kinds = {"code": "INTEGER", "name": "TEXT", "phrase": "TEXT", "description": "TEXT"}
    yield "http", [("statuses", kinds, [(s.value, s.name, s.phrase, s.description) for s in http.HTTPStatus])]
    points = sorted(html.entities.name2codepoint.items())
    yield "html", [("entities", {"name": "TEXT", "codepoint": "INTEGER"}, points)]
    folder = next((Path(path) for path in zoneinfo.TZPATH if Path(path, "zone.tab").is_file()), None)
    if folder is not None:
        lines = {name: (folder / name).read_text().splitlines() for name in ("iso3166.tab", "zone.tab")}
        countries, zones = ([line.split("\t") for line in own if line[:1] != "#"] for own in lines.values())
        kinds = {"zone": "TEXT", "country_code": "TEXT REFERENCES countries(code)", "continent": "TEXT"}
        rows = [(z.split("/")[-1].replace("_", " "), code, z.split("/")[0], int(at[:3])) for code, at, z, *_ in zones]
        tables = [("countries", {"code": "TEXT PRIMARY KEY", "name": "TEXT"}, [tuple(row) for row in countries])]
        yield "zones", [*tables, ("zones", {**kinds, "latitude": "INTEGER"}, rows)]
