"""The page and the service of a next-item model have its own items, and the experts of the history's items."""

from __future__ import annotations

import pytest
import torch
from shown_runs import answered, best_experts, history_run, shown

import core
from apps.recsys.sequence.histories import Items
from apps.recsys.sequence.task import NextItem, different_names


def test_the_items_are_the_models_and_the_experts_are_of_its_pass(tmp_path):
    model, exhibit = shown(history_run(tmp_path))
    assert [example.label for example in exhibit.examples] == [
        "Alien, Brazil, Casablanca", "Brazil, Casablanca, Dune", "Casablanca, Dune, Eraserhead",
    ]  # fmt: skip
    names = ["Brazil", "Dune", "Alien"]
    answer = answered(exhibit, names)
    films = {"0": "Alien", "1": "Brazil", "2": "Casablanca", "3": "Dune", "4": "Eraserhead"}
    (best,) = model.predict([["1", "3", "0"]], top=3, include_seen=True)
    rows = tuple((f"{i}. {films[item]}", f"{score:.2f}") for i, (item, score) in enumerate(best, 1))
    assert answer.parts[0].rows == rows
    assert list(answer.layers) == ["block 0 mixing", "block 0 ffn"]
    with core.record(model.model) as tape:
        model(torch.tensor([[2, 4, 1]]))  # items count from 1
    (words,) = answer.layers["block 0 ffn"]
    assert words.words == (("Brazil",), ("Dune",), ("Alien",))
    assert words.experts.tolist() == best_experts(tape.entries[-1].routing)
    (mixing,) = answer.layers["block 0 mixing"]
    assert mixing.names == ("convolution", "attention")
    # A history longer than the model's six items is cut to its last ones.
    (words,) = answered(exhibit, ["Alien", *names, *names]).layers["block 0 ffn"]
    assert [word for (word,) in words.words] == [*names, *names]
    with pytest.raises(ValueError, match=r"is empty: choose an item first$"):
        answered(exhibit, [])


def test_a_page_shows_as_many_items_as_predict_and_a_request_none_of_its_history(tmp_path):
    model, page = shown(history_run(tmp_path))
    assert page.fields[0].value == page.examples[0].values[0] == ("Alien", "Brazil", "Casablanca")
    for exclude_seen, items in ((False, 3), (True, 2)):
        model.exclude_seen = exclude_seen
        task = NextItem(model)
        assert len(answered(task.exhibit(None, 0), ["Alien", "Brazil", "Dune"]).parts[0].rows) == items
        service = task.service()
        asked = [{"history": [0, " 1 ", "99"]}, {"history": ["0", "1", "3"], "top": 1}]
        first, second = service.predict([service.read(one) for one in asked])
        assert {row["name"] for row in first["items"]} == {"Casablanca", "Dune", "Eraserhead"}
        assert (first["unknown"], second["unknown"], len(second["items"])) == (1, 0, 1)
    with pytest.raises(ValueError, match=r"^history\[1\] is empty$"):
        task.read({"history": ["0", " "]})


def test_items_of_one_name_have_their_values_beside_it():
    items = Items(("", "1", "2", "3"), ("", "Emma", "Persuasion", "Emma"))
    assert different_names(items) == ("Emma (1)", "Persuasion", "Emma (3)")
