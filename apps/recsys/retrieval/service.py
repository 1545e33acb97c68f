"""A retriever behind a URL: a user's columns in, the best items of the catalogue out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.retrieval.catalogue import Catalogue
from apps.recsys.retrieval.columns import encoding_of_part, names_of
from apps.recsys.tables.json_rows import row_reader, row_schema, table_of
from apps.recsys.tables.scoring import encoding_of
from apps.train.answering import Service

_TOP = 10
"""Items of a user, as ``TwoTowerRetriever.predict`` has them."""


def service(model: Any) -> Service:
    """Return the service of a ``TwoTowerRetriever``; the items' vectors are made once, here.

    Raises:
        ValueError: the model has no encoding.
    """
    state = encoding_of(model)
    encoding = encoding_of_part(Encoding.from_state(state), names_of(model.user_features))
    index, item_column = model.index(), state["item_column"]

    def predict(users: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        best = model.predict(table_of(users, encoding), top=_TOP, index=index)
        answers: list[dict[str, Any]] = [{"items": []} for _ in users]
        for row, item, score in zip(*(best[c].to_pylist() for c in ("row", item_column, "score")), strict=True):
            answers[row]["items"].append({"item": item, "score": score})
        return answers

    says = f"A user: the answer is the best of {len(Catalogue.from_state(state['catalogue'])):,} items."
    properties = {
        "item": {"type": ["integer", "string"]},
        "score": {"type": "number", "description": "The product of the two vectors."},
    }
    row = {"type": "object", "required": list(properties), "properties": properties}
    answer = {
        "title": "Items",
        "type": "object",
        "required": ["items"],
        "properties": {"items": {"type": "array", "items": row, "description": "The best first."}},
    }
    return Service(row_schema(encoding, "User", says), answer, row_reader(encoding), predict)
