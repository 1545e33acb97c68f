"""The use of the experts, read from a model whose gate is known, and the files of a report."""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from copying import copy_data, translator
from lightning.pytorch import Trainer
from quiet_trainer import quiet_trainer

import core
from apps.data.subwords import PAD_ID
from apps.nlp.decode import DecodeConfig
from apps.nlp.expert_use import language_counts, write_use
from apps.nlp.pairs.routes import expert_use, usual_sentences, write_sentence
from apps.nlp.specialization import specialization
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.translation.report import TranslationReportConfig
from apps.report.base import spread_batches
from apps.report.page import Table

TASK = core.MoEConfig(4, router=core.Task(num_tasks=2, top_k=1), expert=core.FFN(hidden_dim=8))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return copy_data(tmp_path_factory.mktemp("two"), ("de", "fr"), eval_tokens_per_batch=100)


@pytest.fixture(scope="module")
def batches(two) -> list[TranslationBatch]:
    return list(two.test_dataloader())


@pytest.fixture(scope="module")
def module(two):
    """Encoder and decoder layer 0: German goes to expert 1, French to expert 3."""
    torch.manual_seed(0)
    options = {"encoder_moe_blocks": [0], "decoder_moe_blocks": [0], "decode": DecodeConfig("greedy")}
    module = translator(two, TASK, **options).eval()
    for layer in core.moe_layers(module).values():
        layer.router.gate.weight.data = torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    return module


@pytest.fixture(scope="module")
def use(module, batches):
    return expert_use(module, batches)


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_use_is_read_from_all_real_tokens_of_both_sides(use, batches, monkeypatch):
    encoder, decoder = use.layers
    assert (encoder.name, decoder.name) == ("encoder 0", "decoder 0")
    assert encoder.num_pairs == sum(int((b.source_BS != PAD_ID).sum()) for b in batches)
    # The decoder does not read the end.
    assert decoder.num_pairs == sum(int((b.target_BL[:, 1:] != PAD_ID).sum()) for b in batches)
    assert use.pair_B.tolist() == [p for b in batches for p in b.pair_B.tolist()]
    for layer in use.layers:
        assert np.count_nonzero(layer.by_sentence[use.pair_B == 0], axis=0).tolist() == [0, 20, 0, 0]
        assert np.count_nonzero(layer.by_sentence[use.pair_B == 1], axis=0).tolist() == [0, 0, 0, 20]
    rows_of = {(s.layer, s.about): s for s in specialization(use)}
    assert rows_of["encoder 0", "target language"].share == pytest.approx(1)
    assert rows_of["decoder 0", "target language"].share == pytest.approx(1)
    # Copies have the words of their sources, so a word does not tell which language it is in.
    assert rows_of["decoder 0", "token class"].bits < 0.05
    # Of many pairs a side is mapped by its own language. There is one source language, which says nothing: the
    # encoder's tokens are put by the target's.
    monkeypatch.setattr("apps.nlp.expert_use._MOST_PAIRS", 1)
    assert [names for _, names in language_counts(use)] == [("de", "fr")] * 2


