"""``moesaic predict --output``: what is written and said, in which order, and what is never written over."""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from commands import full_disk
from pyarrow import parquet
from tiny_app import TinyModule

from apps.cli import main
from apps.cli.request import Request
from apps.cli.train import build
from apps.cli.write import page, predictions, row_groups
from apps.cli.write.predictions import PredictionFile, columns_of, rows_of, shortened
from apps.train.publish.predicting import Prediction, PredictionStream


@dataclass(frozen=True)
class Ranked:
    """Two classes an example, best first, and the true one."""

    index: torch.Tensor
    label: list[list[int]]
    probability: torch.Tensor
    target: list[str | None]


# Batches by length come in another order than their examples: 2, 0, then 1. The last knows no true class, and only one.
BATCHES = [
    Ranked(torch.tensor([2, 0]), [[1, 0], [0, 1]], torch.tensor([[0.75, 0.25], [0.5, 0.5]]), ["a, b", "c"]),
    Ranked(torch.tensor([1]), [[0]], torch.tensor([[0.625]]), [None]),
]
ROWS = [
    {"index": 0, "label": [0, 1], "probability": [0.5, 0.5], "target": "c"},
    {"index": 1, "label": [0], "probability": [0.625], "target": None},
    {"index": 2, "label": [1, 0], "probability": [0.75, 0.25], "target": "a, b"},
]


def write(path: Path) -> PredictionFile:
    with PredictionFile(path).open() as file:
        for batch in BATCHES:
            file.add(rows_of(batch))
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing is left beside it
    return file


def test_rows_are_in_the_order_of_their_index_in_every_format(tmp_path):
    for name in ("json", "csv", "parquet"):
        (tmp_path / name).mkdir()
    file = write(tmp_path / "json" / "p.jsonl")
    lines = (tmp_path / "json" / "p.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    assert (file.first, file.num_rows) == (lines, 3)
    write(tmp_path / "csv" / "p.csv")
    assert (tmp_path / "csv" / "p.csv").read_text().splitlines() == [
        "index,label_1,probability_1,label_2,probability_2,target",  # a column a place of a list
        "0,0,0.5,1,0.5,c",
        "1,0,0.625,,,",
        '2,1,0.75,0,0.25,"a, b"',
    ]
    write(tmp_path / "parquet" / "p.parquet")
    assert parquet.read_table(tmp_path / "parquet" / "p.parquet").to_pylist() == ROWS


def test_a_vector_is_shown_by_its_first_numbers():
    row = json.dumps({"index": 0, "vector": [0.5] * 64, "labels": list(range(16)), "name": "ä, b"}, ensure_ascii=False)
    shown = shortened(row)
    labels = "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]"
    assert shown == f'{{"index": 0, "vector": [0.5, 0.5, 0.5, 0.5, ... 60 more], "labels": {labels}, "name": "ä, b"}}'
    short = shown.replace("[0.5, 0.5, 0.5, 0.5, ... 60 more]", "[]")
    assert shortened(short) == short


def test_without_an_index_rows_stay_in_their_order(tmp_path):
    with PredictionFile(tmp_path / "p.jsonl", preview=1).open() as file:
        file.add(rows_of(torch.tensor([3, 1])))
        file.add(rows_of({"output": [2], "index": [0]}))
    assert (tmp_path / "p.jsonl").read_text() == '{"output": 3}\n{"output": 1}\n{"output": 2, "index": 0}\n'
    assert file.first == ['{"output": 3}']


def scores(*index: int, **others: object) -> dict[str, object]:
    """Return a batch of predictions, a half and a quarter of the index."""
    x = torch.tensor(index)
    return {"index": x, "score": torch.stack([x / 2, x / 4], 1), **others}


def test_columns_in_their_order_are_written_to_parquet_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(row_groups, "_ROWS", 3)
    keys = pa.chunked_array([["a"], ["b"]])
    with PredictionFile(tmp_path / "p.parquet", preview=3).open() as file:
        file.add_columns(scores(0, 1, key=keys))
        file.add_columns(scores(2, 4, key=pa.array(["c", None])))
        file.add_columns(scores(5, key=["e"]))
    assert [p.name for p in tmp_path.iterdir()] == ["p.parquet"]
    whole = parquet.ParquetFile(tmp_path / "p.parquet")
    assert [whole.metadata.row_group(i).num_rows for i in range(whole.num_row_groups)] == [4, 1]
    assert whole.schema_arrow.field("score").type == pa.list_(pa.float32())
    assert whole.read().to_pydict() == {
        "index": [0, 1, 2, 4, 5],
        "score": [[0.0, 0.0], [0.5, 0.25], [1.0, 0.5], [2.0, 1.0], [2.5, 1.25]],
        "key": ["a", "b", "c", None, "e"],
    }
    assert file.num_rows == 5
    assert [json.loads(line)["key"] for line in file.first] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([scores(4, 5), scores(0, 1)], [0, 1, 4, 5]),  # of another order
        ([scores(0, 4, key=[None, None]), scores(5, key=["e"])], [0, 4, 5]),  # of another type
    ],
)
def test_columns_that_do_not_follow_the_first_are_sorted_in_the_end(tmp_path, batches, expected):
    with PredictionFile(tmp_path / "p.parquet", preview=1).open() as file:
        for batch in batches:
            file.add_columns(batch)
    assert [p.name for p in tmp_path.iterdir()] == ["p.parquet"]
    rows = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert [(row["index"], row["score"]) for row in rows] == [(i, [i / 2, i / 4]) for i in expected]
    assert (file.num_rows, json.loads(file.first[0])["index"]) == (len(expected), expected[0])


