"""A retriever in use: a user's columns in, the best items of the catalog and the experts of both towers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import core
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.retrieval import export
from apps.recsys.retrieval.catalog import Catalog
from apps.recsys.retrieval.columns import encoding_of_part, names_of
from apps.recsys.row import RowTask
from apps.recsys.tables.rows.scoring import encoding_of
from apps.recsys.tables.sizes import columns_of, read_on_meta
from apps.report.exhibit import Example, LayerPart, Part
from apps.report.page import Table
from apps.task import Loss, Missing, Output, Sizes, Trial, words_by_layer
from apps.task.outputs import properties
from apps.train.publish.exporting import Exported

_TOP = 10
"""Items of a request's user, as ``TwoTowerRetriever.predict`` has them."""

Best = list[tuple[Any, float]]
"""Items with the products of their vectors and the user's, the best first."""


def retrieved(shown: int) -> Output:
    """Return the best items; an answer is ``Best``, of which a page shows so many."""
    row = {
        "item": {"type": ["integer", "string"]},
        "score": {"type": "number", "description": "The product of the two vectors."},
    }
    items = {"type": "array", "items": {"type": "object", "required": list(row), "properties": row}}

    def to_parts(answer: Best) -> tuple[Part, ...]:
        rows = tuple((f"{n}. {item}", f"{score:.3f}") for n, (item, score) in enumerate(answer[:shown], 1))
        return (Table("Retrieved items, the best first", ("item", "product"), rows),)

    return Output(
        properties("Items", items={**items, "description": "The best first."}),
        lambda answer: {"items": [{"item": item, "score": score} for item, score in answer]},
        to_parts,
    )


class Retrieval(RowTask):
    """The use of a ``TwoTowerRetriever``; the items' vectors are made once, with the task."""

    app, noun, verb = "retrieval", "User", "Retrieve"
    columns = ("tables", "numbers", "histories", "item_tables", "item_numbers")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.state = encoding_of(model)
        self.whole = Encoding.from_state(self.state)
        self.encoding = encoding_of_part(self.whole, names_of(model.user_features))
        self.catalog, self.output = Catalog.from_state(self.state["catalogue"]), retrieved(_TOP)

    @property
    def description(self) -> str:
        return (
            f"A user: the answer is the best of {len(self.catalog):,} items. Each column may be null, but for that "
            "of a domain; others are left out."
        )

    @property
    def instructions(self) -> str:
        return (
            f"Fill in a user: the model retrieves the best of its {len(self.catalog):,} items, and shows which "
            "experts took the user and the items. An empty field is a missing value."
        )

    def answers(self, examples: Sequence[Mapping[str, Any]], most: int = 1) -> list[Best]:
        best = self.model.predict(self.row.table(examples), top=_TOP, index=self.model.index())
        answers: list[Best] = [[] for _ in examples]
        columns = (best[name].to_pylist() for name in ("row", self.state["item_column"], "score"))
        for row, item, score in zip(*columns, strict=True):
            answers[row].append((item, score))
        return answers

    def exhibit(self, data: Any, most: int) -> Any:
        self.model.index()  # its passes do not count as an answer's
        return super().exhibit(data, most)

    @torch.no_grad()
    def layers(self, tape: core.Tape, example: Any, answer: Best) -> Mapping[str, tuple[LayerPart, ...]]:
        names = [str(item) for item, _ in answer]
        values = self.whole.vocabularies[self.state["item_column"]].texts()
        rows = self.catalog.rows(self.model.item_features)
        with core.record(self.model) as of_items:
            self.model.item_tower(rows.__getitems__([values.index(name) for name in names]).to(self.model.device))
        users = words_by_layer(tape.entries, [["the user"]], "The user", "rows")
        items = [[name] for name in names]
        return {**users, **words_by_layer(of_items.entries, items, "The retrieved items, the best first", "rows")}

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        """Return the users of some pairs of the validation, or of the test if there are none, at equal steps."""
        pairs = data.examples("val")
        pairs = pairs if len(pairs) else data.examples("test")
        if not len(pairs):
            return ()
        places = range(0, len(pairs), max(1, len(pairs) // most))[:most]
        rows = self.row.shown(pairs.__getitems__(list(places)).user)
        label = [", ".join(f"{column} {text}" for column, text in row.items() if text) for row in rows]
        return tuple(Example(own, tuple(row.values())) for own, row in zip(label, rows, strict=True))

    def exported(self) -> Exported:
        return export.export(self.model)

    # ---- without a trained model

    @classmethod
    def attach(cls, model: Any, graphs: Mapping[str, Any]) -> None:
        export.attach(model, graphs)

    @classmethod
    def encoding_state(cls, exported: Any) -> dict[str, Any]:
        return export.encoding_state(exported)

    @classmethod
    def data_arguments(cls, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """Return the columns of both towers, but for those that are given."""
        if "num_items" not in given:
            raise Missing("the number of items comes from the data: give --model.num_items N")
        arguments = {}
        for side, prefix in (("user", ""), ("item", "item_")):
            tables, numbers = f"{prefix}tables", f"{prefix}numbers"
            if f"{side}_features" in given:
                continue
            if not sizes.columns[tables] and not sizes.columns[numbers]:
                flags = f"--{tables} ROWS ..., and --{numbers} N"
                raise Missing(f"the columns of the {side}s' tower come from the data: give {flags}")
            histories = () if prefix else sizes.columns["histories"]
            arguments[f"{side}_features"] = columns_of(sizes, tables, numbers, histories)
        return arguments

    @classmethod
    def tokens(cls, model: Any, entry: Any, batch: Any) -> Mapping[str, Tensor]:
        """Return the number of each row of the items' tower, whose batch are the numbers of the items."""
        return {"item": batch} if entry.name.startswith("item_tower") else {}

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        """Return a forward of both towers, of as many items as pairs, all of them different, and further negatives.

        The tables' all-to-all counts as many rows of items as of users.
        """
        batch = sizes.examples()
        items, dim = batch + int(sizes.option("num_uniform") or 0), model.tower.dim
        sides = ((model.user_tower, model.user_features, batch), (model.item_tower, model.item_features, items))

        def run() -> Any:
            return [tower.compute(*read_on_meta(tower, features, rows, dtype)) for tower, features, rows in sides]

        numbers = (model.num_items + 1) * dim  # the first vector belongs to no item
        remark = (
            f"exact search among {model.num_items:,} items: {4e-9 * numbers:.3g} GB, {2 * numbers:.3g} FLOPs a user"
        )
        return Trial(run, batch, batch, _sampled_loss(batch, items, dim), "pairs", remark)


def _sampled_loss(batch: int, items: int, dim: int) -> Loss:
    """Return the cost of the softmax over the items of a batch, in float32 whatever the precision.

    It keeps its logarithms and both factors of the dot products. In addition there are the logits, before and after
    their correction, or in the backward two gradients of their size.
    """
    scores = batch * items
    return Loss(4.0 * (scores + (batch + items) * dim), 2 * 4.0 * scores, 2.0 * scores * dim)


TASK = Retrieval