def test_the_report_has_a_row_a_layer_and_label_one_an_expert_and_maps(use, tmp_path):
    section = write_use(use, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == OF_USE
    layers = ("encoder 0", "decoder 0")
    table, experts = rows(tmp_path / "specialization.csv"), rows(tmp_path / "expert_subwords.csv")
    about = ("target language", "token class")
    assert [(r["layer"], r["about"]) for r in table] == [*itertools.product(layers, about)]
    assert [(r["layer"], r["expert"]) for r in experts] == [*itertools.product(layers, "0123")]
    # All that differs between the languages' sources is the tag.
    assert experts[1]["subwords"].split()[0] == "<2de>"
    assert experts[3]["subwords"].split()[0] == "<2fr>"
    assert (experts[0]["share"], experts[0]["subwords"]) == ("0.0", "")
    specialized, *_, words = section.parts
    assert {type(specialized), type(words)} == {Table}
    assert "by chance at most" in specialized.title
    assert specialized.rows[1][1].endswith("(100 %)")
    assert len(words.rows) == 8
    # Language maps are by pair with its share and the load. Sources differ in the tag only, so the pairs have as many
    # tokens.
    encoder, decoder = (part for part in section.parts if getattr(part, "row_title", "") == "language")
    assert encoder.rows == ("en-de (50 %)", "en-fr (50 %)", "all")
    assert encoder.values == ((0, 100, 0, 0), (0, 0, 0, 100), (0, 50, 0, 50))
    assert decoder.title == "Which expert takes a language, decoder 0"
    # Class maps leave out classes without a token.
    maps = [part for part in section.parts if getattr(part, "row_title", "") == "class"]
    of_encoder, of_decoder = ([name.split(" (")[0] for name in part.rows] for part in maps)
    assert (*of_encoder[:2], of_decoder[0]) == ("end of sentence", "language tag", "begin of sentence")
    assert not {"digits", "punctuation"} & {*of_encoder, *of_decoder}
    assert (of_encoder[-1], of_decoder[-1]) == ("all", "all")


def made_batch(lengths, pairs, first):
    source_BS = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for b, length in enumerate(lengths):
        source_BS[b, :length] = 5
    B = len(lengths)
    return TranslationBatch(source_BS, torch.full((B, 1), 2), torch.tensor(pairs), torch.arange(first, first + B))


def test_usual_sentences_are_those_nearest_to_14_subwords_and_batches_are_spread():
    made = [made_batch([3, 13, 20], [0, 0, 0], 0), made_batch([12, 40, 15], [1, 1, 0], 3)]
    # Pair 0: lines 1 and 5 are one away, line 2 six. Pair 1: line 3 two away.
    assert [int(s.index_B) for s in usual_sentences(made, 3)] == [1, 3, 5]
    assert [int(s.index_B) for s in usual_sentences(made, 1)] == [1]
    assert usual_sentences(made, 0) == []
    assert usual_sentences([], 2) == []
    made = [made_batch([5] * 10, [0] * 10, 10 * i) for i in range(6)]  # 60 sentences
    some = [[int(b.index_B[0]) // 10 for b in spread_batches(made, wanted)] for wanted in (1000, 30, 10, 1)]
    # Half of the batches: the middle of each pair, as well as can be; one: the middle of all.
    assert some == [[0, 1, 2, 3, 4, 5], [1, 3, 5], [3], [3]]
    assert spread_batches(made, 0) == spread_batches([], 10) == []


def test_a_sentence_is_drawn_as_the_model_says_it_without_its_padding(module, batches, tmp_path):
    sentence = usual_sentences([b for b in batches if (b.pair_B == 1).any()], 2)[1]
    source_words, read_words, attention = write_sentence(module, sentence, 1, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"sentence_1_attention.png", "sentence_1_experts.png"}
    ids = sentence.source_BS[0][sentence.source_BS[0] != PAD_ID].tolist()
    source = module.subwords.pieces(ids, "source")
    pieces = module.subwords.pieces(module.translate(sentence, module.decode).best[0], "target")
    assert list(attention.columns) == source
    assert list(attention.rows) == [*pieces, "</s>"]
    np.testing.assert_allclose(np.sum(attention.values, axis=1), 100, rtol=1e-5)
    assert source_words.words == tuple(piece.removeprefix("\u2581") for piece in source)
    assert read_words.words == ("<s>", *(piece.removeprefix("\u2581") for piece in pieces))
    # One expert a token: that of French.
    assert {label for words in (source_words, read_words) for row in words.labels.values() for label in row} == {"3"}
    padded = sentence._replace(source_BS=torch.nn.functional.pad(sentence.source_BS, (0, 3), value=PAD_ID))
    others = write_sentence(module, padded, 1, tmp_path)
    assert [words.words for words in others[:2]] == [source_words.words, read_words.words]
    assert others[2].columns == attention.columns


# ---- in a test run

OF_SCORES = {"sections.json", "pairs.csv", "lengths.csv", "sentences.jsonl", "signatures.txt"}


OF_USE = {"specialization.csv", "expert_subwords.csv", "expert_language.png", "expert_class.png"}


def quiet(folder: Path, **options) -> Trainer:
    (folder / "metrics.csv").write_text("step,train/loss,val/loss,val/bleu\n10,3.5,,\n20,,3.25,12.5\n")
    return quiet_trainer(folder, num_sanity_val_steps=0, **options)


DENSE = {"moe": None, "decoder_moe_blocks": "none"}


@pytest.mark.parametrize(
    "options, files",
    [
        ({"report": {"sentences": 1}}, {*OF_USE, "sentence_1_attention.png", "sentence_1_experts.png"}),
        ({**DENSE, "report": {}}, {"sentence_1_attention.png", "sentence_2_attention.png"}),
        ({"report": {"pictures": False}}, {"specialization.csv", "expert_subwords.csv"}),
    ],
    ids=["sparse", "dense", "without pictures"],
)
def test_a_test_leaves_pictures_and_tables_in_the_runs_folder(two, tmp_path, options, files):
    report = TranslationReportConfig(**options["report"])
    module = translator(two, decode=DecodeConfig("greedy"), **{**options, "report": report})
    quiet(tmp_path, limit_test_batches=2).test(module, two, verbose=False)
    curves = {"learning_curves.png"} if report.pictures else set()
    assert {p.name for p in (tmp_path / "report").iterdir()} - OF_SCORES == files | curves
    if "moe" not in options:
        assert all(math.isfinite(float(r["bits"])) for r in rows(tmp_path / "report" / "specialization.csv"))


def test_a_training_leaves_its_curves(two, tmp_path):
    quiet(tmp_path, max_steps=1, limit_val_batches=0).fit(translator(two), two)
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["learning_curves.png"]
