"""A translator behind a URL: a sentence in, its translation out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.train.answering import Service

_LONGEST = 10_000
"""Characters of a sentence at most; what the model reads is counted in subwords."""


def service(model: Any) -> Service:
    """Return the service of a ``Translator``."""
    several, longest = len(model.pairs) > 1, model.longest_source

    def read(item: Mapping[str, Any]) -> tuple[str, str]:
        text = item["text"]
        ids = len(model.subwords.encode([text], "source")[0]) + 1 + bool(model.subwords.languages)
        if ids > longest:
            raise ValueError(f"text has {ids} subwords with its marks: the model reads at most {longest}")
        return text, item.get("pair", model.pairs[0])

    def predict(inputs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [{} for _ in inputs]
        for places in _together(inputs, alone=model.decode.method == "sample"):
            texts = [inputs[place][0] for place in places]
            for place, text in zip(places, model.predict(texts, inputs[places[0]][1]), strict=True):
                answers[place] = {"text": text}
        return answers

    pair = {"enum": list(model.pairs), "description": "The language of the sentence, and that of the translation."}
    item = {
        "title": "Sentence",
        "description": f"A sentence: the answer is its translation ({', '.join(model.pairs)}).",
        "type": "object",
        "required": ["text", "pair"] if several else ["text"],
        "properties": {"text": {"type": "string", "maxLength": _LONGEST}, "pair": pair},
        "additionalProperties": False,
        "examples": [{"text": "Good morning.", "pair": model.pairs[0]}],
    }
    text = {"type": "string"}
    answer = {"title": "Translation", "type": "object", "required": ["text"], "properties": {"text": text}}
    return Service(item, answer, read, predict)


def _together(inputs: Sequence[tuple[str, str]], alone: bool) -> list[list[int]]:
    """Return the places of the inputs of each pair of languages.

    Args:
        inputs: sentences with their pairs.
        alone: each by itself: draws depend on a sentence's number, whatever others are beside it.
    """
    if alone:
        return [[place] for place in range(len(inputs))]
    groups: dict[str, list[int]] = {}
    for place, (_, pair) in enumerate(inputs):
        groups.setdefault(pair, []).append(place)
    return list(groups.values())
