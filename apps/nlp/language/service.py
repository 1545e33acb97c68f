"""A language model behind a URL: the beginning of a text in, the text with what follows out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.task import Service

_LONGEST = 10_000
"""Characters of a beginning at most; what the model reads is counted in subwords."""
_MOST_READ, _MOST_WRITTEN = 1_024, 256


def service(model: Any) -> Service:
    """Return the service of a ``LanguageModeler``. Beginnings are continued one by one: a decoder has no padding."""
    learned = model.transformer.positions == "learned"
    most = min(_MOST_READ, model.transformer.max_length - 1) if learned else _MOST_READ
    draws = model.decode.method == "sample"

    def read(item: Mapping[str, Any]) -> Mapping[str, Any]:
        ids = len(model.subwords.encode([item["text"]], "target")[0]) + 1
        if ids > most:
            raise ValueError(f"text has {ids} subwords with its mark: at most {most} are read")
        return item

    def predict(inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        answers = []
        for one in inputs:
            options: dict[str, Any] = {"seed": one["seed"]} if "seed" in one else {}
            length = one.get("subwords", min(_MOST_WRITTEN, model.decode.max_length(1)))
            options |= {"max_length_ratio": 0.0, "max_length_extra": length}
            answers.append({"text": model.predict([one["text"]], **options)[0]})
        return answers

    subwords = {"type": "integer", "minimum": 1, "maximum": _MOST_WRITTEN}
    properties: dict[str, Any] = {
        "text": {"type": "string", "maxLength": _LONGEST},
        "subwords": {**subwords, "description": "Subwords to write, at most."},
    }
    if draws:
        properties["seed"] = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1, "default": model.decode.seed}
    item = {
        "title": "Beginning",
        "description": "The beginning of a text: the answer is the text with what follows.",
        "type": "object",
        "required": ["text"],
        "properties": properties,
        "additionalProperties": False,
        "examples": [{"text": "And the king", "subwords": 24}],
    }
    text = {"type": "string", "description": "The beginning and what follows it."}
    answer = {"title": "Text", "type": "object", "required": ["text"], "properties": {"text": text}}
    return Service(item, answer, read, predict)
