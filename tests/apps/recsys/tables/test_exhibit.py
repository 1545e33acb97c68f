"""A trained table recommender outside of Python's tensors: on a page, as JSON, and as a graph with its script."""

import dataclasses
from functools import partial

import jsonschema_rs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from doc_scripts import script
from own_table import CONFIG
from quiet_trainer import quiet_trainer
from reexported import assert_alike, reexported
from refusals import refused
from shown_runs import answered, shown, table_run
from torch_graphs import output_in_torch

import core
from apps.recsys.encoding.features import (
    CategoricalFeature,
    ContinuousFeature,
    Features,
    SequenceFeature,
    VectorFeature,
)
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.encoding.timestamps import to_seconds
from apps.recsys.encoding.vocabulary import Vocabulary
from apps.recsys.row import Row
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig
from apps.recsys.tables.columns.dense import DenseConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.task import TASK
from apps.report.routed import gate_weights
from apps.task.task import item_of, read_item


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return shown(table_run(tmp_path_factory.mktemp("table")))


def row_of(page, **changed):
    row = dict(zip([field.label.split(" (")[0] for field in page.fields], page.examples[1].values, strict=True))
    assert changed.keys() <= row.keys()
    return [*{**row, **changed}.values()]


def test_examples_are_rows_as_they_stand_in_the_table_and_vectors_have_no_field(made):
    _, page = made
    first, second = page.examples
    # Paris and the tag w were not in training, users are hashed, and an age that is no number is missing.
    assert (first.values, second.values) == (("fr", "", "", "x", "30"), ("de", "Rome", "", "z", ""))
    assert first.label == "shop fr, tags x, age 30 (in truth click yes, like yes)"
    features = Features(tasks=("click",), positives=(0.5,), vectors=(VectorFeature("image", 2),))
    model = MultiTaskRecommender(features)
    model.adopt_encoding({"encoding": Encoding(features).state()})
    refused(r"reads columns of vectors \(image\), for which a page has no field", lambda: TASK(model).exhibit(None, 1))


def test_the_answer_is_the_models_and_the_weights_are_the_gates(made):
    model, page = made
    answer = answered(page, *row_of(page, age="33"))
    row = {"shop": ["de"], "city": ["Rome"], "user": [None], "tags": ["z"], "age": [33.0]}
    with core.record(model) as tape:
        scores = model.predict(row)
    rows = {task: float(scores[f"probability_{task}"][0]) for task in ("click", "like")}
    assert dict(answer.parts[0].rows) == rows
    ((gates,),) = answer.layers.values()
    assert gates.gates == ("click", "like")
    by_hand = np.concatenate([gate_weights(entry.routing).numpy() for entry in tape.entries])
    assert np.array_equal(gates.weights, by_hand)
    assert gates.weights.sum(1) == pytest.approx(1)
    # A missing value and a hashed one are taken.
    _, page = made
    same = answered(page, *row_of(page)).parts[0].rows
    assert answered(page, *row_of(page, user="7")).parts[0].rows != same
    assert answered(page, *row_of(page, city="")).parts[0].rows != same


@pytest.mark.parametrize(
    "changed, line",
    [({"age": "old"}, "age='old' is not a number"),
     ({"city": "Roma"}, "city='Roma' is none of the 3 values that the model knows; did you mean 'Rome'?"),
     ({"tags": "x|q"}, "tags: 'q' is none of the 3 values that the model knows"),
     ({"shop": ""}, "shop='' is none of the 2 values that the model knows")],
)  # fmt: skip
def test_a_value_that_the_model_cannot_take(made, changed, line):
    _, page = made
    with pytest.raises(ValueError) as refused:
        answered(page, *row_of(page, **changed))
    assert str(refused.value) == line


