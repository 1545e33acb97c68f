"""The report of a language model: losses by hand, a piece of text, and what a test leaves."""

import csv
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from copying import MOE, TRANSFORMER
from quiet_trainer import quiet_trainer

import core
from apps.data.subwords import PAD_ID, SubwordConfig
from apps.nets.depths import MixtureOfDepths
from apps.nlp.language.data import TextData
from apps.nlp.language.module import LanguageModeler
from apps.nlp.language.report import LanguageReportConfig, TokenLosses, excerpt
from apps.report.base import spread_places
from apps.report.page import Words, load_sections

PIECES = ["<pad>", "\u2581the", "\u2581a", "ing", "\u25811", "."]
DOCUMENTS = ["red blue green black", "one two three four", "north, east; 7 south west", "spring summer autumn winter"]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def added(*batches) -> TokenLosses:
    """Return the losses of batches, each with targets (B, L), 0 for padding; a loss is a tenth of a target's place."""
    losses = TokenLosses(len(PIECES))
    for targets in batches:
        target_BL = torch.tensor(targets)
        real_BL = target_BL != 0
        nll_BL = torch.arange(1, target_BL.shape[1] + 1).expand_as(target_BL) / 10
        losses.add(nll_BL[real_BL], target_BL[real_BL] == 1, target_BL[real_BL], real_BL)
    return losses


def test_losses_by_class_and_by_place_are_means_over_tokens_and_blocks_are_cut():
    losses = added([[1, 1, 3], [4, 5, 0]], [[1, 1, 3, 2]])
    places = losses.places()
    spans = [(row["first"], row["last"], row["tokens"]) for row in places]
    assert spans == [(1, 1, 3), (2, 2, 3), (3, 3, 2), (4, 4, 1)]
    assert [row["loss"] for row in places] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    by_class = {row["class"]: row for row in losses.classes(PIECES)}
    # "the" is the first quarter of 7 tokens with letters, "ing" comes after 4 of them, "a" after 6.
    told = ("digits", "punctuation", "function-like", "word start, rare", "continuation, 3rd quarter", "all")
    assert tuple(by_class) == told
    assert by_class["function-like"]["loss"] == pytest.approx((0.1 + 0.2 + 0.1 + 0.2) / 4)
    assert by_class["function-like"]["token_accuracy"] == 1
    assert by_class["digits"]["perplexity"] == pytest.approx(math.exp(0.1))
    assert by_class["all"]["tokens"] == 9
    assert by_class["all"]["loss"] == pytest.approx((3 * 0.1 + 3 * 0.2 + 2 * 0.3 + 0.4) / 9)
    losses = TokenLosses(len(PIECES))
    losses.by_place = np.stack((np.arange(128.0), np.ones(128)))
    places = losses.places()
    assert len(places) == 64
    assert places[0] == {"first": 1, "last": 2, "tokens": 2, "loss": 0.5}
    # Parts of one size: 33 of two places, and the last one has one.
    losses.by_place = np.stack((np.zeros(67), np.ones(67)))
    assert [row["tokens"] for row in losses.places()] == [2] * 33 + [1]
    ids, nll = [1, 2, 3, 3, 1, 3, 4, 5, 2], [0.1 * i for i in range(1, 9)]
    piece = excerpt(1, ids, nll, core.Tape(), PIECES)
    # Place 3 is "ing", place 4 "the"; the last id is read by no layer.
    assert piece.words == ("the", "ing", "1", ".")
    assert piece.values["loss in nats"] == pytest.approx((0.4, 0.5, 0.6, 0.7))
    assert excerpt(1, [1, 2, 3, 0, 0], [0.1, 0.2, math.nan, math.nan], core.Tape(), PIECES).words == ("a", "ing")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TextData:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("\n".join(random.Random(0).choices(DOCUMENTS, k=120)) + "\n")
    (folder / "val.txt").write_text("\n".join(DOCUMENTS * 3) + "\n")
    given = {"train_files": "train.txt", "val_files": "val.txt", "test_files": "val.txt", "root": str(folder)}
    given |= {"cache_dir": str(folder / "cache"), "tokenizer": SubwordConfig(vocab_size=400)}
    return TextData(**given, block_size=20, eval_batch_size=2)


def after_test(data, folder, **options) -> tuple[dict[str, float], LanguageModeler]:
    torch.manual_seed(0)
    given = {"transformer": TRANSFORMER, "moe": MOE, "moe_blocks": [1], **options}
    module = LanguageModeler(data.subwords, **given)
    (metrics,) = quiet_trainer(folder).test(module, data, verbose=False)
    return dict(metrics), module


def test_a_test_leaves_losses_experts_and_pieces_of_text(data, tmp_path):
    metrics, module = after_test(data, tmp_path)
    folder = tmp_path / "report"
    assert {p.name for p in folder.iterdir()} == {
        "token_classes.csv", "places.csv", "specialization.csv", "expert_subwords.csv", "expert_class.png",
        "sections.json",
    }  # fmt: skip
    classes, places = rows(folder / "token_classes.csv"), rows(folder / "places.csv")
    tokens = data.size("test").tokens
    assert sum(int(row["tokens"]) for row in places) == tokens
    assert int(classes[-1]["tokens"]) == tokens == sum(int(row["tokens"]) for row in classes[:-1])
    assert float(classes[-1]["perplexity"]) == pytest.approx(metrics["test/perplexity"], rel=1e-5)
    assert float(classes[-1]["token_accuracy"]) == pytest.approx(metrics["test/token_accuracy"])
    teacher_forced, experts, sentences = load_sections(folder)
    assert [s.title for s in (teacher_forced, experts, sentences)] == [
        "What the model foresees", "What the experts are used for", "Words in sentences"
    ]  # fmt: skip
    assert len(sentences.parts) == 2
    words = sentences.parts[0]
    assert isinstance(words, Words)
    assert list(words.labels) == ["decoder 1"]
    # Each subword's loss, and the expert of its place, are the model's.
    batches = list(data.test_dataloader())
    batch = batches[spread_places(len(batches), 2)[0]]
    with torch.no_grad(), core.record(module.model) as tape:
        scores, real_BL = module.eval().token_scores(batch)
    ids = batch.tokens_BL[0].tolist()
    assert PAD_ID not in ids
    piece = excerpt(1, ids, scores.nll_T[: real_BL.shape[1]].tolist(), tape, pieces_of(module))
    assert words.values["loss in nats"] == pytest.approx(piece.values["loss in nats"], rel=1e-5)
    assert words.labels == piece.labels


def pieces_of(module) -> list[str]:
    return module.subwords.pieces(range(module.subwords.size("target")), "target")


def test_a_dense_model_has_losses_and_text_alone_and_no_examples_leave_no_report(data, tmp_path):
    after_test(data, tmp_path / "none", report=LanguageReportConfig(routing_examples=0))
    assert not list((tmp_path / "none" / "report").glob("*"))
    after_test(data, tmp_path, moe=None, report=LanguageReportConfig(sentences=1, routing_examples=4))
    teacher_forced, sentences = load_sections(tmp_path / "report")
    (words,) = sentences.parts
    assert (words.labels, words.title) == ({}, "Text 1, with the loss of each subword")
    # The gates before blocks are not shown as experts.
    after_test(data, tmp_path / "gates", depths=MixtureOfDepths(0.5, predictor=True), depth_blocks="all")
    shown = [part for section in load_sections(tmp_path / "gates" / "report") for part in section.parts]
    assert [part.labels for part in shown if isinstance(part, Words)] == [{}, {}]
    assert "depth gate" not in repr(shown)
