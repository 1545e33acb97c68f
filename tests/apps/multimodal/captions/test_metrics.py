"""Scores of captions, by hand: each image counts once, with all its texts."""

from __future__ import annotations

import math

import pytest

from apps.multimodal.captions.metrics import CaptionMetrics, by_image, num_references, signatures
from apps.nlp.text.foreseen import Judged


def pair(index, image, caption, reference, nll=0.0, right=0, tokens=2):
    return Judged(index, image, caption, reference, -1.0, nll, right, tokens)


TWO = [
    pair(0, 7, "a b c d", "x y z w", nll=math.log(2), right=1),
    pair(1, 7, None, "a b c d", nll=math.log(4), right=2),
    pair(2, 9, "e f g h", "e f g h", nll=0.0, right=2),
]


def test_an_image_has_all_its_texts():
    first, second = by_image(TWO)
    assert (first.image, first.index, first.caption, first.references) == (7, 0, "a b c d", ("x y z w", "a b c d"))
    assert (second.image, second.references) == (9, ("e f g h",))
    assert num_references([first, second]) is None
    assert num_references([second]) == 1


def test_the_order_of_batches_does_not_matter():
    metrics = CaptionMetrics()
    metrics.update(TWO[2:])
    metrics.update(TWO[:2])
    values = {name: float(value) for name, value in metrics.compute().items()}
    # Both captions are texts of their images. 5 of 6 tokens came first, and -log p sums to 3 log 2 over 6 tokens.
    expected = {"bleu": 100.0, "chrf": 100.0, "token_accuracy": 5 / 6, "perplexity": 2**0.5}
    assert values == pytest.approx(expected)
    assert [image.image for image in metrics.images] == [7, 9]


def test_one_text_twice_is_one_reference():
    (image,) = by_image([pair(0, 1, "a", "a"), pair(1, 1, "a", "a")])
    assert image.references == ("a",)


def test_a_pair_that_came_twice_counts_once():
    metrics = CaptionMetrics()
    metrics.update(TWO)
    metrics.update(TWO[:1])
    assert float(metrics.compute()["token_accuracy"]) == pytest.approx(5 / 6)


def test_no_pair_has_no_score():
    assert all(math.isnan(value) for value in CaptionMetrics().compute().values())


def test_signatures_say_how_many_texts_there_are():
    assert signatures("13a", 5)["bleu"].startswith("nrefs:5|")
    assert set(signatures("13a", None)) == {"bleu", "chrf"}
