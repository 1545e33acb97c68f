"""The retriever from the command line: trained, tested, and asked for items of a file of users."""

import itertools
import json

import pyarrow as pa
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from made_pairs import FILMS, TABLE, options

import apps
from apps.cli import main
from apps.recsys.retrieval.data import RetrievalData
from apps.recsys.retrieval.index import ItemIndex
from apps.recsys.tables.rows import scoring, streaming

USERS = {"key": [7, 8], "user": ["cy", "zoe"], "age": [50, 25]}
QUIET = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1}
MODEL = {"tower": {"dim": 4, "width": 8}, "embedding": {"dim": 4}, "ks": [1, 3]}
REPORT = {"pictures": False}  # another test has them


def write(folder, name, model, data):
    """Write a configuration, and return the options that name it and its run."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": QUIET}))
    return ["--config", str(path), "--run_dir", str(folder / name)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    arguments = options(folder, user_column="user", exclude_seen=True, top_k=2)
    pairs = {"class_path": "RetrievalData", "init_args": arguments}
    retriever = {"class_path": "TwoTowerRetriever", "init_args": {**MODEL, "report": REPORT}}
    retrieve = write(folder, "retrieve", retriever, pairs)
    files = {name: arguments[name] for name in ("dataset", "train_file", "cache_dir")}
    rows = {"class_path": "TableData", "init_args": {**files, "table": TABLE}}
    ranker = {"class_path": "MultiTaskRecommender", "init_args": {"report": None}}
    for words in (retrieve, write(folder, "rank", ranker, rows)):
        assert main(["fit", *words]) == 0
    pa.csv.write_csv(pa.table(USERS), folder / "users.csv")
    return folder, retrieve


def test_a_run_is_tested_and_without_a_file_the_pairs_of_the_test_are_predicted(runs):
    folder, where = runs
    assert main(["test", *where]) == 0
    metrics = json.loads((folder / "retrieve" / "test.json").read_text())
    assert {"test/recall_1", "test/recall_3", "test/ndcg_1", "test/mrr", "test/loss"} <= metrics.keys()
    folder, where = runs
    output = folder / "test.jsonl"
    words = ["--data.rank", str(folder / "rank"), "--data.candidates", "4", "--output", str(output)]
    assert main(["predict", *where, *words]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["user"] for line in lines] == ["ann", "bob", "cy"]
    assert all(len(line["film"]) == len(line["probability_like"]) == 2 for line in lines)


def predicted(folder, *words):
    """Return the lines of a prediction of the file of users, made beside nothing but the checkpoint."""
    given = ["--ckpt_path", str(folder / "retrieve"), "--data.predict_file", str(folder / "users.csv"), *words]
    assert main(["predict", *given, "--output", str(folder / "out.jsonl"), "--overwrite"]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_items_of_a_file_of_users_are_those_of_a_script(runs):
    folder, _ = runs
    lines = predicted(folder, "--data.predict_columns", "[key]")
    model = apps.load(folder / "retrieve")
    script = model.predict(USERS, top=2)
    assert [list(line) for line in lines] == [["index", "key", "user", "film", "score"]] * 2
    assert [(line["index"], line["key"], line["user"]) for line in lines] == [(0, "7", "cy"), (1, "8", "zoe")]
    assert [film for line in lines for film in line["film"]] == list(script["film"])
    assert [x for line in lines for x in line["score"]] == pytest.approx(list(script["score"]), rel=1e-5)
    assert set(lines[0]["film"]) == {"Alien", "Brazil"}  # cy has rated the other three
    ranked = predicted(folder, "--data.rank", str(folder / "rank"), "--data.candidates", "4")
    script = model.predict(USERS, top=2, rank=folder / "rank", candidates=4)
    assert [list(line) for line in ranked] == [["index", "user", "film", "score", "probability_like"]] * 2
    assert [film for line in ranked for film in line["film"]] == list(script["film"])
    likes = [x for line in ranked for x in line["probability_like"]]
    assert likes == pytest.approx(list(script["probability_like"]), rel=1e-5)


def test_a_checkpoint_of_an_earlier_version_is_used(runs):
    folder, _ = runs
    (path,) = (folder / "retrieve" / "checkpoints").glob("last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"] |= {"top_k": 10, "rank": None, "candidates": 100, "index_file": None}
    old = folder / "old" / "checkpoints" / "last.ckpt"
    old.parent.mkdir(parents=True)
    torch.save(checkpoint, old)
    config = yaml.safe_load((folder / "retrieve" / "config.yaml").read_text())
    config["model"]["init_args"] |= {"top_k": 10, "rank_task": None}
    (folder / "old" / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", "--ckpt_path", str(old)]) == 0
    whole = [apps.load(folder / run).predict(USERS, top=2) for run in ("old", "retrieve")]
    assert list(whole[0]["film"]) == list(whole[1]["film"])


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_users_are_read_piece_by_piece(runs, monkeypatch, kind):
    folder, _ = runs
    table = pa.table({"key": range(5), "user": ["cy", "zoe", "ann", "bob", "cy"], "age": [50, 25, 31, 40, 51]})
    for number, part in enumerate((table.slice(0, 3), table.slice(3))):
        path = folder / f"many-{number}.{kind}"
        pa.csv.write_csv(part, path) if kind == "csv" else pa.parquet.write_table(part, path)
    model = apps.load(folder / "retrieve")

    def lines(**changed):
        """Return what a Trainer predicts: for each batch its columns."""
        files = {"predict_file": str(folder / f"many-*.{kind}"), "predict_columns": ["key", "age"]}
        ranked = {"rank": str(folder / "rank"), "candidates": 4, "top_k": 3}
        data = RetrievalData(**options(folder, user_column="user", exclude_seen=True, **files, **ranked, **changed))
        data.adopt(model.encoding_state)
        return Trainer(**QUIET, logger=False, enable_progress_bar=False).predict(model, datamodule=data)

    (whole,) = lines()
    read = []
    monkeypatch.setattr(streaming, "_PIECE_ROWS", 2)
    monkeypatch.setattr(scoring, "one_ahead", lambda items: (read.append(item[0]) or item for item in items))
    batches = lines(eval_batch_size=2)
    sizes = [len(piece) for piece in read if "key" in piece.column_names]  # the others are the ranking model's
    assert sizes == [len(batch["index"]) for batch in batches] == [2, 2, 1]  # the second piece has a row of each file
    assert torch.cat([batch["index"] for batch in batches]).tolist() == whole["index"].tolist() == list(range(5))
    for name in ("key", "user", "age", "film"):
        assert [value for batch in batches for value in batch[name]] == whole[name]
    for name in ("score", "probability_like"):
        assert flat(value for batch in batches for value in batch[name]) == pytest.approx(flat(whole[name]), abs=1e-7)
    assert whole["age"] == [str(age) if kind == "csv" else age for age in table["age"].to_pylist()]
    script = model.predict(table, top=3, rank=folder / "rank", candidates=4)
    assert flat(whole["film"]) == script["film"].to_pylist()
    assert flat(whole["probability_like"]) == pytest.approx(script["probability_like"].to_pylist())


def test_an_index_file_stands_for_the_items(runs):
    folder, _ = runs
    model = apps.load(folder / "retrieve")
    index = model.index()
    # Negated, the worst come first.
    ItemIndex(FILMS, -index.vectors_ID, index.made_by).save(folder / "items.safetensors")
    lines = predicted(folder, "--data.index_file", str(folder / "items.safetensors"))
    whole = model.predict(USERS, top=5)
    scores = [x for x, user in zip(whole["score"], whole["user"], strict=True) if user == "zoe"]
    assert lines[1]["score"][0] == pytest.approx(-min(scores), rel=1e-5)


def test_errors_are_one_line(runs, capsys):
    folder, where = runs
    predict = ["predict", *where, "--output", str(folder / "none.jsonl")]
    (folder / "empty.csv").write_text("user,age\n")
    for words, message in (
        (["--data.rank", str(folder / "nothing")], "no checkpoint"),
        (["--data.predict_file", str(folder / "empty.csv")], "the rows to predict: there are none"),
    ):
        capsys.readouterr()
        assert main([*predict, *words]) == 1
        *notes, last = capsys.readouterr().err.splitlines()
        assert last.startswith("error: ")
        assert message in last
        assert not any("Traceback" in line for line in notes)
    assert not (folder / "none.jsonl").exists()
