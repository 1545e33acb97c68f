"""The page of a translator has the model's own texts, and the experts of each subword."""

from __future__ import annotations

import pytest
from shown_runs import answered, best_experts, shown, translator_run

import core
from apps.nlp.predict import source_batches
from apps.nlp.text.words import words_of


def test_words_are_made_of_subwords():
    pieces = ["<2de>", "▁Per", "son", "<0xE2>", "▁", "x", "</s>", "y"]
    words = [("<2de>",), ("Per", "son", "<0xE2>"), ("▁", "x"), ("</s>",), ("y",)]
    assert words_of(pieces) == words


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    return shown(translator_run(tmp_path_factory.mktemp("translator")))


def test_a_translation_is_the_models_own_with_the_further_ones_of_the_search(translator):
    model, exhibit = translator
    answer = answered(exhibit, "red green blue", "en-fr")
    best, *further = model.candidates(["red green blue"], "en-fr", num_return_sequences=3)[0]
    said, table = answer.parts
    assert said.text == best.text
    assert table.rows == tuple((c.text, f"{c.score:.3f}") for c in further)


def test_both_sides_have_the_experts_of_their_pass(translator):
    model, exhibit = translator
    answer = answered(exhibit, "red green blue", "en-fr")
    assert list(answer.layers) == ["encoder 0", "decoder 1"]
    ((batch, _),) = source_batches(["red green blue"], model.subwords, 1, model.tag_of(1), 256, 256, 1)
    with core.record(model.model) as tape:
        model.model.encode(batch.source_BS, *model._ids(batch))
    (words,) = answer.layers["encoder 0"]
    assert words.words[0] == ("<2fr>",)
    assert words.experts.tolist() == best_experts(tape.entries[0].routing)
    (read,) = answer.layers["decoder 1"]
    assert read.words[0] == ("<s>",)


def test_a_long_sentence_is_cut_and_the_page_says_so(translator):
    _, exhibit = translator
    answer = answered(exhibit, " ".join(["red"] * 300), "en-de")
    assert answer.parts[1].lines == ("The sentence is too long for the model: it was cut after 256 subwords.",)


def test_an_unknown_pair_and_an_empty_sentence(translator):
    _, exhibit = translator
    with pytest.raises(ValueError, match=r"^Languages='en-es' is none of the 2 values that the model knows"):
        answered(exhibit, "red", "en-es")
    with pytest.raises(ValueError, match=r"^Sentence is empty"):
        answered(exhibit, "", "en-de")
