"""How the texts of ``TextToText`` are compared: by its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.equal_cost.comparison import ExampleDifference
from apps.nlp.pairs.comparison import PairComparison


class TextToTextComparison(PairComparison):
    """A ``TextToText`` as a comparison sees it."""

    def examples_of_test(self) -> list[dict[str, Any]]:
        rows = zip(super().examples_of_test(), self.module._tested, strict=True)
        return [{**example, "scores": piece.scores} for example, piece in rows]

    def compare_examples(
        self, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
    ) -> list[ExampleDifference]:
        """Return the differences of all metrics by paired bootstrap resampling."""
        from apps.nlp.text.significance import mean_difference

        if [(e["index"], e["reference"]) for e in first] != [(e["index"], e["reference"]) for e in second]:
            raise ValueError("the two tests are not of the same texts")
        tasks = [e["task"] for e in first]
        values = {name: [[e["scores"][name] for e in own] for own in (first, second)] for name in self.module.metrics}
        return [mean_difference(name, a, b, tasks, "test texts") for name, (a, b) in values.items()]


COMPARISON = TextToTextComparison
