"""A next-item model behind a URL: a history in, the items that may follow it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.recsys.sequence.histories import Items
from apps.recsys.tables.scoring import encoding_of
from apps.task import Service

_TOP, _MOST_TOP = 10, 100
_MOST_ITEMS = 1_000
"""Items of a history at most, of which a model reads the last ones."""


def service(model: Any) -> Service:
    """Return the service of a ``NextItemRecommender``.

    Raises:
        ValueError: the model has no encoding.
    """
    items = Items.from_state(encoding_of(model))
    has_names = items.names != items.values

    def predict(inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        histories = [[str(item) for item in one["history"]] for one in inputs]
        tops = [one.get("top", _TOP) for one in inputs]
        answers = []
        for history, top, best in zip(histories, tops, model.predict(histories, top=max(tops)), strict=True):
            rows = [{"item": item, "score": score} for item, score in best[:top]]
            if has_names:
                rows = [{**row, "name": items.names[items.ids[row["item"]]]} for row in rows]
            answers.append({"items": rows, "unknown": sum(item.strip() not in items.ids for item in history)})
        return answers

    def read(item: Mapping[str, Any]) -> Mapping[str, Any]:
        for place, own in enumerate(item["history"]):
            if not str(own).strip():
                raise ValueError(f"history[{place}] is empty")
        return item

    value = {"type": ["string", "integer"], "maxLength": 1_000, "pattern": r"\S"}
    history = {"type": "array", "items": value, "minItems": 1, "maxItems": _MOST_ITEMS}
    known = f"The oldest first. The model knows {model.num_items:,} items, and leaves others out."
    item = {
        "title": "History",
        "description": "The items of a user: the answer is those that may follow, none of the history among them.",
        "type": "object",
        "required": ["history"],
        "properties": {
            "history": {**history, "description": known},
            "top": {"type": "integer", "minimum": 1, "maximum": _MOST_TOP, "default": _TOP, "description": "Items."},
        },
        "additionalProperties": False,
        "examples": [{"history": list(items.values[1:3])}],
    }
    return Service(item, _answer(has_names), read, predict)


def _answer(has_names: bool) -> dict[str, Any]:
    properties = {"item": {"type": "string"}, "score": {"type": "number", "description": "The logit."}}
    properties |= {"name": {"type": "string"}} if has_names else {}
    row = {"type": "object", "required": list(properties), "properties": properties}
    unknown = {"type": "integer", "minimum": 0, "description": "Items of the history that the model does not know."}
    return {
        "title": "Next items",
        "type": "object",
        "required": ["items", "unknown"],
        "properties": {"items": {"type": "array", "items": row, "description": "The best first."}, "unknown": unknown},
    }
