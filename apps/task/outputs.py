"""Outputs of a model for one example, in each form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apps.report.exhibit import Bars, Part, Said
from apps.report.page import Table, Text

SHARE = {"type": "number", "minimum": 0, "maximum": 1}
"""JSON schema of a probability."""


@dataclass(frozen=True)
class Output:
    """The form of a model's answers. An *answer* belongs to one example, in plain values.

    Attributes:
        schema: JSON schema of an answer.
        to_json: returns an answer as JSON has it.
        to_parts: returns an answer as a page shows it.
    """

    schema: Mapping[str, Any]
    to_json: Callable[[Any], Any]
    to_parts: Callable[[Any], tuple[Part, ...]]


def properties(title: str, **schemas: Any) -> dict[str, Any]:
    """Return the schema of an answer with these properties."""
    return {"title": title, "type": "object", "required": list(schemas), "properties": schemas}


def classes() -> Output:
    """Return the likeliest classes; an answer is ``top_classes`` of an example."""
    schema = properties(
        "Classes",
        class_name={"type": "string", "description": "The likeliest class."},
        probability={**SHARE, "description": "Its probability, to 6 places."},
        top={"type": "object", "additionalProperties": SHARE, "description": "The likeliest, best first."},
    )

    def to_json(answer: Mapping[str, float]) -> dict[str, Any]:
        name, probability = next(iter(answer.items()))
        return {"class_name": name, "probability": probability, "top": answer}

    return Output(schema, to_json, lambda answer: (Bars("Likeliest classes", tuple(answer.items())),))


def likeliest(logits_BC: Tensor, most: int) -> torch.return_types.topk:
    """Return the probabilities and the labels of the likeliest classes, best first, (B, k) both."""
    return logits_BC.float().softmax(-1).topk(min(most, logits_BC.shape[-1]), dim=-1)


def top_classes(logits_BC: Tensor, names: Sequence[str], most: int) -> list[dict[str, float]]:
    """Return the probabilities of each example's likeliest classes, to 6 places, by name and best first."""
    best = likeliest(logits_BC, most)
    return [
        {names[c]: round(p, 6) for c, p in zip(labels, values, strict=True)}
        for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Written:
    """Texts that a search writes for one example, best first.

    Attributes:
        texts: the candidates.
        scores: their scores.
        ids: the ids of the best one, without the end.
        note: a page's remark on it, such as that the input was cut; "" for nothing.
        title: title on a page; "": as ``texts`` says.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    ids: Sequence[int]
    note: str = ""
    title: str = ""


def texts(title: str, says: str | None, shown: str) -> Output:
    """Return the best texts of a search; an answer is a ``Written``.

    Args:
        title: title of the schema.
        says: description of the text, for the schema.
        shown: title of the best one on a page.
    """
    text = {"type": "string", **({} if says is None else {"description": says})}

    def to_parts(answer: Written) -> tuple[Part, ...]:
        parts: list[Part] = [Said(answer.title or shown, answer.texts[0] or "(an empty text)")]
        parts += [Text.of(answer.note)] if answer.note else []
        rows = tuple((text, f"{own:.3f}") for text, own in zip(answer.texts[1:], answer.scores[1:], strict=True))
        title = f"Further candidates (the score of the best: {answer.scores[0]:.3f})"
        return (*parts, *((Table(title, ("text", "score"), rows),) if rows else ()))

    return Output(properties(title, text=text), lambda answer: {"text": answer.texts[0]}, to_parts)
