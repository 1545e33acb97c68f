"""The demo page of a recommender on tables: a row, the prediction of each task, and the weights of the gates."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from apps.base.messages import excerpt, some
from apps.recsys.encoding.features import CategoricalFeature, SequenceFeature
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.kinds import Kind, Outputs
from apps.recsys.schema import timestamp_columns
from apps.recsys.tables.gating import Gate, GateReader
from apps.recsys.tables.scoring import encoding_of
from apps.report.exhibit import Answer, Bars, ChoiceField, Example, Exhibit, Field, Gates, NumberField, TextField
from apps.report.page import Table

_NAMED = 3
"""Columns that name a row among the examples."""


def exhibit(model: Any, data: Any, most: int) -> Exhibit:
    """Return what the page of a ``MultiTaskRecommender`` has; see ``apps.report.exhibit``.

    Raises:
        ValueError: the model reads columns of vectors, for which a page has no field.
    """
    encoding = Encoding.from_state(encoding_of(model))
    if vectors := [vector.name for vector in model.features.vectors if vector.name not in encoding.texts]:
        raise ValueError(f"the model reads columns of vectors ({some(vectors)}), for which a page has no field")
    columns = list(encoding.roles)
    vocabularies = {column: vocabulary.texts() for column, vocabulary in encoding.vocabularies.items()}
    fields = fields_of(encoding, vocabularies)

    def answer(values: Sequence[Any]) -> Answer:
        row = dict(zip(columns, values, strict=True))
        for column in row.keys() & vocabularies.keys():
            check_known(column, row[column], vocabularies[column], encoding.separator)
        reader = GateReader(model)
        with reader.reading():
            scores = model.predict({column: [value] for column, value in row.items()})
        return Answer(_parts(scores, encoding.features.tasks), _layers(reader.gates()))

    about = (
        f"Fill in a row: the model predicts {', '.join(encoding.features.tasks)}, and shows the weight that each gate "
        "gives each expert. An empty field is a missing value."
    )
    examples = () if data is None else _examples(data, encoding, vocabularies, model.outputs, most)
    return Exhibit(about, "Predict", tuple(fields.values()), answer, examples)


def _parts(scores: Mapping[str, Any], tasks: Sequence[str]) -> tuple[Bars | Table, ...]:
    """Return the probabilities of binary tasks as bars, and the values of the others as a table."""
    shares, values = [], []
    for task in tasks:
        probability = scores[f"probability_{task}"][0] if f"probability_{task}" in scores else None
        if f"value_{task}" not in scores:
            assert probability is not None
            shares.append((task, float(probability)))
        elif probability is None:
            values.append((task, f"{float(scores[f'value_{task}'][0]):.4g}"))
        else:
            values.append((task, f"{scores[f'value_{task}'][0]} ({100 * float(probability):.1f} %)"))
    bars = (Bars("Probability of each task", tuple(shares)),) if shares else ()
    return (*bars, *((Table("Predictions", ("task", "value"), tuple(values)),) if values else ()))


def fields_of(encoding: Encoding, vocabularies: Mapping[str, Sequence[str]]) -> dict[str, Field]:
    """Return a field for each column that a row must have; one value of each is filled in."""
    fields: dict[str, Field] = {}
    if encoding.domain is not None and encoding.domains is not None:
        domains = encoding.domains.texts()
        fields[encoding.domain] = ChoiceField(encoding.domain, domains, domains[0])
    for feature in encoding.features.categorical:
        fields.setdefault(feature.name, _categorical(feature, vocabularies.get(feature.name), encoding.separator))
    for sequence in encoding.features.sequences:
        says = f"{sequence.name} (the oldest first, with {encoding.separator} between)"
        fields[sequence.name] = TextField(says, lines=1, may_be_empty=True)
    for text in encoding.texts:
        fields[text] = TextField(text, lines=2, may_be_empty=True)
    for time in encoding.timestamps:
        fields[time] = TextField(f"{time} (such as 2024-05-31 12:00, UTC)", lines=1, may_be_empty=True)
    for column in encoding.features.continuous:
        middle = column.quantiles[len(column.quantiles) // 2] if column.quantiles else column.mean
        fields[column.name] = NumberField(column.name, middle, may_be_empty=True)
    return {column: fields[column] for column in encoding.roles}


def _categorical(feature: CategoricalFeature, known: Sequence[str] | None, separator: str) -> Field:
    name = feature.name
    if feature.multi_valued:
        return TextField(f"{name} (several, with {separator} between)", lines=1, may_be_empty=True)
    if known is not None:
        return ChoiceField(name, tuple(known), known[0] if known else None, may_be_empty=True)
    if feature.hashed:
        return TextField(name, lines=1, may_be_empty=True)
    return NumberField(name, 1, may_be_empty=True, whole=True, least=1, most=feature.num_rows - 1)


def check_known(column: str, value: Any, known: Sequence[str], separator: str) -> None:
    """Refuse one of several values that the model does not know; a field of one value has looked at it."""
    for own in str(value or "").split(separator) if isinstance(value, str) else ():
        if own and own not in known and value not in known:
            raise ValueError(f"{column}: {excerpt(own)} is none of the {len(known):,} values that the model knows")


def _layers(gates: Sequence[Gate]) -> dict[str, tuple[Gates, ...]]:
    """Return the gates of each block."""
    layers: dict[str, tuple[Gates, ...]] = {}
    for gate in gates:
        part = Gates("", (gate.label,), gate.expert_labels, gate.weights_NE[:1])
        layers[gate.block or "gates"] = (*layers.get(gate.block or "gates", ()), part)
    return {block: _joined(parts) for block, parts in layers.items()}


def _joined(parts: Sequence[Gates]) -> tuple[Gates, ...]:
    """Return the gates of a block as one table, an expert a column, NaN where a gate does not reach one."""
    experts = tuple(dict.fromkeys(expert for part in parts for expert in part.experts))
    weights = np.full((len(parts), len(experts)), math.nan)
    for row, part in zip(weights, parts, strict=True):
        row[[experts.index(expert) for expert in part.experts]] = part.weights[0]
    gates = tuple(part.gates[0] for part in parts)
    return (Gates("Weight of each expert in each task's gate", gates, experts, weights),)


# ---- examples


def _examples(
    data: Any, encoding: Encoding, vocabularies: Mapping[str, Sequence[str]], outputs: Outputs, most: int
) -> tuple[Example, ...]:
    """Return validation rows, or test rows where there are none, at equal steps, as they stand in the table."""
    split = "val" if len(data.opened["val"]) else "test"
    rows = data.rows(split)
    places = range(0, len(rows), max(1, len(rows) // most))[:most]
    batch = rows.__getitems__(list(places))
    columns: dict[str, list[str]] = {}
    features: tuple[CategoricalFeature | SequenceFeature, ...] = encoding.features.categorical
    for feature in (*features, *encoding.features.sequences):
        jagged = (batch.sequences if isinstance(feature, SequenceFeature) else batch.sparse)[feature.name]
        ids_by_row = np.split(jagged.values().numpy(), np.cumsum(jagged.lengths().numpy())[:-1])
        known = None if feature.hashed else vocabularies.get(getattr(feature, "items", None) or feature.name)
        columns[feature.name] = [
            "" if feature.hashed else encoding.separator.join(_value(int(i), known) for i in ids if i)
            for ids in ids_by_row
        ]
    for column, values_B in zip(encoding.features.continuous, batch.dense_BC.numpy().T, strict=True):
        columns[column.name] = [np.format_float_positional(v, trim="-") if np.isfinite(v) else "" for v in values_B]
    columns |= {text: [""] * len(places) for text in encoding.texts}  # a table keeps their vectors alone
    for time in encoding.timestamps:
        hours, _, days = (columns.get(part, [""] * len(places)) for part in timestamp_columns(time))
        columns[time] = [_moment(float(day), hour) if day else "" for day, hour in zip(days, hours, strict=True)]
    if encoding.domain is not None and encoding.domains is not None:
        domains = encoding.domains.texts()
        columns[encoding.domain] = [domains[d] for d in batch.domain_B.tolist()]
    examples = []
    for number in range(len(places)):
        row = {column: columns[column][number] for column in encoding.roles}
        named = [f"{column} {value}" for column, value in row.items() if value][:_NAMED]
        labels = zip(encoding.features.tasks, outputs.kinds, batch.label_Bt[number, :, None], strict=True)
        true = [f"{task} {_label(kind, label)}" for task, kind, label in labels if not label.isnan()]
        examples.append(Example(f"{', '.join(named)} (in truth {', '.join(true)})", tuple(row.values())))
    return tuple(examples)


def _label(kind: Kind, label_1: Tensor) -> str:
    (value,) = kind.label_values(label_1)
    if kind.target.kind == "binary":
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.4g}"


def _moment(days: float, hour: str) -> str:
    """Return days since 1970 as a time of an hour of the day, if it is known; float32 is right to about 3 minutes."""
    minutes = round(1440 * days)
    if hour:
        first = 60 * (24 * round((24 * days - float(hour) - 0.5) / 24) + int(hour))
        minutes = min(max(minutes, first), first + 59)
    return (datetime.datetime(1970, 1, 1) + datetime.timedelta(minutes=minutes)).isoformat(" ", "minutes")


def _value(row: int, known: Sequence[str] | None) -> str:
    """Return the value of a row of a column's table; row 0 is for missing and unseen ones."""
    return str(row) if known is None else known[row - 1]
