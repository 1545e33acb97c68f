"""Known tasks, each from a few rows in the form of its own files."""

import gzip
import hashlib
import json
import lzma
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from apps.data.cache import DataError
from apps.data.subwords import SubwordConfig
from apps.nlp.text_to_text import datasets
from apps.nlp.text_to_text.data import TextToTextData
from apps.nlp.text_to_text.datasets import TASK_DATASETS, Row

DESCRIPTIONS = """Package: libfoo1
Description-md5: 1
Description-en: library of foos
 A foo is a bar.
 .
 This package has the library:
  * of foos
  * of bars

Package: libfoo-dev
Description-md5: 2
Description-en: library of foos - headers
 This package has the headers.

Package: empty
Description-md5: 3
Description-en: a synopsis alone
"""
DESCRIPTIONS += DESCRIPTIONS[: DESCRIPTIONS.index("\n\n") + 1]  # the first one again
PACKAGES = """Package: libfoo1
Source: foo-1.2 (1.2-3)
Section: libs

Package: libfoo-dev
Source: foo-1.3
Section: libdevel
Tag: a::b,
 c::d
"""


def rows_of(name: str, root: Path, language: str = "en") -> dict[str, list[Row]]:
    return {split: list(rows) for split, rows in TASK_DATASETS[name].read(root, language).items()}


