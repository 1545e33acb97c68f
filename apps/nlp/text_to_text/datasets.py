"""Tasks from text to text that are known by name, and the readers of their own files.

A reader returns the rows of each split. A *row* has a ``source`` and a ``target``, a text or several right ones; what
else it has is kept for metrics. Where a split has no file, rows are held out; those of one ``group`` stay together.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.data.cache import SourceFailed
from apps.data.datasets import Dataset, register
from apps.data.documents import json_lines
from apps.data.sources import File, UrlSource
from apps.data.splits import Split
from apps.data.text_files import text_lines
from apps.nlp.sql import made
from apps.nlp.sql.schema import read_schema, serialized

Row = dict[str, Any]
Rows = Mapping[Split, Iterable[Row]]

LISTS = Path("/var/lib/apt/lists")


@dataclass(frozen=True, kw_only=True)
class TaskDataset(Dataset):
    """A task that is known by name.

    Attributes:
        read: returns the rows of a folder with its files, in a language.
        languages: those it is in; empty: one, which nobody chooses.
    """

    read: Callable[[Path, str], Rows]
    languages: tuple[str, ...] = ()


# ---- summaries

_JSON_SPLITS: tuple[tuple[Split, str], ...] = (("train", "train"), ("val", "validation"), ("test", "test"))


def _json_splits(root: Path, source: str, target: str) -> dict[Split, Iterable[Row]]:
    """Return the rows of ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``, the form of the hub's exports."""
    return {
        split: ({"source": row.pop(source), "target": row.pop(target), **row} for _, row in json_lines(path))
        for split, name in _JSON_SPLITS
        if (path := root / f"{name}.jsonl").is_file()
    }


def _read_xsum(root: Path, language: str) -> Rows:
    """Read the authors' files: a folder of ``ID.summary`` with marked parts, and the ids of each split."""
    if not (root / _XSUM_SPLITS).is_file():
        return _json_splits(root, "document", "summary")
    ids = json.loads((root / _XSUM_SPLITS).read_text(encoding="utf-8"))

    def rows(names: Iterable[str]) -> Iterator[Row]:
        for name in names:
            whole = (root / "bbc-summary-data" / f"{name}.summary").read_text(encoding="utf-8")
            parts = re.split(r"\[SN\](?:URL|TITLE|FIRST-SENTENCE|RESTBODY)\[SN\]", whole)
            *_, summary, text = parts
            if text.strip() and summary.strip():
                yield {"source": text, "target": summary, "id": name}

    return {split: rows(ids[name]) for split, name in _JSON_SPLITS}


_XSUM_SPLITS = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
_STORIES = ("cnn", "dailymail")


def _read_cnn_dailymail(root: Path, language: str) -> Rows:
    """Read ``cnn/stories`` and ``dailymail/stories`` by the lists of addresses that say which split a story is in."""
    lists = {split: root / f"all_{split}.txt" for split in ("train", "val", "test")}
    if not lists["train"].is_file():
        return _json_splits(root, "article", "highlights")

    def rows(path: Path) -> Iterator[Row]:
        for address in text_lines(path):
            name = f"{hashlib.sha1(address.strip().encode()).hexdigest()}.story"
            story = next((p for site in _STORIES if (p := root / site / "stories" / name).is_file()), None)
            if story is None:
                raise ValueError(f"{path}: {address} has no story {name} below {root}/cnn or dailymail")
            text, *highlights = story.read_text(encoding="utf-8").split("@highlight")
            if text.strip():  # some hundred stories are empty
                yield {"source": text, "target": " ".join(h.strip() + " ." for h in highlights), "id": name}

    return {split: rows(path) for split, path in lists.items()}  # type: ignore[misc]


# ---- questions


