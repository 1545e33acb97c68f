"""The page and the service of a language model have its own texts, and the experts of each subword."""

from dataclasses import replace

import pytest
import torch
from shown_runs import answered, best_experts, language_run, shown

import core
from apps.data.subwords import EOS_ID
from apps.nlp.decode import DecodeConfig
from apps.nlp.language.task import Continuation


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return shown(language_run(tmp_path_factory.mktemp("language")))


def test_a_text_goes_on_as_the_model_writes_it(language):
    model, exhibit = language
    assert [example.label for example in exhibit.examples] == ["the red fox runs over the", "a blue bird sings in the"]
    answer = answered(exhibit, "the red fox", "5")
    (said,) = answer.parts
    (whole,) = model.predict(["the red fox"], max_length_ratio=0.0, max_length_extra=5)
    assert (said.given + said.text).replace(" (the text ends here)", "") == whole
    ((words,),) = answer.layers.values()
    ids = [EOS_ID, *model.subwords.encode(["the red fox"], "target")[0]]
    with core.record(model.model) as tape:
        model.model.hidden(torch.tensor([ids]))
    # Routers are causal: what follows changes no expert of the prompt.
    assert words.experts[: len(ids)].tolist() == best_experts(tape.entries[0].routing)
    assert answered(exhibit, "", "3").parts[0].given == ""  # a text may begin with nothing


def test_draws_have_a_seed_on_the_page_and_in_a_request(language, monkeypatch):
    model, _ = language
    assert list(Continuation(model).inputs) == ["text", "subwords"]
    monkeypatch.setattr(model, "decode", DecodeConfig("sample", max_length_ratio=0.0, max_length_extra=9, seed=3))
    task = Continuation(model)
    service = task.service()
    texts = {seed: model.predict(["the red"], seed=seed)[0] for seed in (3, 4)}
    assert len(set(texts.values())) == 2
    given = [service.read({"text": "the red", **more}) for more in ({}, {"seed": 3}, {"seed": 4})]
    assert [own["text"] for own in service.predict(given)] == [texts[3], texts[3], texts[4]]
    page = task.exhibit(None, 0)
    (said,) = answered(page, "the red", "9", "4").parts
    assert (said.given + said.text).replace(" (the text ends here)", "") == texts[4]


def test_as_much_is_written_as_by_predict_and_never_more_than_a_request_asks_for(language, monkeypatch):
    model, prompt = language[0], "the red fox runs"
    ids = len(model.subwords.encode([prompt], "target")[0]) + 1

    def written(decode, **sent):
        monkeypatch.setattr(model, "decode", decode)
        task = Continuation(model)
        (answer,) = task.answers([task.read({"text": prompt, **sent})])
        return answer.whole, len(answer.read) + 1 - ids  # the last one is not read

    by_ratio = DecodeConfig("greedy", max_length_ratio=3.0, max_length_extra=2)
    assert written(by_ratio) == (model.predict([prompt])[0], 3 * ids + 2)
    at_least = DecodeConfig("greedy", max_length_ratio=0.0, min_new_tokens=20)
    assert written(at_least) == (model.predict([prompt])[0], 20)
    assert written(at_least, subwords=3)[1] == 3
    assert written(replace(at_least, min_new_tokens=300))[1] == 256
    # A beginning is at most as long as learned positions are.
    learned = replace(model.transformer, positions="learned", max_length=ids)
    monkeypatch.setattr(model, "transformer", learned)
    with pytest.raises(ValueError, match=rf"^text has {ids} subwords with its mark: at most {ids - 1} are read$"):
        Continuation(model).read({"text": prompt})