def write(root: Path, name: str, value) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def json_lines(root: Path, name: str, *rows) -> None:
    write(root, name, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("ending", ["", ".xz", ".gz", ".lz4"])
def test_debian(tmp_path, ending, monkeypatch):
    for name, text in (("d_main_i18n_Translation-en", DESCRIPTIONS), ("d_main_binary-amd64_Packages", PACKAGES)):
        path = write(tmp_path, name, text)
        if ending == ".lz4":
            if shutil.which("lz4") is None or not Path("/usr/lib/apt/apt-helper").exists():
                pytest.skip("no lz4 here")
            subprocess.run(["lz4", "-q", "--rm", str(path)], check=True)
        elif ending:
            packed = {".xz": lzma.compress, ".gz": gzip.compress}[ending](text.encode())
            path.unlink()
            path.with_name(name + ending).write_bytes(packed)
    first, second = rows_of("debian_synopsis", tmp_path)["train"]
    described = "A foo is a bar.\nThis package has the library:\n * of foos\n * of bars"
    own = {"source": described, "target": "library of foos", "package": "libfoo1", "section": "libs", "group": "foo-"}
    assert first == own
    assert (second["target"], second["group"]) == ("library of foos - headers", "foo-")
    with pytest.raises(ValueError, match=r"no Translation-de .* `apt-get -o Acquire::Languages=de update` as root"):
        rows_of("debian_synopsis", tmp_path, "de")
    monkeypatch.setattr(datasets, "LISTS", tmp_path / "none")
    with pytest.raises(DataError, match="run `apt-get -o Acquire::Languages=en update` as root"):
        _ = TextToTextData("debian_synopsis", cache_dir=str(tmp_path / "cache")).opened


def test_debian_s_packages_of_one_source_are_in_one_split(tmp_path):
    write(tmp_path, "x_Packages", "".join(f"Package: p{i}\nSource: s{chr(97 + i // 4)}\n\n" for i in range(80)))
    texts = [f"Package: p{i}\nDescription-en: name {i}\n The text of {i}.\n\n" for i in range(80)]
    write(tmp_path, "x_i18n_Translation-en", "".join(texts))
    options = {"tokenizer": SubwordConfig(vocab_size=300), "val_size": 8, "test_size": 12}
    data = TextToTextData("debian_synopsis", str(tmp_path), str(tmp_path / "cache"), **options)
    groups = [[row["group"] for row in data.rows(split)] for split in ("val", "test")]
    assert [len(own) for own in groups] == [8, 12]
    assert all(own.count(group) == 4 for own in groups for group in own)
    assert not {*groups[0]} & {*groups[1]}
    assert data.rows("test")[0]["package"].startswith("p")


def test_xsum(tmp_path):
    write(tmp_path, "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json", {"train": ["1"], "validation": ["2"], "test": ["3"]})
    for i in (1, 2, 3):
        parts = {"URL": "http", "TITLE": "T", "FIRST-SENTENCE": f"In short {i}.", "RESTBODY": f"Long\nstory {i}."}
        content = "\n".join(f"[SN]{name}[SN]\n{part}\n" for name, part in parts.items())
        write(tmp_path, f"bbc-summary-data/{i}.summary", content)
    rows = rows_of("xsum", tmp_path)
    for i, (own, *_) in enumerate(rows.values(), 1):
        assert (own["source"].split(), own["id"]) == (["Long", "story", f"{i}."], str(i))
        assert own["target"].strip() == f"In short {i}."
    assert len(rows) == 3
    assert TASK_DATASETS["xsum"].missing(tmp_path) is None
    # Summaries in JSON lines.
    for dataset, source, target in (("xsum", "document", "summary"), ("cnn_dailymail", "article", "highlights")):
        root = tmp_path / dataset
        for name in ("train", "validation", "test"):
            json_lines(root, f"{name}.jsonl", {source: f"d {name}", target: "s", "id": "1"})
        for split, name in (("val", "validation"), ("test", "test")):
            assert rows_of(dataset, root)[split] == [{"source": f"d {name}", "target": "s", "id": "1"}]


def test_cnn_dailymail(tmp_path):
    for split, site in (("train", "cnn"), ("val", "dailymail"), ("test", "cnn")):
        address = f"http://{split}"
        write(tmp_path, f"all_{split}.txt", address + "\n")
        name = hashlib.sha1(address.encode()).hexdigest()
        write(tmp_path, f"{site}/stories/{name}.story", f"News of {split}.\n\n@highlight\n\nOne\n\n@highlight\n\nTwo\n")
    rows = rows_of("cnn_dailymail", tmp_path)
    assert [(own[0]["source"].strip(), own[0]["target"]) for own in rows.values()] == [
        (f"News of {split}.", "One . Two .") for split in ("train", "val", "test")
    ]
    write(tmp_path, "all_test.txt", "http://gone\n")
    with pytest.raises(ValueError, match=r"all_test.txt: http://gone has no story"):
        rows_of("cnn_dailymail", tmp_path)


def test_squad(tmp_path):
    answers = [{"text": "Paris", "answer_start": 0}, {"text": "Paris", "answer_start": 0}, {"text": "in Paris"}]
    asked = {"context": "Paris is a city.", "qas": [{"question": "Where?", "id": "q", "answers": answers}]}
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        write(tmp_path, name, {"data": [{"title": "Paris", "paragraphs": [asked]}]})
    rows = rows_of("squad", tmp_path)
    assert set(rows) == {"train", "test"}
    source = "question: Where? context: Paris is a city."
    assert rows["test"] == [{"source": source, "target": ["Paris", "in Paris"], "id": "q", "group": "Paris"}]


def test_spider(tmp_path):
    write(tmp_path, "tables.json", [])
    database = tmp_path / "database/zoo/zoo.sqlite"
    database.parent.mkdir(parents=True)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE animal (id INTEGER, name TEXT)")
        connection.execute("CREATE TABLE keeper (age INTEGER)")
    for name in ("train_spider.json", "dev.json"):
        write(tmp_path, name, [{"db_id": "zoo", "question": "How many?", "query": "SELECT count(*) FROM animal"}])
    rows = rows_of("spider", tmp_path)
    asked = {"source": "How many? |animal:id#,name|keeper:age#|", "target": "SELECT count(*) FROM animal"}
    assert rows["train"] == rows["test"] == [{**asked, "database": str(database), "group": "zoo"}]


def test_wikisql(tmp_path):
    sql = [{"sel": 1, "agg": 3, "conds": [[0, 0, "USA"], [1, 1, 20]]}, {"sel": 0, "agg": 0, "conds": []}]
    for name in ("train", "dev", "test"):
        json_lines(tmp_path, f"data/{name}.tables.jsonl", {"id": "1-1", "header": ["Country", "Age"]})
        json_lines(tmp_path, f"data/{name}.jsonl", *({"table_id": "1-1", "question": "Q?", "sql": s} for s in sql))
    first, second = rows_of("wikisql", tmp_path)["val"]
    assert first["source"] == "Q? | Country, Age"
    assert first["target"] == "SELECT COUNT(Age) FROM table WHERE Country = USA AND Age > 20"
    assert (first["sql"], first["table_id"], Path(first["database"]).name) == (sql[0], "1-1", "dev.db")
    assert second["target"] == "SELECT Country FROM table"
    assert TASK_DATASETS["wikisql"].missing(tmp_path) is None
