"""A model that asks databases: constrained, even untrained weights write queries that run."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from places import ROOT
from tasked import text_to_text

from apps.cli import main
from apps.data.subwords import EOS_ID, SubwordConfig
from apps.nlp.decode import DecodeConfig
from apps.nlp.sql import made
from apps.nlp.sql.clauses import CLAUSES, clauses
from apps.nlp.sql.execution import valid
from apps.nlp.text_to_text.data import TextToTextData
from apps.nlp.text_to_text.metrics import METRICS

SUBWORDS = SubwordConfig(vocab_size=500, symbols=("▁", "_", "'", ","))
GREEDY = DecodeConfig("greedy", max_length_ratio=0.2, max_length_extra=20)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TextToTextData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "_DATABASES", {"train": 6, "val": 2})
        patch.setattr(made, "_QUESTIONS", {"train": 20, "val": 5, "test": 3})
        cache = str(tmp_path_factory.mktemp("cache"))
        data = TextToTextData("made_sql", cache_dir=cache, tokenizer=SUBWORDS, max_length=400)
        assert len(data.examples("train")) == 120
    return data


def test_questions_are_of_their_own_databases_and_words_and_clauses_are_told_by_subwords(data):
    names = {split: {Path(row["database"]).stem for row in data.rows(split)} for split in ("val", "test")}
    assert names["val"] == {"val_000", "val_001"}
    assert names["test"] >= {"test_wine", "test_http"}
    assert all(row["template"] and row["references"][0].startswith("SELECT ") for row in data.rows("test"))
    spelled = [data.subwords.pieces(data.subwords.encode([text], "source")[0], "source") for text in
               ("the airport delay", "flights(airport_delay)", "'airport'")]  # fmt: skip
    airport = spelled[2][spelled[2].index("'") + 1 : -1]
    for pieces in spelled:
        start = pieces.index(airport[0])
        assert pieces[start : start + len(airport)] == airport
    query = "SELECT name, COUNT(*) FROM a JOIN b ON a.x = b.x WHERE c > 1 GROUP BY name ORDER BY name ASC LIMIT 3"
    ids = data.subwords.encode([query], "target")[0]
    label_L = clauses(torch.tensor([[2, *ids, EOS_ID, 0]]), data.subwords)[0]
    assert label_L[[0, -2, -1]].tolist() == [-1, -1, -1]
    seen = [CLAUSES[i] for i in dict.fromkeys(label_L[label_L >= 0].tolist())]
    assert seen == ["SELECT", "FROM", "JOIN", "WHERE", "GROUP BY", "ORDER BY", "LIMIT"]
    where = [i for i, label in zip(ids, label_L[1:-2].tolist(), strict=True) if label == CLAUSES.index("WHERE")]
    assert data.subwords.decode([where], "target") == ["WHERE c > 1"]


def test_constrained_queries_run_and_a_validation_while_training_is_free(data) -> None:
    torch.manual_seed(0)
    model = text_to_text(data, constrain="sql", metrics=["execution", "valid"], decode=GREEDY).eval()
    rows = data.rows("test")
    texts = [row["source"] for row in rows]
    assert [valid(text, row) for text, row in zip(model.predict(texts), rows, strict=True)] == [1.0] * len(rows)
    free = text_to_text(data, metrics=["execution", "valid"], decode=GREEDY).eval()
    free.load_state_dict(model.state_dict())
    assert sum(valid(text, row) for text, row in zip(free.predict(texts), rows, strict=True)) < len(rows)
    with pytest.raises(ValueError, match=r"^'how many\?' has no tables after the question"):
        model.predict(["how many?"])
    with pytest.raises(ValueError, match="constrain='sqll'"):
        text_to_text(data, constrain="sqll")


def test_a_run_is_tested_and_asks_a_database_by_the_command_line(data, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(made, "_DATABASES", {"train": 6, "val": 2})
    monkeypatch.setattr(made, "_QUESTIONS", {"train": 20, "val": 5, "test": 3})
    model = {"copy": True, "constrain": "sql", "metrics": ["execution", "valid", "query_match"],
             "transformer": {"size": "nano", "dim": 32, "encoder_layers": 2, "decoder_layers": 2, "hidden_dim": 32},
             "moe": {"num_experts": 2, "expert": {"class_path": "core.FFN", "init_args": {"hidden_dim": 16}}},
             "decode": {"method": "greedy", "max_length_ratio": 0.2, "max_length_extra": 20}}  # fmt: skip
    config = {
        "model": {"class_path": "TextToText", "init_args": model},
        "data": {"class_path": "TextToTextData",
                 "init_args": {"dataset": "made_sql", "cache_dir": str(data.cache),
                               "tokenizer": {"vocab_size": 500, "symbols": ["▁", "_", "'", ","]}}},
        "trainer": {"accelerator": "cpu", "max_steps": 2},
    }  # fmt: skip
    Path("sql.yaml").write_text(json.dumps(config))
    asked = ["--config", "sql.yaml", "--run_dir", "run"]
    assert main(["fit", *asked]) == 0
    assert main(["test", *asked]) == 0
    tested = json.loads(Path("run/test.json").read_text())
    assert tested["test/valid"] == 1.0
    # The configuration, its page and the report name the same metrics, execution accuracy first; squad's is none.
    page = (ROOT / "docs" / "how_to" / "ask_a_database.md").read_text(encoding="utf-8")
    own = yaml.safe_load((ROOT / "configs" / "nlp" / "text_to_sql.yaml").read_text())["model"]["init_args"]["metrics"]
    assert own == model["metrics"] == re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert {name for name in METRICS if f"test/{name}" in tested} == {*own}
    assert re.search(r"test execution [\d.]+ % in the test of run/", " ".join(capsys.readouterr().out.split()))
    assert Path("run/report/expert_clause.png").is_file()
    capsys.readouterr()
    wine = data.rows("test")[-1]["database"]
    question = ["predict", *asked, "--data.text", "How many are there?", "--data.database"]
    assert main([*question, wine]) == 0
    assert valid(capsys.readouterr().out, {"database": wine}) == 1.0
    Path("notes.txt").write_text("How many are there? Nobody knows.")
    assert main([*question, "notes.txt"]) == 1
    assert "database='notes.txt' is not an SQLite database" in capsys.readouterr().err