def _read_squad(root: Path, language: str) -> Rows:
    """Read SQuAD; the published dev set is the test, since the test set is not public."""

    def rows(path: Path) -> Iterator[Row]:
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    source = f"question: {asked['question']} context: {paragraph['context']}"
                    answers = list(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                    yield {"source": source, "target": answers, "id": asked["id"], "group": article["title"]}

    return {"train": rows(root / "train-v1.1.json"), "test": rows(root / "dev-v1.1.json")}


def _read_spider(root: Path, language: str) -> Rows:
    """Read Spider; the published dev set is the test. ``database`` is the file that a query can be run on."""

    def rows(*files: str) -> Iterator[Row]:
        for path in (root / file for file in files if (root / file).is_file()):
            for asked in json.loads(path.read_text(encoding="utf-8")):
                name = asked["db_id"]
                database = root / "database" / name / f"{name}.sqlite"
                kept = {"database": str(database), "group": name}
                source = asked["question"] + serialized(read_schema(database))
                yield {"source": source, "target": asked["query"], **kept}

    return {"train": rows("train_spider.json", "train_others.json"), "test": rows("dev.json")}


_AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
_OPERATORS = ("=", ">", "<", "OP")


def _read_wikisql(root: Path, language: str) -> Rows:
    """Read WikiSQL; ``sql`` is the query in its own form, of numbers of columns, and ``database`` has the table."""
    folder = root / "data" if (root / "data").is_dir() else root

    def rows(name: str) -> Iterator[Row]:
        headers = {table["id"]: table["header"] for _, table in json_lines(folder / f"{name}.tables.jsonl")}
        for _, asked in json_lines(folder / f"{name}.jsonl"):
            columns, sql = headers[asked["table_id"]], asked["sql"]
            what = f"{_AGGREGATES[sql['agg']]}({columns[sql['sel']]})" if sql["agg"] else columns[sql["sel"]]
            where = " AND ".join(f"{columns[c]} {_OPERATORS[o]} {value}" for c, o, value in sql["conds"])
            source = f"{asked['question']} | {', '.join(columns)}"
            target = f"SELECT {what} FROM table" + (f" WHERE {where}" if where else "")
            kept = {"sql": sql, "table_id": asked["table_id"], "database": str(folder / f"{name}.db")}
            yield {"source": source, "target": target, **kept}

    return {"train": rows("train"), "val": rows("dev"), "test": rows("test")}


# ---- Debian


_UPDATE = "run `apt-get -o Acquire::Languages={} update` as root, then try again"


@dataclass(frozen=True)
class _AptLists:
    """The lists of packages that apt keeps on a Debian system."""

    def __str__(self) -> str:
        return f"apt's lists in {LISTS}"

    def installed(self) -> Path:
        return LISTS

    def fetch(self, folder: Path) -> None:
        raise SourceFailed(f"no descriptions are there: {_UPDATE.format('en')}")


def _paragraphs(path: Path) -> Iterator[dict[str, str]]:
    """Yield the fields of each paragraph of a list, with the line ends of those that go over several lines."""
    if path.suffix == ".lz4":  # apt's own form, which apt reads
        done = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", str(path)], capture_output=True, check=False)
        if done.returncode:
            raise ValueError(f"{path} cannot be unpacked by apt-helper: {done.stderr.decode(errors='replace').strip()}")
        lines: Iterable[str] = done.stdout.decode().split("\n")
    else:
        lines = text_lines(path)
    fields: dict[str, str] = {}
    name = ""
    for line in (*lines, ""):
        if not line and fields:
            yield fields
            fields = {}
        elif line[:1] in (" ", "\t"):
            fields[name] += f"\n{line[1:]}"
        elif line:
            name, _, value = line.partition(": ")
            fields[name] = value


def _read_debian(root: Path, language: str) -> Rows:
    """Read a language's descriptions; packages of one source package, of any version, are one group."""
    descriptions, packages = sorted(root.glob(f"*i18n_Translation-{language}*")), sorted(root.glob("*_Packages*"))
    if not descriptions or not packages:
        raise ValueError(f"{root} has no Translation-{language} and Packages of apt: {_UPDATE.format(language)}")
    known = {own["Package"]: own for path in packages for own in _paragraphs(path) if "Package" in own}

    def rows() -> Iterator[Row]:
        seen = set()
        for own in (own for path in descriptions for own in _paragraphs(path)):
            synopsis, _, text = own.get(f"Description-{language}", "").partition("\n")
            text = re.sub(r"\n\.(\n|$)", "\n", text)
            package = own.get("Package", "")
            if not synopsis.strip() or not text.strip() or (package, text) in seen:
                continue
            seen.add((package, text))
            about = known.get(package, {})
            source = about.get("Source", package).partition(" ")[0]
            kept = {"package": package, "section": about.get("Section", ""), "group": re.sub(r"[\d.]+", "", source)}
            yield {"source": text, "target": synopsis, **kept}

    return {"train": rows()}


_SQUAD_FILES = (
    File("train-v1.1.json", "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
    File("dev-v1.1.json", "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"),
)
_SQUAD = UrlSource("https://rajpurkar.github.io/SQuAD-explorer/dataset/", _SQUAD_FILES)
_WIKISQL = UrlSource("https://github.com/salesforce/WikiSQL/raw/master/data.tar.bz2", (File("data.tar.bz2"),))
_WIKISQL_FILES = tuple(f"{split}{kind}.jsonl" for split in ("train", "dev", "test") for kind in ("", ".tables"))
_JSONL = ("train.jsonl", "validation.jsonl", "test.jsonl")
_BRING = "set root to a folder with its files."

# Standard tasks, by name.
TASK_DATASETS = {
    dataset.name: dataset
    for dataset in (
        TaskDataset(
            "debian_synopsis", "nlp", "Debian's package descriptions, text to one-line synopsis, about 69,000 in en",
            (("*i18n_Translation-*", "*_Packages*"),), (_AptLists(),), "as each package",
            "They change with Debian: say of which release and date yours are.",
            read=_read_debian, languages=("en", "de", "fr"),
        ),
        TaskDataset(
            "xsum", "nlp", "XSum, news to one sentence, 204,045 train, 11,332 val, 11,334 test",
            ((_XSUM_SPLITS, "bbc-summary-data/*.summary"), _JSONL), (), "research; cite Narayan et al. 2018", _BRING,
            read=_read_xsum,
        ),
        TaskDataset(
            "cnn_dailymail", "nlp", "CNN/DailyMail, news to highlights, 287,227 train, 13,368 val, 11,490 test",
            (("all_*.txt", "*/stories/*.story"), _JSONL), (), "research; cite Hermann et al. 2015, See et al. 2017",
            _BRING, read=_read_cnn_dailymail,
        ),
        TaskDataset(
            "squad", "nlp", "SQuAD 1.1, question and paragraph to answer, 87,599 train, 10,570 test (its dev set)",
            (tuple(file.name for file in _SQUAD_FILES),), (_SQUAD,), "CC BY-SA 4.0", read=_read_squad,
        ),
        TaskDataset(
            "made_sql", "nlp", "made questions of made tables to SQL, 20,000 train, 500 val; 500 test, of real tables",
            (("train_*.sqlite", "val_*.sqlite", "test_*.sqlite"),), (made.SOURCE,), read=made.read_made,
        ),
        TaskDataset(
            "spider", "nlp", "Spider, question and schema to SQL, 8,659 train, 1,034 test (its dev set)",
            (("train_spider.json", "dev.json", "tables.json", "database"),), (), "CC BY-SA 4.0", _BRING,
            read=_read_spider,
        ),
        TaskDataset(
            "wikisql", "nlp", "WikiSQL, question and columns to SQL, 56,355 train, 8,421 val, 15,878 test",
            (tuple(f"data/{name}" for name in _WIKISQL_FILES), _WIKISQL_FILES), (_WIKISQL,), "BSD 3-Clause",
            read=_read_wikisql,
        ),
    )
}  # fmt: skip

for _known in TASK_DATASETS.values():
    register(_known)
