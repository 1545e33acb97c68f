"""A script scores rows by a model alone: ``model.predict(rows)``."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from own_table import write
from quiet_trainer import quiet_trainer
from refusals import refused

import core
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.rows import scoring
from apps.train.checkpoint.checkpoints import BestAndLast

pytestmark = pytest.mark.filterwarnings("ignore")

# Values that training has and lacks, missing ones, other columns; no label.
NEW = {
    "city": ["Oslo", "Paris", "", "Rome", "Rome"], "tags": ["z|y", "", "w", "x", "x|y"], "user": [1, 2, 77, 3, 1],
    "age": [25.0, None, 30.0, float("inf"), 40.0], "shop": ["fr", "de", "de", "fr", "de"],
    "key": ["a", "b", "c", "d", "e"],
}  # fmt: skip
NAMES = ["probability_click", "probability_like"]


@pytest.fixture
def loaded(own, tmp_path):
    """A model of a checkpoint, without the files that trained it."""
    data = own()
    torch.manual_seed(0)
    model = MultiTaskRecommender(data.features, shared=core.MMoE(2, core.MLP((4,))), report=None)
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    expected = model.eval()(data.rows("test")[:]).sigmoid()
    for file in tmp_path.glob("*.csv"):
        file.unlink()
    loaded = MultiTaskRecommender.load_from_checkpoint(tmp_path / "it.ckpt")
    assert np.array_equal(model.predict(NEW)["probability_click"], loaded.predict(NEW)["probability_click"])
    loaded.expected = expected
    return loaded


def test_the_test_rows_have_the_scores_of_their_evaluation(loaded, tmp_path):
    write(tmp_path)
    table = pa.csv.read_csv(tmp_path / "test.csv")  # with numbers as numbers, and with labels
    scores = loaded.predict(table)
    assert isinstance(scores, pa.Table)
    assert scores.column_names == NAMES
    p_Nt = np.stack([scores[name].to_numpy() for name in NAMES], 1)
    assert np.array_equal(p_Nt, loaded.expected.detach().numpy())


def test_every_form_of_the_rows_has_the_same_scores(loaded, tmp_path):
    loaded.train()
    expected = loaded.predict(NEW)
    assert loaded.training
    assert (list(expected), expected["probability_click"].dtype) == (NAMES, np.float32)
    assert len(set(expected["probability_click"].tolist())) == 5
    table = pa.table(NEW)
    pa.csv.write_csv(table, tmp_path / "new.csv")
    pa.csv.write_csv(table.slice(0, 2), tmp_path / "part-0.csv")
    pa.csv.write_csv(table.slice(2), tmp_path / "part-1.csv")
    with pa.CompressedOutputStream(str(tmp_path / "new.csv.gz"), "gzip") as file:
        pa.csv.write_csv(table, file)
    pa.parquet.write_table(table, tmp_path / "new.parquet", row_group_size=2)
    files = ["new.csv", "new.csv.gz", "new.parquet", "part-*.csv"]
    arrays = {c: pa.array(v) for c, v in NEW.items()} | {"user": np.array(NEW["user"]), "shop": NEW["shop"]}
    for rows in (
        arrays,
        table.to_pylist(),
        {**NEW, "tags": [["z", "y"], [], ["w"], ["x"], ["x", "y"]]},
        *(tmp_path / f for f in files),
    ):
        scores = loaded.predict(rows, batch_size=2)
        for name in NAMES:
            np.testing.assert_allclose(scores[name], expected[name], rtol=1e-5)
    assert loaded.predict({c: [] for c in NEW})["probability_click"].shape == (0,)


def test_dicts_may_lack_values_and_have_others(loaded):
    dicts = pa.table(NEW).to_pylist()
    del dicts[0]["city"]  # the first one does not say which columns there are
    dicts[1]["tags"] = float("nan")
    ignored = [{**row, "other": value} for row, value in zip(dicts, (1, "a", None, {}, []), strict=True)]
    scores = loaded.predict(ignored)
    assert isinstance(scores, pa.Table)
    tags = [NEW["tags"][0], None, *NEW["tags"][2:]]
    expected = loaded.predict({**NEW, "city": [None, *NEW["city"][1:]], "tags": tags})
    for name in NAMES:
        np.testing.assert_array_equal(scores[name], expected[name])


def test_frames_keep_their_index_and_a_series_is_a_row_or_the_one_column(loaded):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(NEW, index=["v", "w", "x", "y", "z"]).sample(frac=1, random_state=0)
    frame["city"] = frame["city"].astype("category")
    expected = loaded.predict(NEW)
    scores = loaded.predict(frame, batch_size=2)
    assert scores.index.tolist() == frame.index.tolist()
    np.testing.assert_allclose(scores.loc[["v", "w", "x", "y", "z"], NAMES[0]], expected[NAMES[0]], rtol=1e-5)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(NEW, index=["v", "w", "x", "y", "z"])
    one = loaded.predict(frame.loc["x"])
    pandas.testing.assert_frame_equal(one, loaded.predict(frame).loc[["x"]])
    column = pandas.Series(["Oslo", "Rome"], [7, 3], name="city")
    pandas.testing.assert_frame_equal(scoring.framed(column, {"city": "categorical"}), column.to_frame())
    refused(r"column 'shop' \(domain\) is not in the rows to predict", lambda: loaded.predict(frame["key"]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"city": None}, r"^column 'city' \(categorical\) is not in the rows to predict$"),
     ({"age": None, "Age": [1] * 5}, r"^column 'age' \(continuous\) is not in .*; did you mean 'Age'\?$"),
     ({"age": [1, 2, 3, "old", 5]}, "^column 'age' of the rows to predict is no column of one type: "),
     ({"age": ["1", "2", "3", "old", "5"]}, "^column 'age' of the rows to predict must hold numbers: row 3 holds"),
     ({"shop": ["de"] * 4 + ["it"]}, "^column 'shop' names the domain, but holds 'it', which .* in row 4$"),
     ({"shop": ["de"]}, "^column 'shop' has 1 values, and column 'city' 5$|^column 'city' has 5 .* 'shop' 1$"),
     ({"city": "Rome"}, "^column 'city' is 'Rome', not a list of values$")],
)  # fmt: skip
def test_rows_that_cannot_be_scored_are_named(loaded, changed, message):
    rows = {c: v for c, v in {**NEW, **changed}.items() if v is not None}
    with pytest.raises(ValueError, match=message) as error:
        loaded.predict(rows, batch_size=1)  # the eight rows of a piece do not hide where a row stands
    assert "\n" not in str(error.value)


def test_a_row_of_a_later_piece_is_named_and_no_column_suggested_that_is_read_as_another(tmp_path, loaded, monkeypatch):
    pa.csv.write_csv(pa.table({"image": [1], "Age": [1]}), tmp_path / "new.csv")
    for rows in ({"image": [1], "Age": [1]}, tmp_path / "new.csv"):
        for column, end in (("age", "; did you mean 'Age'?"), ("imago", ""), ("stage", "; did you mean 'Age'?")):
            with pytest.raises(ValueError, match=rf"^column '{column}' \(continuous\) is not in") as error:
                list(scoring.pieces(rows, {"image": "vectors", column: "continuous"}, (), 5))
            assert str(error.value).partition("; did")[2] == end.partition("; did")[2]
    monkeypatch.setattr(scoring, "_BATCHES", 1)
    text = {**NEW, "age": ["1", "2", "3", "old", "5"]}
    pa.csv.write_csv(pa.table(text), tmp_path / "new.csv")
    for rows in (text, tmp_path / "new.csv"):
        with pytest.raises(ValueError, match="must hold numbers: row 3 holds 'old'"):
            loaded.predict(rows, batch_size=2)
    with pytest.raises(ValueError, match=r"^column 'shop' names the domain, but holds no value in row 4$"):
        loaded.predict({**NEW, "shop": ["de"] * 4 + [None]}, batch_size=2)


def test_a_script_hears_nothing_of_lightning_from_our_own_calls(own, tmp_path, caplog, recwarn):
    data = own()
    data.setup()
    model = MultiTaskRecommender(data.features, report=None)
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    saves = BestAndLast(dirpath=str(tmp_path / "checkpoints"))
    trainer = quiet_trainer(tmp_path, callbacks=[saves], **options)
    trainer.fit(model, datamodule=data)
    assert "weights_only" not in caplog.text
    caplog.clear()
    recwarn.clear()
    loaded = MultiTaskRecommender.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    loaded.predict(NEW)
    assert caplog.messages == []
    assert [str(w.message) for w in recwarn] == []


def test_a_model_that_knows_no_values_says_so_and_an_encoding_is_read_once(loaded):
    first = loaded.encoding
    assert loaded.encoding is first
    loaded.predict(NEW)
    assert loaded.task.encoding is first
    loaded.adopt_encoding({"encoding": {**first.state(), "separator": ";"}})
    assert (loaded.encoding.separator, first.separator) == (";", "|")
    model = MultiTaskRecommender(loaded.features, report=None)
    refused(r"^this MultiTaskRecommender does not know what its numbers stand for: load", lambda: model.predict(NEW))
