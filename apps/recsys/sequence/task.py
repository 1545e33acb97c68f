"""A next-item model in use: a history in, the items that may follow it and the experts of its items out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import core
from apps.recsys.sequence.histories import Items
from apps.recsys.tables.rows.scoring import encoding_of
from apps.report.exhibit import Example, Exhibit, ItemsField, LayerPart, Part
from apps.report.page import Table
from apps.task import Input, Missing, Output, Sizes, Task, Trial, ids_on_meta, number, vocabulary_loss, words_by_layer
from apps.task.outputs import properties
from apps.train.publish.exporting import Exported, Graph

_TOP, _MOST_TOP = 10, 100
_MOST_ITEMS, _MOST_SHOWN = 1_000, 200
"""Items of a history at most, in a request and on a page; a model reads the last ones."""
_LAST = 6
"""Last items of a history that is an example."""


class Following(NamedTuple):
    """The items that may follow a history.

    Attributes:
        best: items with their logits, the best first.
        unknown: number of the history's items that the model does not know.
    """

    best: list[tuple[str, float]]
    unknown: int


class NextItem(Task):
    """The use of a ``NextItemRecommender``."""

    app, noun, verb = "histories", "History", "Recommend"
    description = "The items of a user: the answer is those that may follow, none of the history among them."

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.state = encoding_of(model)
        self.items = Items.from_state(self.state)
        self.names = different_names(self.items)
        self.name_of = dict(zip(self.items.values[1:], self.names, strict=True))
        says = f"The oldest first. The model knows {model.num_items:,} items, and leaves others out."
        value = {"type": ["string", "integer"], "maxLength": 1_000, "pattern": r"\S"}
        schema = {"type": "array", "items": value, "minItems": 1, "maxItems": _MOST_ITEMS, "description": says}
        label, values = "History, the oldest first", self.items.values[1:]
        field = ItemsField(label, self.names, values, self.names[:2], _MOST_SHOWN)
        self.inputs = {
            "history": Input(schema, list(values[:2]), _sent, field),
            "top": number(None, _TOP, _TOP, 1, _MOST_TOP, "Items.", in_example=False),
        }
        self.output = self._next_items()

    @property
    def instructions(self) -> str:
        return (
            f"Choose items, the oldest first: the model says which of its {self.model.num_items:,} items follow, and "
            "which experts took each item of the history."
        )

    @property
    def page_values(self) -> Mapping[str, Any]:
        """A page shows what ``moesaic predict`` does, a request names the values that the history lacks."""
        return {"top": self.model.top_k, "include_seen": not self.model.exclude_seen}

    def _next_items(self) -> Output:
        has_names = self.items.names != self.items.values
        of_item = {"item": {"type": "string"}, "score": {"type": "number", "description": "The logit."}}
        of_item |= {"name": {"type": "string"}} if has_names else {}
        row = {"type": "object", "required": list(of_item), "properties": of_item}

        def to_json(answer: Following) -> dict[str, Any]:
            rows: list[dict[str, Any]] = [{"item": item, "score": score} for item, score in answer.best]
            for own in rows if has_names else ():
                own["name"] = self.items.names[self.items.ids[own["item"]]]
            return {"items": rows, "unknown": answer.unknown}

        def to_parts(answer: Following) -> tuple[Part, ...]:
            rows = ((f"{n}. {self.name_of[item]}", f"{score:.2f}") for n, (item, score) in enumerate(answer.best, 1))
            return (Table("Next items, the likeliest first", ("item", "score"), tuple(rows)),)

        says = "Items of the history that the model does not know."
        schema = properties(
            "Next items",
            items={"type": "array", "items": row, "description": "The best first."},
            unknown={"type": "integer", "minimum": 0, "description": says},
        )
        return Output(schema, to_json, to_parts)

    def answers(self, examples: Sequence[Mapping[str, Any]], most: int = 1) -> list[Following]:
        histories, tops = ([example[name] for example in examples] for name in ("history", "top"))
        include_seen = any(example.get("include_seen", False) for example in examples)
        found = self.model.predict(histories, top=max(tops), include_seen=include_seen)
        return [
            Following(best[:top], sum(item.strip() not in self.items.ids for item in history))
            for history, top, best in zip(histories, tops, found, strict=True)
        ]

    def layers(self, tape: core.Tape, example: Any, answer: Any) -> Mapping[str, tuple[LayerPart, ...]]:
        words = [(self.name_of[item],) for item in example["history"][-self.model.max_length :]]
        return words_by_layer(tape.entries, words, "Items of the history, the oldest first", "items")

    def exhibit(self, data: Any, most: int) -> Exhibit:
        page = super().exhibit(data, most)
        begins = [replace(page.fields[0], value=example.values[0]) for example in page.examples[:1]]
        return replace(page, fields=tuple(begins) or page.fields)

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        """Return the ends of some users' histories, the item to be validated left out."""
        histories = data.examples("val")
        users = range(0, len(histories), max(1, len(histories) // most))[:most]
        examples = []
        for row in histories.__getitems__(list(users)).items_BS.tolist():
            history = tuple(dict.fromkeys(self.names[i - 1] for i in row if i))[-_LAST:]
            examples.append(Example(", ".join(history), (history,)))
        return tuple(examples)

    def exported(self) -> Exported:
        """Return one graph from histories to the scores of all items, and the items by id.

        The inputs are "items", int64 (B, S) ids with 0 for padding, and, of a model that reads times, "seconds", int64
        (B, S). The output "scores" (B, num_items + 1) has the score of each item, by its id; with semantic ids -inf for
        items that the beam search does not find.
        """
        model, draw = self.model, torch.Generator().manual_seed(0)
        items_BS = torch.randint(1, model.num_items + 1, (3, min(5, model.max_length)), generator=draw)
        items_BS[1, :2] = 0  # padding may be anywhere, and a history may have no item
        items_BS[2] = 0
        inputs = {"items": items_BS}
        if model.sequence.time_buckets:
            inputs["seconds"] = torch.randint(0, 10**6, items_BS.shape, generator=draw).cumsum(1)
        axes = {name: {0: "batch", 1: "length"} for name in inputs}
        preprocessing = {
            "items": list(self.items.values[1:]),
            "names": list(self.items.names[1:]),
            "columns": dict(self.state.get("columns", {})),
            "min_rating": self.state.get("min_rating"),
            "max_length": model.max_length,
            "exclude_seen": model.exclude_seen,
        }
        return Exported(self.app, (Graph("model", model.model, inputs, ("scores",), axes),), preprocessing)

    # ---- without a trained model

    @classmethod
    def attach(cls, model: Any, graphs: Mapping[str, Any]) -> None:
        model.model = _Histories(graphs["model"])

    @classmethod
    def encoding_state(cls, exported: Any) -> dict[str, Any]:
        known = exported.description.preprocessing
        items = Items(*(("", *known[part]) for part in ("items", "names")))
        return {**items.state(), "columns": dict(known["columns"]), "min_rating": known["min_rating"]}

    @classmethod
    def data_arguments(cls, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        if "num_items" not in given:
            raise Missing("the number of items comes from the data: give --model.num_items N")
        return {} if "max_length" in given else {"max_length": sizes.option("max_length") or 200}

    @classmethod
    def tokens(cls, model: Any, entry: Any, batch: Any) -> Mapping[str, Tensor]:
        """Return the item of each place of a history, and the place counted from the end, 1 for the last item."""
        ids_BS = None if entry.context is None else entry.context.token_ids_BS
        if ids_BS is None or ids_BS.numel() != entry.routing.num_tokens:
            return {}
        back_BS = (ids_BS > 0).sum(1, keepdim=True) - torch.arange(ids_BS.shape[1], device=ids_BS.device)
        return {"item": ids_BS.flatten(), "place from the end": back_BS.clamp(0, model.max_length).flatten()}

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        length = min(sizes.length or model.max_length, model.max_length)
        batch = sizes.examples(length)
        if model.semantic_ids is not None:

            def run() -> Tensor:
                h_TD, *_ = model.model.encode(ids_on_meta(batch, length))
                loss: Tensor = model.model.loss(h_TD, ids_on_meta(batch * length))
                return loss

            return Trial(run, batch, batch * length, unit="items")
        loss = vocabulary_loss(batch * length, model.model.output_weight, dtype)
        return Trial(lambda: model.model.encode(ids_on_meta(batch, length)), batch, batch * length, loss, "items")


def _sent(plain: Sequence[Any], name: str) -> list[str]:
    """Return the items of a request as text."""
    for place, own in enumerate(plain):
        if not str(own).strip():
            raise ValueError(f"{name}[{place}] is empty")
    return [str(own) for own in plain]


def different_names(items: Items) -> tuple[str, ...]:
    """Return the items' names, with the value next to a name that several items share."""
    count = Counter(items.names[1:])
    both = zip(items.names[1:], items.values[1:], strict=True)
    return tuple(name if count[name] == 1 else f"{name} ({value})" for name, value in both)


class _Histories(nn.Module):
    """A graph under the interface of ``HistoryModel``."""

    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, items_BS: Tensor, seconds_BS: Tensor | None = None, seen_BH: Tensor | None = None) -> Tensor:
        """Map histories to scores of the next item."""
        if "seconds" in self.graph.inputs and seconds_BS is None:
            seconds_BS = torch.zeros_like(items_BS)
        scores_BI = self.graph({"items": items_BS, "seconds": seconds_BS})[0]
        return scores_BI if seen_BH is None else scores_BI.scatter(1, seen_BH, -torch.inf)


TASK = NextItem
