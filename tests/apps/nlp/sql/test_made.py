"""The made questions: equal by seed, answered by their databases, and held out by database and template."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.data.splits import Split
from apps.nlp.decode.grammar import Grammar
from apps.nlp.sql import made
from apps.nlp.sql.execution import execute
from apps.nlp.sql.made import questions, write_databases
from apps.nlp.sql.schema import grammar_of, parsed, resource


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
        grammar = Grammar(grammar_of(schema, question))
        state = grammar.start()
        for byte in row["target"].encode():
            state = grammar.steps(state).get(byte)
            assert state is not None, row["target"]
        assert grammar.ends(state)


def test_no_template_of_training_is_in_validation_or_test() -> None:
    words = resource("questions.yaml")
    for kind in ("shapes", "joins", "conditions"):
        for own in words[kind].values():
            assert own["held_out"]
            assert not {*own["train"]} & {*own["held_out"]}


def test_the_test_asks_real_tables(tmp_path: Path) -> None:
    paths = {path.stem: path for path in write_databases(tmp_path, "test", 0)}
    assert execute(paths["test_wine"], "SELECT COUNT(*), COUNT(DISTINCT cultivar) FROM wines") == [(178, 3)]
    assert execute(paths["test_http"], "SELECT phrase FROM statuses WHERE code = 404") == [("Not Found",)]
    if "test_zones" in paths:
        joined = "SELECT countries.name FROM zones JOIN countries ON zones.country_code = countries.code"
        assert execute(paths["test_zones"], f"{joined} WHERE zones.zone = 'Berlin'") == [("Germany",)]
