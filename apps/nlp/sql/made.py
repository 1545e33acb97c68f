"""Made questions: templates of English and SQL, filled with the names and values of any SQLite file.

Training and validation ask made databases; the test asks real tables that come with Python, scikit-learn and the time
zones. Validation and test have other databases than training, and other templates.
"""

from __future__ import annotations

import http
import random
import re
import sqlite3
import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from apps.data.sources import Made
from apps.data.splits import SPLITS, Split
from apps.nlp.sql.execution import execute, opened
from apps.nlp.sql.schema import Schema, join, read_schema, resource, serialized, sql_name

_SEED = 0
_DATABASES = {"train": 400, "val": 20}
_QUESTIONS = {"train": 50, "val": 25, "test": 100}
"""Questions per database."""
_JOINED = 0.25
"""Share of questions that join two tables, if tables can be joined."""
_CONDITIONS = (0, 0, 1, 1, 1, 2)
_VALUE = re.compile(r"[A-Za-z][\w-]*( [\w-]+){0,2}|\d+(\.\d{1,3})?", re.ASCII)
"""What may be a value in a question: one to three words, or a number of few digits."""

Table = tuple[str, Mapping[str, str], list[tuple[Any, ...]]]
"""A table's name, the declarations of its columns, and its rows."""
Values = Mapping[str, list[Any]]
"""What a question may name of each column of a table."""


class MadeDatabases(Made):
    """The source of the databases, which are written and not fetched."""

    def installed(self) -> None:  # type: ignore[override]
        return None

    def fetch(self, folder: Path) -> None:
        for split in SPLITS:
            write_databases(folder, split, _SEED)


SOURCE = MadeDatabases(Path(__file__))


def read_made(root: Path, language: str) -> dict[Split, list[dict[str, str]]]:
    """Return the rows of each split, which ask the databases of a folder."""
    return {
        split: [row for path in sorted(root.glob(f"{split}_*.sqlite")) for row in questions(path, split, _SEED)]
        for split in SPLITS
    }


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
        with closing(sqlite3.connect(paths[-1])) as connection, connection:
            connection.execute("PRAGMA synchronous = OFF")
            for table, columns, rows in tables:
                declared = ", ".join(f"{sql_name(column)} {kind}" for column, kind in columns.items())
                connection.execute(f"CREATE TABLE {sql_name(table)} ({declared})")
                places = ", ".join("?" * len(columns))
                connection.executemany(f"INSERT INTO {sql_name(table)} VALUES ({places})", rows)
    return paths


def questions(database: str | Path, split: Split, seed: int) -> Iterator[dict[str, str]]:
    """Yield rows that ask a database: source (question and schema), question, target, database and template.

    Each query returns something, and no question comes twice.
    """
    rng, part = random.Random(f"{seed} {split} {Path(database).name}"), "train" if split == "train" else "held_out"
    schema = read_schema(database)
    values = {table: _values(database, schema, table) for table in schema.tables}
    asked: set[str] = set()
    for _ in range(20 * _QUESTIONS[split]):
        if len(asked) == _QUESTIONS[split]:
            return
        row = _question(rng, part, schema, values)
        if row is None or row["question"] in asked:
            continue
        if any(value for answer in execute(database, row["target"]) for value in answer):
            asked.add(row["question"])
            yield {"source": row["question"] + serialized(schema), **row, "database": str(database)}


def _values(database: str | Path, schema: Schema, table: str) -> Values:
    """Return the values of a table, without the columns that join it."""
    keys = {"id", *(key[at + 1] for key in schema.joins for at in (0, 2) if key[at] == table)}
    query = f"SELECT DISTINCT {{}} FROM {sql_name(table)} LIMIT 500"
    with opened(database) as connection:
        rows = {c: connection.execute(query.format(sql_name(c))) for c in schema.tables[table] if c not in keys}
        is_text = {c: kind != "number" for c, kind in schema.tables[table].items()}
        found = {
            c: [v for (v,) in own if _VALUE.fullmatch(str(v)) and isinstance(v, str) == is_text[c]]
            for c, own in rows.items()
        }
    return {column: own for column, own in found.items() if len(own) > 1}


def _columns(values: Values, key: str) -> list[str]:
    """Return the columns of text ("d") or numbers ("n")."""
    return [name for name, own in values.items() if isinstance(own[0], str) == (key == "d")]


def _question(rng: random.Random, part: str, schema: Schema, values: Mapping[str, Values]) -> dict[str, str] | None:
    """Return a question with its query and template, or None if the chosen tables do not have what it needs."""
    words = resource("questions.yaml")
    key = rng.choice(schema.joins) if schema.joins and rng.random() < _JOINED else None
    table, other = (key[0], key[2]) if key else 2 * (rng.choice(list(values)),)
    texts, numbers = _columns(values[other], "d"), _columns(values[table], "n")
    if not texts or not numbers or len(values[table]) < 2:
        return None
    name, template, sql = _template(rng, part, words["joins" if key else "shapes"])
    count = max(rng.choice(_CONDITIONS), bool(key)) if "{w}" in template else 0
    conditions = [_condition(rng, part, values[other], f"{sql_name(other)}." if key else "") for _ in range(count)]
    link = rng.choice(("and", "or"))
    said = "".join(f" {link if place else ''} {own[0]}" for place, own in enumerate(conditions)).replace("  ", " ")
    spelled = "".join(f" {link.upper() if place else 'WHERE'} {own[1]}" for place, own in enumerate(conditions))
    aggregate, names = rng.choice(list(words["aggregates"].items()))
    first, second = rng.sample(list(values[table]), 2)
    columns = {"c": first, "e": second, "d": rng.choice(texts), "n": rng.choice(numbers), "t": table, "o": other}
    shared = {"A": aggregate, "a": rng.choice(names), "k": rng.randint(2, 9), "j": join(*key) if key else ""}
    question = template.format(**{k: own.replace("_", " ") for k, own in columns.items()}, **shared, w=said)
    query = sql.format(**{k: sql_name(own) for k, own in columns.items()}, **shared, w=spelled)
    return {"question": question, "target": query, "template": "/".join([name, *(own[2] for own in conditions)])}


