"""A text-to-text model in use: a text in, what is written of it and the experts of the subwords on both sides out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apps.nlp.pairs.task import PairTask
from apps.task import Sizes


class TextInText(PairTask):
    """The use of a ``TextToText`` model."""

    app, noun, verb, written, longest = "text_to_text", "Text", "Write", "Answer", 100_000
    usual_words, example = range(10, 60), "AIDE is an intrusion detection system that detects changes to files."
    asked = ("Task", "What is to be written of the text.")

    def _sent(self, plain: str, name: str) -> str:
        return plain  # a longer text is cut, as in training

    @classmethod
    def data_arguments(cls, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        tasks = sizes.option("tasks") or given.get("tasks") or (sizes.option("dataset") or "text",)
        return {**super().data_arguments(given, sizes), "tasks": tuple(tasks)}


TASK = TextInText
