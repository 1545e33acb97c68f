"""The page of a translator has the model's own texts, and the experts of each subword."""

import pytest
from shown_runs import answered, best_experts, shown, translator_run

import core
from apps.nlp.predict import source_batches
from apps.nlp.text.words import words_of


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    return shown(translator_run(tmp_path_factory.mktemp("translator")))


def test_a_translation_is_the_models_own_and_both_sides_have_the_experts_of_their_pass(translator):
    model, exhibit = translator
    answer = answered(exhibit, "red green blue", "en-fr")
    best, *further = model.candidates(["red green blue"], "en-fr", num_return_sequences=3)[0]
    said, table = answer.parts
    assert (said.text, table.rows) == (best.text, tuple((c.text, f"{c.score:.3f}") for c in further))
    assert list(answer.layers) == ["encoder 0", "decoder 1"]
    ((batch, _),) = source_batches(["red green blue"], model.subwords, 1, model.tag_of(1), 256, 256, 1)
    with core.record(model.model) as tape:
        model.model.encode(batch.source_BS, *model._ids(batch))
    (words,), (read,) = answer.layers.values()
    assert words.words[0] == ("<2fr>",)
    assert words.experts.tolist() == best_experts(tape.entries[0].routing)
    assert read.words[0] == ("<s>",)
    # Words are made of subwords.
    words = [("<2de>",), ("Per", "son", "<0xE2>"), ("▁", "x"), ("</s>",), ("y",)]
    assert words_of(["<2de>", "▁Per", "son", "<0xE2>", "▁", "x", "</s>", "y"]) == words


def test_a_long_sentence_is_cut_and_the_page_says_so(translator):
    model, exhibit = translator
    answer = answered(exhibit, " ".join(["red"] * 300), "en-de")
    assert answer.parts[1].lines == ("The sentence is too long for the model: it was cut after 256 subwords.",)
    for sentence, pair, message in (
        ("red", "en-es", r"^Languages='en-es' is none of the 2 values that the model knows"),
        ("", "en-de", r"^Sentence is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            answered(exhibit, sentence, pair)