def _template(rng: random.Random, part: str, among: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return a template's name, its words and its SQL."""
    name, own = rng.choice(list(among.items()))
    number = rng.randrange(len(own[part]))
    return f"{name}.{number}", own[part][number], own["sql"]


def _condition(rng: random.Random, part: str, values: Values, prefix: str) -> tuple[str, str, str]:
    """Return a condition as it is said and in SQL, and its template."""
    conditions = resource("questions.yaml")["conditions"]
    fitting = {name: own for name, own in conditions.items() if _columns(values, own["sql"][1])}
    name, template, sql = _template(rng, part, fitting)
    key, column = sql[1], rng.choice(_columns(values, sql[1]))
    first, second = sorted(rng.sample(values[column], 2))
    fills = {"v": first, "u": second, "p": str(first).split()[0]}
    said = template.format(**fills, **{key: column.replace("_", " ")})
    return said, sql.format(**fills, **{key: prefix + sql_name(column)}), name


def _made(rng: random.Random) -> list[Table]:
    """Return one to three tables of a made database; the later ones refer to the first."""
    words, space, tables = resource("questions.yaml"), rng.choices("_ ", (19, 1))[0], list[Table]()
    domain = rng.choice(list(words["domains"].values()))

    def invented() -> str:
        return "".join(rng.choices(words["syllables"], k=rng.randint(2, 4)))

    def renamed(name: str) -> str:
        name = rng.choices((name, rng.choice(words["nouns"]), invented()), (6, 2, 2))[0]
        return f"{rng.choice(words['modifiers'])}{space}{name}" if rng.random() < 0.3 else name

    for table in rng.sample(domain["tables"], rng.choice((1, 1, 2, 2, 3))):
        size = rng.randint(20, 60)
        columns: list[tuple[str, str, Sequence[Any]]] = []
        for name in rng.sample(domain["names"], rng.randint(1, 2)):
            values = [" ".join(invented().title() for _ in range(rng.choice((1, 1, 2)))) for _ in range(size)]
            columns.append((renamed(name), "TEXT", values))
        for name in rng.sample(list(domain["categories"]), rng.randint(1, 2)):
            columns.append((renamed(name), "TEXT", rng.choices(domain["categories"][name], k=size)))
        for name in rng.sample(domain["numbers"], rng.randint(2, 6)):
            digits, most = rng.choice((None, None, 1, 2)), 10 ** rng.randint(1, 4)
            numbers = [round(rng.uniform(1, most), digits) for _ in range(size)]
            columns.append((renamed(name), "REAL" if digits else "INTEGER", numbers))
        rng.shuffle(columns)
        columns.insert(0, ("id", "INTEGER PRIMARY KEY", range(1, size + 1)))
        if tables:
            first, keys = tables[0][0], rng.choices(range(1, len(tables[0][2]) + 1), k=size)
            columns.append((f"{first.removesuffix('s')}{space}id", f"INTEGER REFERENCES {sql_name(first)}(id)", keys))
        named = {name: (kind, values) for name, kind, values in columns}  # the last of equal names
        rows = list(zip(*(values for _, values in named.values()), strict=True))
        tables.append((table, {name: kind for name, (kind, _) in named.items()}, rows))
    return tables


def _real() -> Iterator[tuple[str, list[Table]]]:
    """Yield the real databases: each name with its tables."""
    from sklearn import datasets

    for name, table, label in (
        ("wine", "wines", "cultivar"), ("iris", "flowers", "species"), ("breast_cancer", "tumors", "diagnosis")
    ):  # fmt: skip
        load = getattr(datasets, f"load_{name}")()
        columns = [re.sub(r"\W+", "_", column).strip("_") for column in load["feature_names"]]
        labels = load["target_names"][load["target"]].tolist()
        rows = [(*row, own) for row, own in zip(load["data"].tolist(), labels, strict=True)]
        yield f"test_{name}", [(table, {**dict.fromkeys(columns, "REAL"), label: "TEXT"}, rows)]
    kinds = {"code": "INTEGER", "name": "TEXT", "phrase": "TEXT", "description": "TEXT"}
    yield "test_http", [("statuses", kinds, [(s.value, s.name, s.phrase, s.description) for s in http.HTTPStatus])]
    folder = next((Path(path) for path in zoneinfo.TZPATH if Path(path, "zone.tab").is_file()), None)
    if folder is not None:
        lines = [(folder / name).read_text().splitlines() for name in ("iso3166.tab", "zone.tab")]
        countries, zones = ([tuple(line.split("\t")) for line in own if line[:1] != "#"] for own in lines)
        kinds = {"zone": "TEXT", "country_code": "TEXT REFERENCES countries(code)", "continent": "TEXT"}
        rows = [(z.split("/")[-1].replace("_", " "), code, z.split("/")[0], int(at[:3])) for code, at, z, *_ in zones]
        tables = [("countries", {"code": "TEXT PRIMARY KEY", "name": "TEXT"}, countries)]
        yield "test_zones", [*tables, ("zones", {**kinds, "latitude": "INTEGER"}, rows)]
