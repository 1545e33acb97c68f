"""The demo page of a next-item model: a history, the items that may follow it, and the experts of its items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import core
from apps.recsys.sequence.histories import Items
from apps.recsys.tables.scoring import encoding_of
from apps.report.exhibit import Answer, Example, Exhibit, ItemsField, words_by_layer
from apps.report.page import Table

_LONGEST = 200
"""Items of a history at most."""
_SHOWN = 6
"""Last items of a history that is an example."""


def exhibit(model: Any, data: Any, most: int) -> Exhibit:
    """Return what the page of a ``NextItemRecommender`` has; see ``apps.report.exhibit``."""
    items = Items.from_state(encoding_of(model))
    names = _different(items)
    name_of = dict(zip(items.values[1:], names, strict=True))
    examples = () if data is None else _examples(data, names, most)
    first = examples[0].values[0] if examples else list(names[:2])
    field = ItemsField("History, the oldest first", names, items.values[1:], tuple(first), _LONGEST)

    def answer(values: Sequence[Any]) -> Answer:
        (history,) = values
        with core.record(model.model) as tape:
            (best,) = model.predict([history], top=model.top_k, include_seen=not model.exclude_seen)
        rows = tuple((f"{place}. {name_of[item]}", f"{score:.2f}") for place, (item, score) in enumerate(best, 1))
        words = [(name_of[item],) for item in history[-model.max_length :]]
        layers = words_by_layer(tape.entries, words, "Items of the history, the oldest first", "items")
        return Answer((Table("Next items, the likeliest first", ("item", "score"), rows),), layers)

    about = (
        f"Choose items, the oldest first: the model says which of its {model.num_items:,} items follow, and which "
        "experts took each item of the history."
    )
    return Exhibit(about, "Recommend", (field,), answer, examples)


def _different(items: Items) -> tuple[str, ...]:
    """Return the items' names, with the value beside a name that several have."""
    count = Counter(items.names[1:])
    both = zip(items.names[1:], items.values[1:], strict=True)
    return tuple(name if count[name] == 1 else f"{name} ({value})" for name, value in both)


def _examples(data: Any, names: Sequence[str], most: int) -> tuple[Example, ...]:
    """Return the ends of some users' histories, the item to be validated left out."""
    histories = data.examples("val")
    users = range(0, len(histories), max(1, len(histories) // most))[:most]
    examples = []
    for row in histories.__getitems__(list(users)).items_BS.tolist():
        history = list(dict.fromkeys(names[i - 1] for i in row if i))[-_SHOWN:]
        examples.append(Example(", ".join(history), (history,)))
    return tuple(examples)
