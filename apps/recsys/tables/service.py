"""A recommender on tables behind a URL: a row in, the prediction of each task out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.tables.json_rows import row_reader, row_schema, table_of
from apps.recsys.tables.scoring import encoding_of
from apps.train.answering import Service


def service(model: Any) -> Service:
    """Return the service of a ``MultiTaskRecommender``; its answers have the columns of ``predict``.

    Raises:
        ValueError: the model has no encoding.
    """
    encoding = Encoding.from_state(encoding_of(model))
    tasks = encoding.features.tasks

    def predict(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return model.predict(table_of(rows, encoding)).to_pylist()

    item = row_schema(encoding, "Row", f"A row: the answer predicts {', '.join(tasks)}.")
    return Service(item, _answer(model, tasks), row_reader(encoding), predict)


def _answer(model: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the JSON schema of a row's predictions."""
    share = {"type": "number", "minimum": 0, "maximum": 1}
    properties: dict[str, Any] = {}
    for task, kind in zip(tasks, model.outputs.kinds, strict=True):
        target = kind.target
        if target.kind != "binary":
            is_class = target.kind == "multiclass"
            properties[f"value_{task}"] = {"enum": list(target.classes)} if is_class else {"type": "number"}
        if target.kind in ("binary", "multiclass"):
            properties[f"probability_{task}"] = share
    return {"title": "Predictions", "type": "object", "required": list(properties), "properties": properties}
