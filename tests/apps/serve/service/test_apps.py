"""What each app serves is what its model predicts, and its schemas say what it takes and gives."""

from __future__ import annotations

import base64
import itertools
import json
from dataclasses import replace

import jsonschema_rs
import pytest
from shown_runs import RUNS

from apps import registry
from apps.report.exhibit import ChoiceField, TextField
from apps.serve.service.command import service_of
from apps.train.checkpoint.loading import load

ONLY_SENT = {"pairs": ["text"], "history": ["top"]}
"""Inputs of a request that the page of a model leaves out: the vector of a text by itself is nothing to look at, and a
page shows as many items as the model's ``top_k`` says."""
METHODS = {"translator": ("beam",), "tasks": ("sample",), "language": ("greedy", "beam")}
"""How the models that write their answers word by word choose the words."""


@pytest.fixture(scope="module", params=RUNS)
def served(request, tmp_path_factory):
    """The name of a run, its model, and its service."""
    model = load(RUNS[request.param](tmp_path_factory.mktemp(request.param)))
    return request.param, model, service_of(model)(model)


def file_of(item, tmp_path):
    file = tmp_path / "sent.png"
    file.write_bytes(base64.b64decode(item["image"]))
    return str(file)


def predicted(name, model, item, tmp_path):
    """Return what a script gets for an input."""
    if name == "digits":
        (own,) = model.predict([file_of(item, tmp_path)])
        return {"class_name": own.class_name, "probability": own.probability, "top": own.top}
    if name == "table":
        return {column: own.tolist()[0] for column, own in model.predict({c: [v] for c, v in item.items()}).items()}
    if name == "history":
        (best,) = model.predict([item["history"]], top=item.get("top", 10))
        return {"items": [(own, score) for own, score in best], "unknown": 0}
    if name == "retrieval":
        best = model.predict({column: [value] for column, value in item.items()})
        (item_column,) = set(best) - {"row", "user", "score"}
        return {"items": list(zip(best[item_column].tolist(), best["score"].tolist(), strict=True))}
    if name == "pairs":
        if "text" in item:
            return {"vector": model.encode_text([item["text"]])[0].tolist()}
        if "texts" not in item:
            return {"vector": model.encode_image([file_of(item, tmp_path)])[0].tolist()}
        (own,) = model.predict([file_of(item, tmp_path)], item["texts"])
        return {"text": own.text, "probability": own.probability, "top": own.top}
    if name == "translator":
        return {"text": model.predict([item["text"]], item["pair"])[0]}
    if name == "tasks":
        return {"text": model.predict([item["text"]], item["task"])[0]}
    if name == "language":
        limits = {"max_length_ratio": 0.0, "max_length_extra": item["subwords"]}
        return {"text": model.predict([item["text"]], **limits)[0]}
    return {"text": model.predict([file_of(item, tmp_path)])[0]}


def plain(answer):
    """Return an answer without the names of items that a retrieval does not repeat."""
    if "items" in answer:
        return {**answer, "items": [(row["item"], row["score"]) for row in answer["items"]]}
    return answer


def test_the_examples_are_answered_as_by_predict(served, tmp_path):
    name, model, service = served
    assert service.item["examples"]
    for item in service.item["examples"]:
        jsonschema_rs.validate(dict(service.item), item)
        (answer,) = service.predict([service.read(item)])
        jsonschema_rs.validate(dict(service.answer), json.loads(json.dumps(answer, allow_nan=False)))
        assert plain(answer) == predicted(name, model, item, tmp_path)


def test_a_page_takes_what_a_request_may_have(served):
    name, model, _ = served
    inputs = getattr(model.task, "inputs", {})
    assert [own for own in inputs if inputs[own].field is None] == ONLY_SENT.get(name, [])
    for own in inputs.values():
        if isinstance(own.field, ChoiceField) and "enum" in own.schema:
            assert list(own.field.choices) == own.schema["enum"]
        if isinstance(own.field, TextField):
            assert own.field.longest >= own.schema.get("maxLength", 0)
    assert all(hasattr(registry.task_named(app), "service") for app in registry.MODELS)


def test_a_text_is_told_as_it_grows_and_the_answer_is_the_same(served, monkeypatch):
    name, model, service = served
    if name not in METHODS:
        assert service.listen is None
        return
    plain = model.decode
    for method in METHODS[name]:
        decode = replace(plain, method=method, num_return_sequences=1)
        monkeypatch.setattr(model, "decode", decode)
        service = service_of(model)(model)
        item, told = service.item["examples"][0], []
        values = service.read(item)
        expected = service.predict([values, values])
        assert service.predict([service.listen(values, told.append), values]) == expected
        assert told[-1] == expected[0]["text"]
        assert all(then.startswith(before) for before, then in itertools.pairwise(told))
        grown = len(dict.fromkeys(told))
        assert grown == 1 if method == "beam" else grown > 1

        heard, written = [], told[-1].removeprefix(item["text"])
        stop = next(char for char in reversed(written) if char not in " \ufffd")  # bytes of no character are U+FFFD
        monkeypatch.setattr(model, "decode", replace(decode, stop_strings=(stop,)))
        (cut,) = service.predict([service.listen(values, heard.append)])
        assert stop not in cut["text"].removeprefix(item["text"])
        assert all(cut["text"].startswith(text) for text in heard)  # nothing of the stop string
    if name == "language":  # the empty text of the others is a source like others
        return
    monkeypatch.setattr(model, "decode", replace(plain, method="greedy"))
    service, told = service_of(model)(model), []
    values = service.read({**service.item["examples"][0], "text": ""})
    assert service.predict([service.listen(values, told.append)]) == [{"text": ""}]
    assert told == [""]  # nothing of what an empty text could become


def test_what_is_told_waits_for_whole_characters(tmp_path):
    model, told = load(RUNS["language"](tmp_path)), []
    processor = model.subwords.processor("target")
    ids = [processor.piece_to_id(piece) for piece in ("<0xC3>", "<0xA9>", "<0x21>")]
    tell = model.how_to_write(model.decode, 1, tell=told.append)["tell"]
    for end in (1, 2, 3):
        tell(ids[:end])
    assert told == ["", "é", "é!"]
    ids[:0] = [processor.piece_to_id("<0x61>")]
    told.clear()
    tell = model.how_to_write(replace(model.decode, stop_strings=("aé",)), 1, tell=told.append)["tell"]
    for end in (1, 2):
        tell(ids[:end])
    assert told == ["", ""]  # "a" and the first byte of "é" may become the stop string
