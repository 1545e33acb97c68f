"""The demo page of a retriever: a user's columns, the items that are retrieved, and the experts of both towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import core
from apps.base.messages import some
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.retrieval.catalogue import Catalogue
from apps.recsys.retrieval.columns import encoding_of_part, names_of, raw_columns
from apps.recsys.retrieval.report import tower_label
from apps.recsys.tables.exhibit import check_known, fields_of
from apps.recsys.tables.scoring import encoding_of
from apps.report.exhibit import Answer, Example, Exhibit, Pieces, expert_names
from apps.report.page import Table
from apps.report.routed import experts_of_token

_MOST_EXPERTS = 2
"""Experts of a row that are shown."""


def exhibit(model: Any, data: Any, most: int) -> Exhibit:
    """Return what the page of a ``TwoTowerRetriever`` has; see ``apps.report.exhibit``.

    Raises:
        ValueError: the users' tower reads columns of vectors, for which a page has no field.
    """
    if model.user_features.vectors:
        names = some([vector.name for vector in model.user_features.vectors])
        raise ValueError(f"the users' tower reads columns of vectors ({names}), for which a page has no field")
    state = encoding_of(model)
    whole, catalogue = Encoding.from_state(state), Catalogue.from_state(state["catalogue"])
    encoding = encoding_of_part(whole, names_of(model.user_features))
    columns = list(encoding.roles)
    vocabularies = {column: vocabulary.texts() for column, vocabulary in encoding.vocabularies.items()}
    place_of = {item: place for place, item in enumerate(whole.vocabularies[state["item_column"]].texts())}
    items = catalogue.rows(model.item_features)

    def answer(values: Sequence[Any]) -> Answer:
        row = dict(zip(columns, values, strict=True))
        for column in row.keys() & vocabularies.keys():
            check_known(column, row[column], vocabularies[column], encoding.separator)
        with core.record(model.user_tower) as of_user:
            best = model.predict({column: [value] for column, value in row.items()}, top=model.top_k)
        names = [str(item) for item in best[state["item_column"]]]
        with core.record(model.item_tower) as of_items:
            model.item_tower(items.__getitems__([place_of[name] for name in names]).to(model.device))
        rows = tuple(
            (f"{n}. {name}", f"{score:.3f}")
            for n, (name, score) in enumerate(zip(names, best["score"], strict=True), 1)
        )
        layers = {
            **_layers(of_user, "user_tower", ["the user"], "The user"),
            **_layers(of_items, "item_tower", names, "The retrieved items, the best first"),
        }
        return Answer((Table("Retrieved items, the best first", ("item", "product"), rows),), layers)

    about = (
        f"Fill in a user: the model retrieves the best of its {len(catalogue):,} items, and shows which experts took "
        "the user and the items. An empty field is a missing value."
    )
    fields = tuple(fields_of(encoding, vocabularies).values())
    return Exhibit(about, "Retrieve", fields, answer, () if data is None else _examples(data, encoding, most))


def _layers(tape: core.Tape, tower: str, names: Sequence[str], title: str) -> Mapping[str, tuple[Pieces, ...]]:
    """Return the experts of rows by layer of a tower, from the pass of these rows."""
    layers = {}
    for entry in tape.entries:
        if entry.routing.num_tokens == len(names):
            experts_TK = experts_of_token(entry.routing, _MOST_EXPERTS).cpu().numpy()
            words = Pieces(title, tuple((name,) for name in names), experts_TK, expert_names(entry.routing), "rows")
            layers[tower_label(f"{tower}.{entry.name}")] = (words,)
    return layers


def _examples(data: Any, encoding: Encoding, most: int) -> tuple[Example, ...]:
    """Return the users of some pairs of the validation, or of the test where there are none, at equal steps."""
    pairs = data.examples("val")
    pairs = pairs if len(pairs) else data.examples("test")
    if not len(pairs):
        return ()
    places = range(0, len(pairs), max(1, len(pairs) // most))[:most]
    examples = []
    for row in raw_columns(pairs.__getitems__(list(places)).user, encoding).to_pylist():
        texts = {column: _text(row[column], encoding.separator) for column in encoding.roles}
        label = ", ".join(f"{column} {text}" for column, text in texts.items() if text)
        examples.append(Example(label, tuple(texts.values())))
    return tuple(examples)


def _text(value: Any, separator: str) -> str:
    """Return a value of a table as it is typed into a field."""
    if isinstance(value, list):
        return separator.join(str(own) for own in value if own is not None)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
