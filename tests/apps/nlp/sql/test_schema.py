"""The schema of an SQLite file as text and back, queries of its grammar, and the made questions."""

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from apps.data.splits import Split
from apps.nlp.decode.grammar import Grammar, Ref
from apps.nlp.sql import made
from apps.nlp.sql.execution import execute
from apps.nlp.sql.grammar import Rules, grammar_of
from apps.nlp.sql.made import questions, write_databases
from apps.nlp.sql.schema import Schema, parsed, read_schema, resource, serialized, sql_name

_FLIGHTS = Schema(
    {"airports": {"faa": "text", "alt": "number"}, "flights": {"dest": "text", "delay": "any"}},
    (("flights", "dest", "airports", "faa"),),
)


def _made(path: Path, script: str) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def test_tables_columns_types_and_keys_are_read(tmp_path: Path) -> None:
    flights = "CREATE TABLE flights (dest TEXT REFERENCES Airports, delay)"
    keyed = f"CREATE TABLE airports (faa VARCHAR(3) PRIMARY KEY, alt INT); {flights}"
    path = _made(tmp_path / "x.sqlite", f"{keyed}; CREATE VIEW high AS SELECT * FROM airports")
    assert read_schema(path) == _FLIGHTS
    # Columns of equal names join tables where no key is declared.
    path = _made(tmp_path / "y.sqlite", "CREATE TABLE a (id INT, Code TEXT); CREATE TABLE b (id INT, code TEXT)")
    assert read_schema(path).joins == (("a", "Code", "b", "code"),)
    for script in ("VACUUM", "CREATE TABLE t (a); DROP TABLE t"):
        with pytest.raises(ValueError, match=r"^database='.*empty.sqlite' has no tables$"):
            read_schema(_made(tmp_path / "empty.sqlite", script))


def test_a_schema_is_written_as_text_and_read_from_it_but_for_a_table_that_is_cut():
    text = serialized(_FLIGHTS)
    assert text == " |airports:faa,alt#|flights:dest=airports.faa,delay~|"
    assert parsed("How many | which?" + text) == ("How many | which? ", _FLIGHTS)
    odd = Schema({'the "order"': {"a|b:c,d=e": "text", "größe in m": "number"}})
    assert parsed(f"What?{serialized(odd)}") == ("What? ", odd)
    left = Schema({"airports": _FLIGHTS.tables["airports"]})
    assert parsed("How? |airports:faa,alt#|flights:dest=airports.fa") == ("How? ", left)
    with pytest.raises(ValueError, match=r"^'How\? \|airports:fa' has no tables after the question"):
        parsed("How? |airports:fa")
    quoted = ('"order"', '"unit price"', '"1st"', '"größe"')
    assert [sql_name(name.strip('"')) for name in (*quoted, "alt", "left", "key")] == [*quoted, "alt", "left", "key"]
    assert sql_name('a"b') == '"a""b"'


def _is_in(query: str, question: str, schema: Schema = _FLIGHTS) -> bool:
    grammar = Grammar(grammar_of(schema, question))
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


def _filled(folder: Path, name: str) -> Path:
    path = _made(folder / f"{name}.sqlite", _SCHEMAS[name])
    with closing(sqlite3.connect(path)) as connection:
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
    path, rng = _filled(tmp_path, name), random.Random(0)
    schema = read_schema(path)
    for question in _QUESTIONS:
        rules = grammar_of(schema, question)
        for _ in range(60):
            execute(path, _sentence(rules, rng))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "_DATABASES", {"train": 5, "val": 4})
    monkeypatch.setattr(made, "_QUESTIONS", {"train": 10, "val": 10, "test": 10})


def test_databases_and_questions_are_equal_by_seed(tmp_path: Path) -> None:
    def run(folder: str, seed: int) -> tuple[list[bytes], list[dict[str, str]]]:
        (tmp_path / folder).mkdir()
        paths = write_databases(tmp_path / folder, "train", seed)
        rows = [row for path in paths for row in questions(path, "train", seed)]
        return [path.read_bytes() for path in paths], [{**row, "database": ""} for row in rows]

    first, again, other = run("a", 0), run("b", 0), run("c", 1)
    assert again == first
    assert [a != b for a, b in zip(other, first, strict=True)] == [True, True]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_queries_return_something_and_are_in_the_grammar(tmp_path: Path, split: Split) -> None:
    paths = write_databases(tmp_path, split, 0)
    rows = [row for path in paths for row in questions(path, split, 0)]
    assert len({(row["database"], row["question"]) for row in rows}) == len(rows) > 30
    for row in rows[::7]:
        assert any(value for answer in execute(row["database"], row["target"]) for value in answer)
        question, schema = parsed(row["source"])
        assert question.strip() == row["question"]
        assert _is_in(row["target"], question, schema), row["target"]


def test_the_test_asks_real_tables_by_templates_of_its_own(tmp_path: Path):
    words = resource("questions.yaml")
    for kind in ("shapes", "joins", "conditions"):
        for own in words[kind].values():
            assert own["held_out"]
            assert not {*own["train"]} & {*own["held_out"]}
    paths = {path.stem: path for path in write_databases(tmp_path, "test", 0)}
    assert execute(paths["test_wine"], "SELECT COUNT(*), COUNT(DISTINCT cultivar) FROM wines") == [(178, 3)]
    assert execute(paths["test_http"], "SELECT phrase FROM statuses WHERE code = 404") == [("Not Found",)]
    if "test_zones" in paths:
        joined = "SELECT countries.name FROM zones JOIN countries ON zones.country_code = countries.code"
        assert execute(paths["test_zones"], f"{joined} WHERE zones.zone = 'Berlin'") == [("Germany",)]
