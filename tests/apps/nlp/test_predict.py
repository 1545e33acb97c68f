"""Lines of translations, in order and as they come."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apps.nlp.batch import TranslationBatch
from apps.nlp.predict import in_order, predict_lines


def test_a_line_comes_as_soon_as_all_before_it_are_there():
    asked = []

    def batches():
        for numbers, texts in (([2, 0], ["c", "a"]), ([1], ["b"]), ([3], ["d"])):
            asked.append(numbers)
            yield numbers, texts

    lines = in_order(batches())
    assert asked == []
    assert next(lines) == "a"
    assert asked == [[2, 0]]
    assert next(lines) == "b"
    assert next(lines) == "c"
    assert asked == [[2, 0], [1]]
    assert list(lines) == ["d"]


def test_no_line_is_lost_or_doubled():
    with pytest.raises(ValueError, match="line 2 is missing"):
        list(in_order([([0, 2], ["a", "c"])]))
    with pytest.raises(ValueError, match="line 1 comes twice"):
        list(in_order([([0, 1], ["a", "b"]), ([0], ["a"])]))


def test_data_of_other_subwords_or_pairs_are_refused():
    def data(**options: Any) -> Any:
        subwords = SimpleNamespace(digest=options.pop("digest", "a1"))
        one = torch.zeros(1, dtype=torch.int64)
        batches = [TranslationBatch(one[None] + 9, one[None], one, one)]
        given = {"text": "x", "predict_file": None, "pairs": ("en-de",), "subwords": subwords}
        return SimpleNamespace(**{**given, **options}, predict_dataloader=lambda: batches)

    def lines(data: Any) -> Any:
        model = SimpleNamespace(digest="a1")
        return predict_lines(lambda batch: [f"{int(i)}" for i in batch.source_BS[:, 0]], model, ["en-de"], data)

    assert list(lines(data())) == ["9"]
    assert list(lines(data(text=None, predict_file="in.txt"))) == ["9"]
    assert lines(data(text=None)) is None
    with pytest.raises(ValueError, match="the model's subwords are a1, and the data's are b2"):
        lines(data(digest="b2"))
    with pytest.raises(ValueError, match="the model's pairs are en-de, and the data's are de-en"):
        lines(data(pairs=("de-en",)))
