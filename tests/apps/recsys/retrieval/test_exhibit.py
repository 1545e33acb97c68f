"""The page of a retriever has the model's own items, and the experts of the user and of the items."""

from __future__ import annotations

import pytest
import torch
from shown_runs import answered, best_experts, retrieval_run, shown

import core


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return shown(retrieval_run(tmp_path_factory.mktemp("retrieval")))


def test_examples_are_users_as_they_stand_in_the_table(made):
    _, page = made
    assert [example.values for example in page.examples] == [("ann", "31"), ("cy", "50")]
    assert page.examples[0].label == "user ann, age 31"


@torch.no_grad()
def test_the_answer_is_the_models_and_the_experts_are_of_its_passes(made):
    model, page = made
    answer = answered(page, "cy", "50")
    best = model.predict({"user": ["cy"], "age": [50]}, top=2)
    rows = [
        (f"{n}. {film}", f"{score:.3f}")
        for n, (film, score) in enumerate(zip(best["film"], best["score"], strict=True), 1)
    ]
    assert answer.parts[0].rows == tuple(rows)
    assert set(best["film"]) == {"Alien", "Brazil"}  # cy has rated the other three
    assert list(answer.layers) == ["user block 0", "item block 0"]
    (words,) = answer.layers["item block 0"]
    assert words.words == tuple((film,) for film in best["film"])
    state = model.encoding_state["catalogue"]
    from apps.recsys.retrieval.catalog import Catalog

    films = ["Alien", "Brazil"]
    items = Catalog.from_state(state).rows(model.item_features).__getitems__([films.index(f) for f in best["film"]])
    with core.record(model) as tape:
        model.item_tower(items)
    assert words.experts.tolist() == best_experts(tape.entries[0].routing)


def test_what_the_model_cannot_take_is_refused_in_one_line(made):
    _, page = made
    with pytest.raises(ValueError, match="user='an' is none of the 3 values that the model knows; did you mean 'ann'"):
        answered(page, "an", "3")
    with pytest.raises(ValueError, match="age='old' is not a number"):
        answered(page, "ann", "old")
