"""The page of a recommender on tables has the model's own probabilities, and the weights of its gates."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lightning import Trainer
from shown_runs import answered, shown, table_run

import core
from apps.recsys.encoding.features import Features, VectorFeature
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.schema import TableConfig, TaskConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.task import TASK
from apps.report.routed import gate_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return shown(table_run(tmp_path_factory.mktemp("table")))


def row_of(page, **changed):
    row = dict(zip([field.label.split(" (")[0] for field in page.fields], page.examples[1].values, strict=True))
    assert changed.keys() <= row.keys()
    return [*{**row, **changed}.values()]


def test_examples_are_rows_as_they_stand_in_the_table(made):
    _, page = made
    first, second = page.examples
    # Paris and the tag w were not in training, users are hashed, and an age that is no number is missing.
    assert first.values == ("fr", "", "", "x", "30")
    assert second.values == ("de", "Rome", "", "z", "")
    assert first.label == "shop fr, tags x, age 30 (in truth click yes, like yes)"


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


@pytest.mark.parametrize(
    "changed, line",
    [
        ({"age": "old"}, "age='old' is not a number"),
        ({"city": "Roma"}, "city='Roma' is none of the 3 values that the model knows; did you mean 'Rome'?"),
        ({"tags": "x|q"}, "tags: 'q' is none of the 3 values that the model knows"),
        ({"shop": ""}, "shop='' is none of the 2 values that the model knows"),
    ],
)
def test_a_value_that_the_model_cannot_take(made, changed, line):
    _, page = made
    with pytest.raises(ValueError) as refused:
        answered(page, *row_of(page, **changed))
    assert str(refused.value) == line


def test_a_missing_value_and_a_hashed_one_are_taken(made):
    _, page = made
    same = answered(page, *row_of(page)).parts[0].rows
    assert answered(page, *row_of(page, user="7")).parts[0].rows != same
    assert answered(page, *row_of(page, city="")).parts[0].rows != same


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
    Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, data)  # fmt: skip
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


def test_vectors_have_no_field():
    features = Features(tasks=("click",), positives=(0.5,), vectors=(VectorFeature("image", 2),))
    model = MultiTaskRecommender(features)
    model.adopt_encoding({"encoding": Encoding(features).state()})
    with pytest.raises(ValueError, match=r"reads columns of vectors \(image\), for which a page has no field"):
        TASK(model).exhibit(None, 1)
