"""What a comparison says of the translations of two systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.equal_cost.comparable import ExampleDifference
from apps.nlp.text.significance import text_differences


def compare_sentences(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    tokenizers: Mapping[str, str],
) -> list[ExampleDifference]:
    """Return the paired bootstrap of two tests as ``Translator.examples_of_test`` saves them: BLEU, then chrF++.

    With several pairs the mean over the pairs comes first, then each pair.

    Args:
        first, second: the examples of each test.
        tokenizers: BLEU's tokenizer for each language pair.

    Raises:
        ValueError: they are not of the same sentences.
    """
    if [(e["index"], e["reference"]) for e in first] != [(e["index"], e["reference"]) for e in second]:
        raise ValueError("the two tests are not of the same sentences")
    names = [pair for pair in tokenizers if any(e["pair"] == pair for e in first)]
    parts: list[list[ExampleDifference]] = []
    for name in (None, *(names if len(names) > 1 else ())):
        own = [i for i, e in enumerate(first) if name in (None, e["pair"])]
        differences = text_differences(
            [first[i]["hypothesis"] for i in own],
            [second[i]["hypothesis"] for i in own],
            [first[i]["reference"] for i in own],
            tokenizers,
            [first[i]["pair"] for i in own],
            of="" if len(names) < 2 else ", mean of the pairs" if name is None else f" {name}",
            is_part=bool(name),
        )
        parts.append(differences)
    # All of one score together.
    return [difference for of_score in zip(*parts, strict=True) for difference in of_score]