def test_numbers_levels_and_classes_are_a_table(tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        "age": rng.normal(size=60), "bought": rng.integers(0, 2, 60), "price": rng.normal(size=60),
        "stars": rng.integers(1, 4, 60), "colour": rng.choice(["red", "tan"], 60),
    }  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "table.parquet")
    tasks = {"bought": TaskConfig("bought"), "price": TaskConfig("price", kind="regression")}
    tasks |= {"stars": TaskConfig("stars", kind="ordinal"), "colour": TaskConfig("colour", kind="multiclass")}
    table = TableConfig(continuous=("age",), tasks=tasks)
    data = TableData("table", str(tmp_path), str(tmp_path), train_file="table.parquet", table=table)
    model = MultiTaskRecommender(data.features, core.MMoE(2, core.MLP((4,))))
    quiet_trainer(tmp_path, max_steps=1).fit(model, data)
    page = TASK(model).exhibit(data, 1)
    probability, values = page.answer([0.5]).parts
    scores = model.predict({"age": [0.5]})
    assert dict(probability.rows) == {"bought": float(scores["probability_bought"][0])}
    likeliest = f"{scores['value_colour'][0]} ({100 * scores['probability_colour'][0]:.1f} %)"
    assert values.rows == (
        ("price", f"{scores['value_price'][0]:.4g}"), ("stars", f"{scores['value_stars'][0]:.4g}"),
        ("colour", likeliest),
    )  # fmt: skip
    first = data.rows("val")[0]
    _, price, stars, colour = first.label_Bt[0].tolist()
    assert page.examples[0].label.endswith(
        f"price {price:.4g}, stars {stars + 1:.4g}, colour {('red', 'tan')[int(colour)]})"
    )


FEATURES = Features(
    categorical=(
        CategoricalFeature("city", 3),
        CategoricalFeature("row", 10),
        CategoricalFeature("tags", 100, multi_valued=True, hashed=True),
        CategoricalFeature("at_hour", 25),
        CategoricalFeature("at_weekday", 8),
    ),
    continuous=(ContinuousFeature("age", quantiles=(20.0, 30.0, 40.0)), ContinuousFeature("at_days")),
    vectors=(VectorFeature("seen", 2),),
    sequences=(SequenceFeature("visited", 3, 5, items="city"),),
)
CITIES = Vocabulary.of(pa.array(["Oslo", "Rome"]))
ENCODING = Encoding(FEATURES, {"city": CITIES}, "shop", Vocabulary.of(pa.array(["de", "fr"])), timestamps={"at": None})
JSON_ROWS = Row.of(ENCODING)
SCHEMA = item_of(JSON_ROWS.columns, "Row", "A row.", additional_properties=True)
JSON_ROW = {
    "shop": "fr", "city": "Rome", "row": 1, "tags": ["a value"], "seen": [0.0, 0.0], "visited": ["Oslo"],
    "at": "2024-05-31 12:00", "age": 30.0,
}  # fmt: skip


def test_the_example_is_a_row_of_the_schema_and_rows_become_a_table():
    (example,) = SCHEMA["examples"]
    assert example == {**JSON_ROW, "shop": "de", "city": "Oslo"}  # the first values, and the median of a number
    assert SCHEMA["required"] == list(ENCODING.roles)
    jsonschema_rs.validate(SCHEMA, JSON_ROW)
    jsonschema_rs.validate(SCHEMA, {**dict.fromkeys(JSON_ROW), "shop": "de", "label": 1})
    with pytest.raises(ValueError, match=r"^at='noon': a timestamp is seconds to nanoseconds since 1970, a date, or"):
        read_item(JSON_ROWS.columns, {**JSON_ROW, "at": "noon"})
    rows = [
        {**JSON_ROW, "city": 5, "tags": ["x", 2, True], "at": 0, "age": 10**30},
        {**dict.fromkeys(JSON_ROW), "shop": "de", "city": False, "visited": []},
    ]
    read = partial(read_item, JSON_ROWS.columns)
    table = JSON_ROWS.table([read(row) for row in rows])
    assert table.column_names == list(ENCODING.roles)
    assert table["city"].to_pylist() == ["5", "False"]  # to an encoding a category and its text are the same
    assert table["tags"].to_pylist() == [["x", "2", "True"], None]
    assert (table["age"].to_pylist(), table["row"].to_pylist()) == ([1e30, None], ["1", None])
    assert to_seconds(table["at"], "at", "the rows")[0] == 0


@pytest.mark.parametrize(
    "column, value",
    [("shop", None), ("shop", "es"), ("city", ["Rome"]), ("row", 10), ("row", "1"), ("tags", "a|b"), ("seen", [0.0]),
     ("visited", [None]), ("at", True), ("age", "30"), ("age", 1e39)],
)  # fmt: skip
def test_what_a_column_does_not_take(column, value):
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(SCHEMA, {**JSON_ROW, column: value})


