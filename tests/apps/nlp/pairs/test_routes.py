"""The use of the experts, read from a model whose gate is known, and the files of a report."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from copying import MOE, copy_data, translator
from lightning.pytorch import Trainer

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


@pytest.fixture
def module(two):
    """Encoder and decoder layer 0: German goes to expert 1, French to expert 3."""
    torch.manual_seed(0)
    options = {"encoder_moe_blocks": [0], "decoder_moe_blocks": [0], "decode": DecodeConfig("greedy")}
    module = translator(two, TASK, **options).eval()
    for layer in core.moe_layers(module).values():
        layer.router.gate.weight.data = torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    return module


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_use_is_read_from_all_real_tokens_of_both_sides(module, batches):
    use = expert_use(module, batches)
    encoder, decoder = use.layers
    assert (encoder.name, decoder.name) == ("encoder 0", "decoder 0")
    assert encoder.num_pairs == sum(int((b.source_BS != PAD_ID).sum()) for b in batches)
    # The decoder does not read the end.
    assert decoder.num_pairs == sum(int((b.target_BL[:, 1:] != PAD_ID).sum()) for b in batches)
    assert use.pair_B.tolist() == [p for b in batches for p in b.pair_B.tolist()]
    for layer in use.layers:
        assert np.count_nonzero(layer.by_sentence[use.pair_B == 0], axis=0).tolist() == [0, 20, 0, 0]
        assert np.count_nonzero(layer.by_sentence[use.pair_B == 1], axis=0).tolist() == [0, 0, 0, 20]


def test_a_gate_by_language_is_specialized_as_far_as_can_be(module, batches):
    rows_of = {(s.layer, s.about): s for s in specialization(expert_use(module, batches))}
    assert rows_of["encoder 0", "target language"].share == pytest.approx(1)
    assert rows_of["decoder 0", "target language"].share == pytest.approx(1)
    # Copies have the words of their sources, so a word does not tell which language it is in.
    assert rows_of["decoder 0", "token class"].bits < 0.05


def test_the_report_has_a_row_a_layer_and_label_and_one_an_expert(module, batches, tmp_path):
    section = write_use(expert_use(module, batches), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "specialization.csv",
        "expert_subwords.csv",
        "expert_language.png",
        "expert_class.png",
    }
    table = rows(tmp_path / "specialization.csv")
    assert [(r["layer"], r["about"]) for r in table] == [
        (layer, about) for layer in ("encoder 0", "decoder 0") for about in ("target language", "token class")
    ]
    experts = rows(tmp_path / "expert_subwords.csv")
    assert [(r["layer"], r["expert"]) for r in experts] == [
        (layer, str(e)) for layer in ("encoder 0", "decoder 0") for e in range(4)
    ]
    # All that differs between the languages' sources is the tag.
    assert experts[1]["subwords"].split()[0] == "<2de>"
    assert experts[3]["subwords"].split()[0] == "<2fr>"
    assert (experts[0]["share"], experts[0]["subwords"]) == ("0.0", "")
    specialized, *_, words = section.parts
    assert isinstance(specialized, Table)
    assert isinstance(words, Table)
    assert "by chance at most" in specialized.title
    assert specialized.rows[1][1].endswith("(100 %)")
    assert len(words.rows) == 8


def test_language_maps_are_by_pair_with_its_share_and_the_load(module, batches, tmp_path):
    section = write_use(expert_use(module, batches), tmp_path)
    encoder, decoder = (part for part in section.parts if getattr(part, "row_title", "") == "language")
    # Sources differ in the tag only, so the pairs have as many tokens.
    assert encoder.rows == ("en-de (50 %)", "en-fr (50 %)", "all")
    assert encoder.values == ((0, 100, 0, 0), (0, 0, 0, 100), (0, 50, 0, 50))
    assert decoder.title == "Which expert takes a language, decoder 0"


def test_class_maps_leave_out_classes_without_a_token(module, batches, tmp_path):
    section = write_use(expert_use(module, batches), tmp_path)
    maps = [part for part in section.parts if getattr(part, "row_title", "") == "class"]
    of_encoder, of_decoder = ([name.split(" (")[0] for name in part.rows] for part in maps)
    assert of_encoder[:2] == ["end of sentence", "language tag"]
    assert of_decoder[0] == "begin of sentence"
    assert not {"digits", "punctuation"} & {*of_encoder, *of_decoder}
    assert (of_encoder[-1], of_decoder[-1]) == ("all", "all")


def test_of_many_pairs_a_side_is_mapped_by_its_own_language(module, batches, monkeypatch):
    monkeypatch.setattr("apps.nlp.expert_use._MOST_PAIRS", 1)
    # There is one source language, which says nothing: the encoder's tokens are put by the target's.
    assert [names for _, names in language_counts(expert_use(module, batches))] == [("de", "fr")] * 2


# ---- sentences


def made_batch(lengths, pairs, first):
    source_BS = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for b, length in enumerate(lengths):
        source_BS[b, :length] = 5
    B = len(lengths)
    return TranslationBatch(source_BS, torch.full((B, 1), 2), torch.tensor(pairs), torch.arange(first, first + B))


def test_usual_sentences_are_of_each_pair_in_turn_those_nearest_to_14_subwords():
    made = [made_batch([3, 13, 20], [0, 0, 0], 0), made_batch([12, 40, 15], [1, 1, 0], 3)]
    # Pair 0: lines 1 and 5 are one away, line 2 six. Pair 1: line 3 two away.
    assert [int(s.index_B) for s in usual_sentences(made, 3)] == [1, 3, 5]
    assert [int(s.index_B) for s in usual_sentences(made, 1)] == [1]
    assert usual_sentences(made, 0) == []
    assert usual_sentences([], 2) == []


def test_a_sentence_is_drawn_as_the_model_says_it(module, batches, tmp_path):
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


def test_padding_of_a_batch_is_not_drawn(module, batches, tmp_path):
    (sentence,) = usual_sentences(batches, 1)
    padded = sentence._replace(source_BS=torch.nn.functional.pad(sentence.source_BS, (0, 3), value=PAD_ID))
    whole, other = (write_sentence(module, one, 1, tmp_path) for one in (sentence, padded))
    assert [words.words for words in whole[:2]] == [words.words for words in other[:2]]
    assert whole[2].columns == other[2].columns


def test_use_is_read_from_batches_at_equal_steps():
    made = [made_batch([5] * 10, [0] * 10, 10 * i) for i in range(6)]  # 60 sentences
    some = [[int(b.index_B[0]) // 10 for b in spread_batches(made, wanted)] for wanted in (1000, 30, 10, 1)]
    # Half of the batches: the middle of each pair, as well as can be; one: the middle of all.
    assert some == [[0, 1, 2, 3, 4, 5], [1, 3, 5], [3], [3]]
    assert spread_batches(made, 0) == spread_batches([], 10) == []


METRICS = "step,train/loss,val/loss,val/bleu\n10,3.5,,\n20,,3.25,12.5\n"


# ---- in a test run

OF_SCORES = {"sections.json", "pairs.csv", "lengths.csv", "sentences.jsonl", "signatures.txt"}


def files_of(two, folder: Path, **options) -> set[str]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=folder, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.test(translator(two, decode=DecodeConfig("greedy"), **options), two, verbose=False)
    return {p.name for p in (folder / "report").iterdir()} - OF_SCORES


def test_a_test_leaves_pictures_and_tables_in_the_runs_folder(two, tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    assert files_of(two, tmp_path, moe=MOE, report=TranslationReportConfig(sentences=1)) == {
        "specialization.csv",
        "expert_subwords.csv",
        "expert_language.png",
        "expert_class.png",
        "sentence_1_attention.png",
        "sentence_1_experts.png",
        "learning_curves.png",
    }
    assert all(math.isfinite(float(r["bits"])) for r in rows(tmp_path / "report" / "specialization.csv"))


def test_a_dense_model_has_its_attention_drawn(two, tmp_path):
    names = files_of(two, tmp_path, moe=None, decoder_moe_blocks="none")
    assert names == {"sentence_1_attention.png", "sentence_2_attention.png"}


def test_pictures_can_be_left_out(two, tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    names = files_of(two, tmp_path, moe=MOE, report=TranslationReportConfig(pictures=False))
    assert names == {"specialization.csv", "expert_subwords.csv"}


def test_a_training_leaves_its_curves(two, tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        enable_checkpointing=False,
        max_steps=1,
        limit_val_batches=0,
        **quiet,
    )
    trainer.fit(translator(two), two)
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["learning_curves.png"]
