"""Scores of captions by hand, the files of a captioner's report, where its words look, and which experts take them."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captioned import DECODER, captioner, encoding, images, pairs

import core
from apps.multimodal.captions.metrics import CaptionMetrics, by_image, num_references, signatures
from apps.multimodal.captions.report import CaptionReportConfig, thumbnail, write_captions, write_scores, write_use
from apps.multimodal.captions.traced import Traced, traced
from apps.nets.config import TransformerConfig
from apps.nlp.text.teacher_forced import Judged


def pair(index, image, caption, reference, nll=0.0, right=0, tokens=2):
    return Judged(index, image, caption, reference, -1.0, nll, right, tokens)


TWO = [
    pair(0, 7, "a b c d", "x y z w", nll=math.log(2), right=1),
    pair(1, 7, None, "a b c d", nll=math.log(4), right=2),
    pair(2, 9, "e f g h", "e f g h", nll=0.0, right=2),
]


def test_an_image_has_all_its_texts_each_once_in_whatever_batches():
    first, second = by_image(TWO)
    assert (first.image, first.index, first.caption, first.references) == (7, 0, "a b c d", ("x y z w", "a b c d"))
    assert (second.image, second.references) == (9, ("e f g h",))
    assert (num_references([first, second]), num_references([second])) == (None, 1)
    (image,) = by_image([pair(0, 1, "a", "a"), pair(1, 1, "a", "a")])
    assert image.references == ("a",)
    assert signatures("13a", 5)["bleu"].startswith("nrefs:5|")
    assert set(signatures("13a", None)) == {"bleu", "chrf"}
    metrics = CaptionMetrics()
    assert all(math.isnan(value) for value in metrics.compute().values())
    metrics = CaptionMetrics()
    for part in (TWO[2:], TWO[:2], TWO[:1]):
        metrics.update(part)
    values = {name: float(value) for name, value in metrics.compute().items()}
    # Both captions are texts of their images. 5 of 6 tokens came first, and -log p sums to 3 log 2 over 6 tokens.
    assert values == pytest.approx({"bleu": 100.0, "chrf": 100.0, "token_accuracy": 5 / 6, "perplexity": 2**0.5})
    assert [image.image for image in metrics.images] == [7, 9]


NAMED = SimpleNamespace(image_name=lambda number: f"shop/{number}.png")


@pytest.fixture
def metrics():
    metrics, hat = CaptionMetrics(), "a red hat"
    metrics.update([Judged(0, 5, hat, hat, -0.5, 1.0, 2, 4), Judged(1, 5, None, "a hat", 0.0, 1.0, 2, 3)])
    metrics.update([Judged(2, 7, hat, "two blue shoes", -0.7, 1.0, 1, 4)])
    metrics.compute()
    return metrics


def test_captions_are_written_with_their_texts_and_the_table_counts_words(metrics, tmp_path):
    write_captions(tmp_path / "captions.jsonl", metrics.images, NAMED)
    first, second = map(json.loads, (tmp_path / "captions.jsonl").read_text().splitlines())
    texts = {"image": "shop/5.png", "caption": "a red hat", "references": ["a red hat", "a hat"]}
    assert (first, second["references"]) == ({**texts, "chrf": 100.0, "search_score": -0.5}, ["two blue shoes"])
    assert second["chrf"] < 20
    values = {name: float(value) for name, value in metrics.compute().items()}
    (table,) = write_scores(metrics, values, NAMED, tmp_path).parts
    (row,) = table.rows
    # Two images of three words each, texts of 3, 2 and 3 words; both captions are the same. 5 of 11 tokens came first.
    assert (row[0], row[3], row[-3:]) == ("2", "45.45", ("3.0", "2.7", "1"))
    # One image has two texts and one has one.
    assert "BLEU nrefs:var|" in table.title
    assert (tmp_path / "signatures.txt").read_text().startswith("bleu nrefs:var|")


def test_an_image_is_traced_and_words_look_where_their_subwords_look_on_average():
    # A grid of 1 x 2 patches, one head; the two layers but one is the first. "a" is one subword, "red" two.
    attention = torch.tensor([[[[0.9, 0.1]], [[0.2, 0.6]], [[0.4, 0.2]], [[0.5, 0.5]]]] * 2)[:, None]
    attention[1] = 0.0
    trace = Traced(("<s>", "\u2581a", "\u2581r", "ed"), ("\u2581a", "\u2581r", "ed", "</s>"), attention, core.Tape())
    words, looks = trace.looks()
    assert (words, looks[:, 0].ravel().tolist()) == (["a", "red"], pytest.approx([0.9, 0.1, 0.3, 0.4]))
    trace = traced(captioner(encoder_moe_blocks="last1").eval(), images("red"), [5, 6])
    assert len(trace.read) == len(trace.written) == 3
    assert (trace.read[0], trace.written[-1]) == ("<s>", "</s>")
    assert trace.attention.shape == (2, 2, 3, 2, 2)  # layers, heads, subwords, rows and columns of patches
    assert [entry.name for entry in trace.of_encoder] == ["encoder.blocks.1.mlp"]
    assert [entry.name for entry in trace.of_decoder] == ["decoder.layers.1.ffn"]
    words, looks = traced(captioner(moe=None).eval(), images("red"), []).looks()
    assert (words, looks.shape) == ([], (0, 2, 2))
    config = TransformerConfig("nano", dim=16, hidden_dim=16, num_heads=2, decoder_layers=1)
    assert DECODER.shape.decoder_layers == 2
    trace = traced(captioner(transformer=config, moe=None).eval(), images("red"), [5])
    assert trace.looks()[1].shape == (1, 2, 2)


def test_the_use_of_experts_is_counted_by_subword(tmp_path):
    # A hash router of one expert a subword: each subword has one expert, and each expert its own subwords.
    moe = core.MoEConfig(3, core.Hash(vocab_size=encoding().text.vocab_size), core.FFN(8))
    module, batch = captioner(moe=moe).eval(), pairs(("red", "a red picture"), ("blue", "a blue picture"))
    section = write_use(module, [batch], tmp_path)
    rows = list(csv.DictReader((tmp_path / "expert_subwords.csv").open()))
    assert [row["layer"] for row in rows] == ["decoder 1"] * 3
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1)
    read = {p for ids in batch.text_BL[:, :-1] for p in module.subwords.pieces(ids[ids > 0].tolist(), "source")}
    typical = [piece for row in rows for piece in row["subwords"].split()]
    assert len(typical) == len(set(typical))  # no subword is typical of two
    assert set(typical) <= read
    assert section.title == "What the experts are used for"


def test_a_small_picture_is_scaled_up_and_a_brief_report_has_none(metrics):
    small = thumbnail(np.zeros((8, 10, 3)), metrics.images[0], "a hat")
    assert (small.size, small.lines) == ((120, 96), ("a red hat", "[a red hat]", "[a hat]"))
    assert CaptionReportConfig().brief().samples == 0
