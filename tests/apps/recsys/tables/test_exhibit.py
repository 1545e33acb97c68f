"""The page of a recommender on tables has the model's own probabilities, and the weights of its gates."""

from __future__ import annotations

import numpy as np
import pytest
from shown_runs import answered, shown, table_run

import core
from apps.report.routed import gate_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return shown(table_run(tmp_path_factory.mktemp("table")))


def row_of(exhibit, **changed):
    row = dict(zip([field.label.split(" (")[0] for field in exhibit.fields], exhibit.examples[1].values, strict=True))
    assert changed.keys() <= row.keys()
    return [*{**row, **changed}.values()]


def test_examples_are_rows_as_they_stand_in_the_table(made):
    _, exhibit = made
    first, second = exhibit.examples
    # Paris and the tag w were not in training, users are hashed, and an age that is no number is missing.
    assert first.values == ("fr", "", "", "x", "30")
    assert second.values == ("de", "Rome", "", "z", "")
    assert first.label == "shop fr, tags x, age 30 (in truth click yes, like yes)"


def test_the_answer_is_the_models_and_the_weights_are_the_gates(made):
    model, exhibit = made
    answer = answered(exhibit, *row_of(exhibit, age="33"))
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
    _, exhibit = made
    with pytest.raises(ValueError) as refused:
        answered(exhibit, *row_of(exhibit, **changed))
    assert str(refused.value) == line


def test_a_missing_value_and_a_hashed_one_are_taken(made):
    _, exhibit = made
    same = answered(exhibit, *row_of(exhibit)).parts[0].rows
    assert answered(exhibit, *row_of(exhibit, user="7")).parts[0].rows != same
    assert answered(exhibit, *row_of(exhibit, city="")).parts[0].rows != same
