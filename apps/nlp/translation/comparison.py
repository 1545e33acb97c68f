"""How translations are compared: by BLEU and chrF++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.equal_cost.comparison import ExampleDifference
from apps.nlp.pairs.comparison import PairComparison


class TranslationComparison(PairComparison):
    """A ``Translator`` as a comparison sees it."""

    def compare_examples(
        self, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
    ) -> list[ExampleDifference]:
        """Return BLEU and chrF++ differences by paired bootstrap resampling."""
        from apps.nlp.text.significance import compare_sentences

        return compare_sentences(first, second, self.module.bleu_tokenizers)


COMPARISON = TranslationComparison
