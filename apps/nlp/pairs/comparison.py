"""How texts written for sources are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.nlp.comparison import TextComparison
from apps.nlp.pairs.report import examples, side_by_side


class PairComparison(TextComparison):
    """A ``PairModule`` as a comparison sees it."""

    def examples_of_test(self) -> list[dict[str, Any]]:
        """Return each example of the last test."""
        data = self.module._data()
        sources = data.sources("test") if hasattr(data, "sources") else None
        return examples(self.module._tested, self.module.noun, self.module.groups, sources)

    def side_by_side(self, systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
        """Return examples at equal steps through the test set, with each system's text."""
        return side_by_side(systems, self.module.noun, 0 if self.module.report is None else self.module.report.samples)
