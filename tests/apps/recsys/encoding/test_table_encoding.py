"""A checkpoint's encoding of its table: other rows of other files are encoded by it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from own_table import CONFIG, NAN, TEST, TRAIN, by_row, changed, same, write
from places import ROOT
from quiet_trainer import quiet_trainer
from refusals import refused

import apps
import core
from apps.cli import main
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.encoding.vocabulary import Vocabulary
from apps.recsys.schema import SplitConfig, TaskConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender

PAGE = ROOT / "docs" / "how_to" / "train_on_your_own_table.md"

# As many values of each column as in TRAIN, and as often, but Oslo is where Rome was and fr where de was.
SWAPPED = changed(
    city=["Oslo", "Oslo", "NA", "Rome", "", "Oslo"],
    shop=["fr", "de", "fr", "fr", "de", "fr"],
    age=["1", "2", "", "3", "inf", "4"],
)
NEW = {
    "key": ["k0", "k1", "k2"], "city": ["Oslo", "Paris", ""], "tags": ["z|y", "", "w"], "user": [1, 2, 77],
    "age": ["25", "", "30"], "shop": ["fr", "de", "de"],
}  # fmt: skip


def test_a_vocabulary_finds_its_texts_few_or_many_and_decimals_as_they_are_written_now():
    vocabulary = Vocabulary.of(pa.array(["skip", "b", "", "äö"]).slice(1))
    assert (len(vocabulary), vocabulary.texts()) == (3, ("b", "", "äö"))
    assert vocabulary.find(pa.array(["äö", "a", "b", None, ""])).tolist() == [2, -1, 0, -1, 1]
    assert Vocabulary.of(pa.array([], pa.string())).find(pa.array(["a"])).tolist() == [-1]
    assert vocabulary.digest != Vocabulary.of(pa.array(["", "b", "äö"])).digest
    # 5,000 texts; two are looked up by bisection, 100 in a hash table.
    texts = [f"{name}{i}" for i in range(2500) for name in ("ä", "z")]
    vocabulary = Vocabulary.of(pa.array(texts))
    wanted = ["z0", "ä2499", "", "zz", "ä", "a", "z2500", *texts[::60]]
    in_table = vocabulary.find(pa.array(wanted)).tolist()
    assert (in_table[:7], in_table[7:]) == ([1, 4998, -1, -1, -1, -1, -1], [*range(0, 5000, 60)])
    assert [int(vocabulary.find(pa.array([text]))[0]) for text in wanted] == in_table
    assert vocabulary.find(pa.array([], pa.string())).tolist() == []
    # Decimals of an earlier version's checkpoint are found as they are written now.
    for old, new in ((["5.00", "5.50", "-1.05"], ("5", "5.5", "-1.05")), (["1.10", "007.0", "v5.0"], None)):
        state = Vocabulary.of(pa.array(old)).state()
        assert Vocabulary.of_state(**state).texts() == (new or tuple(old))


def test_what_a_table_taught_is_used_again_where_it_is_the_same_and_encodes_another(own, tmp_path):
    first = own()
    state = first.encoding_state
    first.adopt(state)
    second = own()
    second.adopt(state)
    assert second.rows("train").columns.folder == first.rows("train").columns.folder
    assert len(list((tmp_path / "cache" / "tables").iterdir())) == 1
    learned = own()
    state = learned.encoding_state
    torch.save(state, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert Encoding.from_state(state).digest == Encoding.from_state(saved).digest
    write(tmp_path, train=SWAPPED)
    assert own().vocabulary("city") == (None, "Oslo", "NA", "Rome")  # what the rows themselves would teach
    data = own()
    data.adopt(state)
    assert data.features == learned.features  # with the mean age of the first table
    assert (data.vocabulary("city"), data.domain_values) == ((None, "Rome", "NA", "Oslo"), ("de", "fr"))
    rows = by_row(data.rows("train")[:], data.features)
    assert [r["city"] for r in rows] == [[3], [3], [2], [1], [0], [3]]
    assert [r["domain"] for r in rows] == [1, 0, 1, 1, 0, 1]
    assert same([r["dense"] for r in rows], [[1.0], [2.0], [NAN], [3.0], [NAN], [4.0]])
    assert data.findings.unseen["city"] == {"train": 0, "val": 0, "test": 1 / 2}
    # A domain that training lacks is named.
    state = own().encoding_state
    write(tmp_path, test={**TEST, "shop": ["fr", "it"]})
    data = own()
    data.adopt(state)
    refused("column 'shop' names the domain, but holds 'it', which training lacks, in", lambda: data.setup("test"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categorical": ("city",), "hash_rows": {}},
         "column 'user', which the model reads, is missing: table.categorical must"),
        ({"continuous": ()}, "column 'age', which the model reads, is missing: table.continuous must name it"),
        ({"continuous": (), "categorical": ("city", "user", "age")}, "column 'age' is continuous there and categor"),
        ({"continuous": ("age", "stars2")},
         r"column 'stars2' \(continuous\) is none that the model reads: leave it out"),
        ({"categorical": ("user", "city")}, "column 'user' stands where 'city' does there: name the columns in the"),
        ({"hash_rows": {"user": 50}}, "hash_rows of column 'user' is 100 there and 50 here"),
        ({"hash_rows": {}, "num_rows": {"user": 100}}, "hash_rows of column 'user' is 100 there and None here"),
        ({"num_rows": {"city": 9}}, "num_rows of column 'city' is None there and 9 here"),
        ({"tasks": {"like": TaskConfig("click")}}, "the tasks are click, like there and like here"),
        ({"tasks": {**CONFIG.tasks, "like": TaskConfig("stars", kind="count")}},
         "kind of task 'like' is 'binary' there and 'count' here"),
        ({"domain": None}, "table.domain is 'shop' there and None here"),
    ],
)  # fmt: skip
def test_a_table_that_the_checkpoint_is_not_of_is_refused(own, tmp_path, changes, message):
    state = own().encoding_state
    write(tmp_path, train={**TRAIN, "stars2": [1] * 6}, test={**TEST, "stars2": [1] * 2})
    for use in ("adopt", "extend"):
        other = own(replace(CONFIG, **changes))
        getattr(other, use)(state)
        with pytest.raises(ValueError, match=f"^the table does not fit the checkpoint: {message}"):
            other.setup("fit")


def module_of(data):
    torch.manual_seed(0)
    return MultiTaskRecommender(data.features, shared=core.MMoE(2, core.MLP((4,))), report=None)


@pytest.mark.filterwarnings("ignore")
def test_a_loaded_module_scores_by_its_own_rows_whatever_the_data_would_learn(own, tmp_path):
    data = own()
    model = module_of(data)
    run = quiet_trainer(tmp_path, max_steps=2)
    run.fit(model, datamodule=data)
    run.save_checkpoint(tmp_path / "it.ckpt")
    expected, scores = model.eval()(data.rows("test")[:]).sigmoid(), model.predict(NEW)
    write(tmp_path, train=SWAPPED)
    pa.csv.write_csv(pa.table(NEW), tmp_path / "new.csv")
    loaded = MultiTaskRecommender.load_from_checkpoint(tmp_path / "it.ckpt")
    (predicted,) = quiet_trainer(tmp_path).predict(loaded, datamodule=own())
    assert torch.equal(torch.stack([predicted["probability_click"], predicted["probability_like"]], 1), expected)
    (predicted,) = quiet_trainer(tmp_path).predict(loaded, datamodule=own(predict_file="new.csv"))
    assert list(predicted) == ["index", "probability_click", "probability_like"]
    assert predicted["probability_click"].tolist() == scores["probability_click"].tolist()
    other, run, it = own(), quiet_trainer(tmp_path), tmp_path / "it.ckpt"
    run.test(module_of(data), datamodule=data, ckpt_path=it, weights_only=True, verbose=False)
    with pytest.raises(ValueError, match=r"model.features does not fit the data: positives|continuous"):
        run.test(module_of(other), datamodule=other, ckpt_path=it, weights_only=True)


@pytest.mark.filterwarnings("ignore")
def test_test_rows_have_their_labels_beside_their_predictions(own, tmp_path):
    write(tmp_path, test={**TEST, "stars": ["4", ""]})
    data = own()
    (predicted,) = quiet_trainer(tmp_path).predict(module_of(data), datamodule=data)
    # clicks of TEST; 4 stars are liked, and no stars are no label
    assert (predicted["label_click"], predicted["label_like"]) == ([1, 0], [1, None])


@pytest.mark.parametrize(("kind", "train_file"), [("csv", "gone.csv"), ("parquet", None)])
def test_rows_to_predict_need_neither_labels_nor_the_training_file(own, tmp_path, kind, train_file):
    learned = own()
    user_1 = int(learned.rows("train")[:].single_FB[1, 0])
    table = pa.table(NEW)
    if kind == "csv":
        pa.csv.write_csv(table, tmp_path / "new.csv")
    else:
        pa.parquet.write_table(table, tmp_path / "new.parquet")
    data = own(train_file=train_file, test_file=None, predict_file=f"new.{kind}", predict_columns=["key", "age"])
    data.adopt(learned.encoding_state)
    data.prepare_data()
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    rows = by_row(batch, data.features)
    assert [r["index"] for r in rows] == [0, 1, 2]
    assert [r["city"] for r in rows] == [[3], [0], [0]]  # Oslo; Paris is not known; nothing
    assert [r["tags"] for r in rows] == [[3, 1], [], [0]]  # z and y; no value; w is not known
    assert batch.single_FB[1, 0] == user_1
    assert same([r["dense"] for r in rows], [[25.0], [NAN], [30.0]])
    assert [r["domain"] for r in rows] == [1, 0, 0]
    assert same([r["label"] for r in rows], [[NAN, NAN]] * 3)
    assert batch.kept["key"].to_pylist() == ["k0", "k1", "k2"]
    assert batch.kept["age"].to_pylist() == ["25", None if kind == "csv" else "", "30"]  # as it stands there
    # Without a checkpoint the table itself teaches.
    alone = own(predict_file=f"new.{kind}")
    assert same(by_row(next(iter(alone.predict_dataloader())), alone.features), rows)
    missing = r"needs train_file \(--data.train_file\)" if train_file is None else "gone.csv"
    refused(missing, lambda: data.setup("fit"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"age": ["1", "old", "2"]}, "column 'age' of the rows to predict must hold numbers: row 1 holds 'old'"),
        ({"shop": ["de", "it", "fr"]},
         "column 'shop' names the domain, but holds 'it', which training lacks, in row 1"),
        ({c: [] for c in NEW}, "the rows to predict: there are none"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_encoded_are_named(own, tmp_path, columns, message):
    pa.parquet.write_table(pa.table({**NEW, **columns}), tmp_path / "new.parquet")
    data = own(predict_file="new.parquet")
    data.setup("predict")
    refused(message, lambda: list(data.predict_dataloader()))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_test_rows_carry_columns_as_they_stand_in_their_file(own, tmp_path, kind):
    """Rows 6 and 7, of the test file; a random split has rows of the training file."""
    write(tmp_path, kind, test={**TEST, "age": ["30.0", "4"]})
    data = own(kind=kind, predict_columns=["other", "age", "user"], eval_batch_size=1)
    batches = list(data.predict_dataloader())
    kept = [{column: values.to_pylist() for column, values in batch.kept.items()} for batch in batches]
    other = None if kind == "csv" else ""
    assert kept == [
        {"other": [other], "age": ["30.0"], "user": ["1" if kind == "csv" else 1]},
        {"other": [other], "age": ["4"], "user": ["9" if kind == "csv" else 9]},
    ]
    assert [r["index"] for batch in batches for r in by_row(batch, data.features)] == [6, 7]
    drawn = replace(CONFIG, split=SplitConfig("random", val=0, test=0.5))
    data = own(drawn, kind=kind, test_file=None, predict_columns=["other"])
    (batch,) = data.predict_dataloader()
    assert batch.kept["other"].to_pylist() == [TRAIN["other"][i] for i in batch.index_B.tolist()]
    assert next(iter(data.test_dataloader())).kept is None


def test_bad_options_of_a_prediction_are_refused(own, tmp_path):
    with pytest.raises(ValueError, match=r"column 'key' \(predict_columns\) is not in '.*train\.csv'"):
        own(predict_columns=["key"]).predict_dataloader()
    with pytest.raises(ValueError, match="predict_columns names 'label_click', which each prediction has of its own"):
        own(predict_columns=["label_click"])
    synthetic = TableData("synthetic", cache_dir=str(tmp_path), predict_columns=["key"], synthetic={"num_rows": 400})
    refused(r"predict_columns='key' is not one of x0, x1, .*, label_2", lambda: synthetic.predict_dataloader())
    with pytest.raises(ValueError, match="predict_columns names 'index', which each prediction has of its own"):
        own(predict_file="new.csv", predict_columns=["index"])
    pa.csv.write_csv(pa.table({k: v for k, v in NEW.items() if k != "city"}), tmp_path / "new.csv")
    with pytest.raises(ValueError, match=r"column 'city' \(categorical\) is not in '.*new\.csv'"):
        own(predict_file="new.csv").setup("predict")


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_the_docs(tmp_path, monkeypatch, capsys):
    config, new, commands = re.findall(r"```\w*\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[:3]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("shop.yaml").write_text(config)
    Path("new.csv").write_text(new)
    events = {
        "user": ["ann", "bob", "cy", "dot"] * 30, "item": (["tea"] * 3 + ["cup"] * 2) * 24,
        "price": [3.5, 3.5, 3.5, 8.0, 8.0] * 24, "clicked": ([1, 0, 1, 1, 0, 0, 1] * 18)[:120],
        "bought": ([1, 0, 0] * 40),
    }  # fmt: skip
    pa.csv.write_csv(pa.table(events), "events.csv")
    fit, predict = (line.replace("'", "").split(" ", 1)[1] for line in commands.strip().splitlines())
    assert main(fit.split()) == 0
    # All events, without their labels and without the file that trained.
    path = Path("runs/shop/predictions.jsonl")
    Path("events.csv").unlink()
    pa.parquet.write_table(pa.table(events).select(["user", "item", "price"]), "all.parquet")
    assert main(["predict", "--config", "shop.yaml", "--data.predict_file", "all.parquet"]) == 0
    every = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["index"] for row in every] == list(range(120))
    scores = apps.load("runs/shop").predict("all.parquet")
    assert [row["probability_click"] for row in every] == pytest.approx(scores["probability_click"].tolist(), rel=1e-6)
    head, _, rest = predict.partition(" --data.predict_columns ")
    assert main([*head.split(), "--overwrite", "--data.predict_columns", rest]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [list(row) for row in rows] == [["index", "user", "item", "probability_click", "probability_buy"]] * 2
    assert [(row["user"], row["item"]) for row in rows] == [("ann", "tea"), ("zoe", "tea")]
    assert rows[0]["probability_buy"] == pytest.approx(every[0]["probability_buy"], rel=1e-5)  # the first event
    # The test rows of another split, whose training rows would teach otherwise, have the same predictions.
    pa.csv.write_csv(pa.table(events), "events.csv")
    other = ["--data.split.kind", "random", "--data.split.seed", "7", "--overwrite"]
    assert main(["predict", "--config", "shop.yaml", *other]) == 0
    for row in map(json.loads, path.read_text().splitlines()):
        labels = {name: events[column][row["index"]] for name, column in (("click", "clicked"), ("buy", "bought"))}
        expected = every[row["index"]] | {f"label_{name}": label for name, label in labels.items()}
        assert row == pytest.approx(expected, rel=1e-5)