def test_parquet_refuses_a_column_of_two_kinds(tmp_path):
    refused = pytest.raises(ValueError, match=r"p.parquet cannot hold .*give a file ending in .jsonl")
    with refused, PredictionFile(tmp_path / "p.parquet").open() as file:
        file.add([{"x": 1}])
        file.add([{"x": "one"}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet"])
def test_an_error_half_way_leaves_the_earlier_file(tmp_path, name):
    (tmp_path / name).write_text("earlier")
    with pytest.raises(RuntimeError, match="half-way"), PredictionFile(tmp_path / name).open() as file:
        file.add_columns(columns_of(BATCHES[0]))
        raise RuntimeError("half-way")
    assert (tmp_path / name).read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_named_and_leaves_the_earlier_file(tmp_path):
    (tmp_path / "p.jsonl").write_text("earlier")
    refused = pytest.raises(OSError, match=r"File too large.*p\.jsonl")
    with full_disk(4096), refused, PredictionFile(tmp_path / "p.jsonl").open() as file:
        file.add({"output": "x" * 100} for _ in range(1000))
    assert (tmp_path / "p.jsonl").read_text() == "earlier"


@pytest.fixture
def untrained(config: str) -> list[str]:
    """Return a command that predicts by an untrained model, in an empty folder."""
    return ["predict", "--config", config, "--ckpt_path", "none"]


def test_a_file_of_predictions_is_never_replaced_unasked(untrained, capsys, monkeypatch):
    assert main(untrained) == 0
    path = Path("runs/tiny/predictions.jsonl")
    first = path.read_text()
    assert capsys.readouterr().out.splitlines()[-1] == f"24 predictions in {path}"
    with monkeypatch.context() as patch:
        patch.setattr(TinyModule, "predict_step", lambda *_: pytest.fail("the refusal comes before the work"))
        assert main([*untrained, "--model.width", "16"]) == 2
    assert f"error: {path} exists: --overwrite replaces it, --output FILE writes another" in capsys.readouterr().err
    assert path.read_text() == first
    assert main([*untrained, "--model.width", "16", "--overwrite"]) == 0
    assert path.read_text() != first
    assert main([*untrained, "--output", "deep/down/p.csv"]) == 0
    assert "24 predictions in deep/down/p.csv" in capsys.readouterr().out
    assert Path("deep/down/p.csv").read_text().startswith("output_1,output_2,output_3\n")
    assert main([*untrained, "--output", "p.txt"]) == 2
    assert "output=p.txt is for lines of text, and this model predicts rows" in capsys.readouterr().err
    assert main([*untrained, "--output", "folder"]) == 2  # only a model that draws images writes one
    assert "output=folder must end in one of .jsonl, .csv, .parquet, .txt" in capsys.readouterr().err
    assert not Path("folder").exists()


@pytest.mark.parametrize("raw", [False, True])
def test_text_that_a_spreadsheet_would_compute_is_quoted_in_csv(tmp_path, raw):
    texts = ["=1+1", "+49 1", "-a", "@x", "a\tb", "a\nb", "\x1b[2J", "-1.5", "+2", "-1e-3", ".5", "a=b", "", "'", "-"]
    is_quoted = [True] * 7 + [False] * 7 + [True]
    with PredictionFile(tmp_path / "p.csv", raw_csv=raw).open() as file:
        file.add({"@": text, "number": -1.5, "list": [text, -2]} for text in texts)
    with open(tmp_path / "p.csv", newline="") as content:
        header, *rows = csv.reader(content)
    mark = "" if raw else "'"
    assert header == [f"{mark}@", "number", "list_1", "list_2"]
    expected = [f"{mark}{text}" if quoted else text for text, quoted in zip(texts, is_quoted, strict=True)]
    assert rows == [[text, "-1.5", text, "-2"] for text in expected]


def test_raw_csv_is_for_predictions_in_csv(untrained, capsys):
    options = Request.read("predict", [*untrained[1:], "--output=a.csv", "--overwrite"]).options
    assert (options.output, options.overwrite, options.raw_csv) == (Path("a.csv"), True, False)
    assert Request.read("predict", [*untrained[1:], "--output=a.csv", "--raw_csv"]).options.raw_csv
    assert main([*untrained, "--output", "a.jsonl", "--raw_csv"]) == 2
    assert "raw_csv is for predictions in CSV: give --output FILE.csv" in capsys.readouterr().err
    assert main(["test", *untrained[1:], "--raw_csv"]) == 2
    assert "raw_csv is an option of predict, not of test" in capsys.readouterr().err


def test_rows_are_not_kept_in_memory(untrained, monkeypatch):
    """The trainer gathers no predictions: it would hold them all."""
    cli = build("predict", untrained[1:])
    kept = []
    predict = cli.trainer.predict
    monkeypatch.setattr(cli.trainer, "predict", lambda **options: kept.append(predict(**options)))
    cli.execute()
    assert kept == [None]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_said_each_minute_or_by_a_bar_on_a_terminal(monkeypatch):
    items = [Prediction(i, {}, []) for i in range(5)]
    now = itertools.count(0.0, 25.0)  # a line each 25 seconds
    monkeypatch.setattr(predictions.time, "monotonic", lambda: next(now))
    log = io.StringIO()
    assert list(predictions.watched(iter(items), 9, True, 4, log)) == items
    assert log.getvalue() == "7 of 9 predictions, 0.04 a second\n"  # 4 and 3 after 75 s
    shown = Terminal()
    assert list(predictions.watched(iter(items), 9, True, 4, shown)) == items
    assert "predictions" in shown.getvalue()
    assert "\x1b[2K" in shown.getvalue()[-24:]  # it is erased at the end
    quiet = Terminal()
    assert list(predictions.watched(iter(items), None, False, 0, quiet)) == items
    assert quiet.getvalue() == ""


def test_a_terminal_shows_texts_as_they_grow(monkeypatch):
    def predict(start, tell=None):
        for number, grown in enumerate((["a", "a b"], ["c"])):
            for text in grown if tell else ():
                tell(text)
                shown.append(out.getvalue())
            yield Prediction(number, {}, [grown[-1]])

    stream = PredictionStream(predict, lambda: 2, {}, tells=True)
    for out, expected in ((Terminal(), ["a", "a b", "a b\nc"]), (io.StringIO(), [])):
        shown: list[str] = []
        monkeypatch.setattr("sys.stdout", out)
        assert predictions.print_stream(stream) == 2
        assert out.getvalue() == "a b\nc\n"
        assert shown == expected


def test_the_monitored_metric_and_those_that_the_model_shows_come_first(tmp_path):
    metrics = {"test/loss": 1.0, "test/zero_shot_colour": 0.5, "test/recall_1": 0.25, "test/recall_10": 0.75}
    made = page.test_page(metrics, "test/recall_10", ("recall_1",), tmp_path, None, "moesaic test", "", (), ())
    assert made.figures.rows == (
        ("test recall_10, %", "75.0000"),
        ("test recall_1, %", "25.0000"),
        ("test loss", "1.0000"),
        ("test zero_shot_colour, %", "50.0000"),
    )