# Values that training has and lacks, and missing ones.
ROWS = {
    "city": ["Oslo", "Paris", "", "Rome", "Rome"], "tags": ["z|y", "", "w", "x", "x|y"], "user": [1, 2, 77, 3, 1],
    "age": [25.0, None, 30.0, 31.5, 40.0], "shop": ["fr", "de", "de", "fr", "de"],
}  # fmt: skip


@pytest.fixture
def model(own):
    data = own()
    torch.manual_seed(0)
    embedding = EmbeddingConfig(kind="collection", dim=4, init_std=1.0)
    module = MultiTaskRecommender(data.features, core.MMoE(2, core.MLP((4,))), embedding, report=None)
    module.adopt_encoding({"encoding": data.encoding_state})
    return module.eval()


def written(value):
    """Return a value as pandas writes it: 77.0 for an integer of a column with missing values."""
    return "" if value is None else str(float(value) if isinstance(value, int) else value)


def test_the_scores_of_a_script_and_of_the_model_are_those_of_the_weights(model, tmp_path):
    exported, export = reexported(model, tmp_path)
    expected = model.predict(ROWS)
    scores = exported.predict(ROWS)
    assert list(scores) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-5)
    assert exported.encoding_state.keys() == model.encoding_state.keys()
    columns = list(ROWS)
    lines = [
        ",".join(columns),
        *(",".join(map(written, row)) for row in zip(*ROWS.values(), strict=True)),
    ]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    own = script("docs/reference/onnx_scripts.md", "score.py")
    printed = output_in_torch(own, export, "model.onnx", str(tmp_path / "rows.csv"))
    expected_lines = [
        " ".join(f"{name}={values[i]:.6f}" for name, values in expected.items()) for i in range(len(ROWS["city"]))
    ]
    assert_alike(printed, expected_lines)


@pytest.mark.parametrize("numbers", ["bins", "linear"])
def test_an_export_cuts_numbers_at_the_thresholds_of_its_encoding(own, tmp_path, numbers):
    data = own(dataclasses.replace(CONFIG, numbers=numbers))
    torch.manual_seed(0)
    options = {"embedding": EmbeddingConfig(dim=4, init_std=1.0), "dense": DenseConfig("by_label")}
    module = MultiTaskRecommender(data.features, core.MMoE(2, core.MLP((4,))), report=None, **options)
    module.adopt_encoding({"encoding": data.encoding_state})
    exported, _ = reexported(module.eval(), tmp_path)
    assert (exported.features.numbers, len(exported.features.continuous[0].thresholds) > 0) == (numbers, True)
    scores = exported.predict(ROWS)
    for name, values in module.predict(ROWS).items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-5)


def test_the_script_reads_times_and_writes_numbers(tmp_path):
    (tmp_path / "visits.csv").write_text(
        "when,price,visits,clicked\n2024/05/31,2.5,0,1\n2024-05-30T23:00:00+02:00,4.0,3,0\n"
    )
    tasks = {
        "price": TaskConfig("price", kind="regression"),
        "visits": TaskConfig("visits", kind="count"),
        "clicked": TaskConfig("clicked"),
    }
    table = TableConfig(timestamps=("when",), tasks=tasks, split=SplitConfig("given", val=0.0))
    rows = str(tmp_path / "visits.csv")
    data = TableData("table", cache_dir=str(tmp_path), train_file=rows, test_file=rows, table=table)
    embedding = EmbeddingConfig(dim=4, init_std=1.0)
    module = MultiTaskRecommender(data.features, core.MMoE(2, core.MLP((4,))), embedding, report=None)
    module.adopt_encoding({"encoding": data.encoding_state})
    _, export = reexported(module.eval(), tmp_path)
    expected = module.predict(rows)
    own = script("docs/reference/onnx_scripts.md", "score.py")
    printed = output_in_torch(own, export, "model.onnx", rows)
    assert_alike(printed, [" ".join(f"{name}={values[i]:.6f}" for name, values in expected.items()) for i in range(2)])
