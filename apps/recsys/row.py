"""The columns of a row as a model's inputs: JSON, fields of a page, tables of arrow's, and back from encoded rows.

A column's value is as in an arrow table of its type: text of a category, a list of texts, a number, a list of numbers;
None if it is missing. ``Row.table`` makes a table of the values of several rows; ``new_rows`` encodes it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.base.messages import excerpt, first_line
from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature, SequenceFeature, VectorFeature
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.schema import timestamp_columns
from apps.report.exhibit import ChoiceField, Field, NumberField, TextField
from apps.task import Input, Task

if TYPE_CHECKING:
    import pyarrow as pa

    from apps.recsys.tables.rows.batch import TableBatch

_LARGEST = 3.4028234663852886e38
"""The largest number of float32."""
_LONGEST, _MOST = 10_000, 1_000
"""Characters of a text, and values of a list, at most."""
_NAMED = 5
"""Values of a column that its description names."""
_NUMBER = {"type": "number", "minimum": -_LARGEST, "maximum": _LARGEST}

TEXT, TEXTS, NUMBER, NUMBERS = "text", "texts", "number", "numbers"
"""Types of a column's values."""


def _no_texts(batch: TableBatch) -> list[str]:
    return [""] * len(batch)


@dataclass(frozen=True)
class Column(Input):
    """A column of a row.

    Attributes:
        type: type of its values: TEXT, TEXTS, NUMBER or NUMBERS.
        shown: returns the values of encoded rows as they are in the field; "" where they are missing, or not kept.
    """

    type: str = TEXT
    shown: Callable[[TableBatch], list[str]] = _no_texts


def _text(plain: Any, name: str = "") -> str | None:
    return None if plain in (None, "") else str(plain)


def _or_null(one: Callable[[Any], Any], several: bool = False) -> Callable[[Any, str], Any]:
    def read(plain: Any, name: str) -> Any:
        return None if plain is None else [one(own) for own in plain] if several else one(plain)

    return read


def domain(domains: Sequence[str], label: str) -> Column:
    """Return the column of the domain."""

    def shown(batch: TableBatch) -> list[str]:
        assert batch.domain_B is not None
        return [domains[d] for d in batch.domain_B.tolist()]

    field = ChoiceField(label, tuple(domains), domains[0])
    return Column({"enum": list(domains), "description": "The domain."}, domains[0], field=field, shown=shown)


def quantity(feature: ContinuousFeature, place: int) -> Column:
    """Return a column of numbers, which is number ``place`` of a batch's."""

    def shown(batch: TableBatch) -> list[str]:
        values_B = batch.dense_BC[:, place].numpy()
        return [np.format_float_positional(v, trim="-") if np.isfinite(v) else "" for v in values_B]

    middle = feature.quantiles[len(feature.quantiles) // 2] if feature.quantiles else feature.mean
    field = NumberField(feature.name, middle, may_be_empty=True)
    schema = {**_NUMBER, "type": ["number", "null"]}
    return Column(schema, middle, _or_null(float), field, type=NUMBER, shown=shown)  # may be larger than an int64


def vector(feature: VectorFeature) -> Column:
    """Return a column of vectors, for which a page has no field."""
    schema = {"type": ["array", "null"], "items": _NUMBER, "minItems": feature.size, "maxItems": feature.size}
    return Column(schema, [0.0] * feature.size, _or_null(float, several=True), type=NUMBERS)


def words(name: str) -> Column:
    """Return a column of text, of which a table keeps only the vectors."""
    schema = {"type": ["string", "null"], "maxLength": _LONGEST}
    return Column(schema, "a text", _or_null(str), TextField(name, lines=2, may_be_empty=True), _text)


def time(name: str, seen: Any, hours: Column | None, days: Column | None) -> Column:
    """Return a column of timestamps, of which a batch has the parts, read off ``hours`` and ``days``.

    ``seen`` is the encoding's record of the column's training values.
    """

    def read(plain: Any, name: str) -> str | None:
        import pyarrow as pa

        from apps.recsys.encoding.timestamps import to_seconds

        value = None if plain is None else str(plain)
        try:
            to_seconds(pa.chunked_array([[value]], pa.string()), name, "the inputs", known=seen)
        except ValueError as error:
            raise ValueError(f"{name}={value!r}: {first_line(error).rpartition(': ')[2]}") from None
        return value

    def shown(batch: TableBatch) -> list[str]:
        day, hour = (_no_texts(batch) if part is None else part.shown(batch) for part in (days, hours))
        return [_moment(float(d), h) if d else "" for d, h in zip(day, hour, strict=True)]

    says = "Seconds since 1970, 20240531, or a text such as 2024-05-31 12:00; UTC where it names no zone."
    schema = {"type": ["string", "number", "null"], "maxLength": 64, "description": says}
    field = TextField(f"{name} (such as 2024-05-31 12:00, UTC)", lines=1, may_be_empty=True)
    return Column(schema, "2024-05-31 12:00", read, field, _text, shown=shown)


def category(
    feature: CategoricalFeature | SequenceFeature, place: int, known: Sequence[str] | None, separator: str
) -> Column:
    """Return a categorical column of one value, of several, or a sequence of them, the oldest first.

    Args:
        feature: its description.
        place: its place among a batch's columns of one value, or among the lists.
        known: the values of the rows from 1 on; None if they are hashed, or are row numbers themselves.
        separator: text between several values.
    """
    is_sequence, name = isinstance(feature, SequenceFeature), feature.name
    takes_several = isinstance(feature, SequenceFeature) or feature.multi_valued
    value: dict[str, Any] = {"type": ["string", "number", "boolean"], "maxLength": _LONGEST}
    example: Any = "a value"
    field: Field = TextField(name, lines=1, may_be_empty=True)
    if feature.hashed:
        says, known = "Any value: it is hashed.", None
    elif known is None:
        value = {"type": ["integer"], "minimum": 0, "maximum": feature.num_rows - 1}
        says, example = "The number of a row of the model's table.", min(1, feature.num_rows - 1)
        field = NumberField(name, 1, may_be_empty=True, whole=True, least=1, most=feature.num_rows - 1)
    else:
        some = ", ".join(map(repr, known[:_NAMED]))
        says = f"One of {len(known):,} values, such as {some}; another is taken for one that was never seen."
        example = known[0] if known else "a value"
        field = ChoiceField(name, tuple(known), known[0] if known else None, may_be_empty=True)

    def shown(batch: TableBatch) -> list[str]:
        if feature.hashed:
            return _no_texts(batch)
        if takes_several:
            rows = [own.numpy() for own in batch.lists[place].values_N.split(batch.lists[place].length_B.tolist())]
        else:
            rows = list(batch.single_FB[place, :, None].numpy())
        return [separator.join(str(row) if known is None else known[row - 1] for row in own if row) for own in rows]

    def several(read: str) -> list[str] | None:
        values = [read] if read in (known or ()) else [own for own in read.split(separator) if own]
        for own in values if known is not None else ():
            if known is not None and own not in known:
                raise ValueError(f"{name}: {excerpt(own)} is none of the {len(known):,} values that the model knows")
        return values or None

    if not takes_several:
        schema = {**value, "type": [*value["type"], "null"], "description": says}
        return Column(schema, example, _or_null(str), field, _text, shown=shown)
    says, order = (f"The oldest first. {says}", "the oldest first, with") if is_sequence else (says, "several, with")
    schema = {"type": ["array", "null"], "items": value, "maxItems": _MOST, "description": says}
    field = TextField(f"{name} ({order} {separator} between)", lines=1, may_be_empty=True)
    return Column(schema, [example], _or_null(str, several=True), field, several, type=TEXTS, shown=shown)


@dataclass(frozen=True)
class Row:
    """The columns that a row to predict must have.

    Attributes:
        columns: each column, by name, in the order of ``Encoding.roles``.
    """

    columns: Mapping[str, Column]

    @classmethod
    def of(cls, encoding: Encoding) -> Row:
        """Return the columns of an encoding."""
        known = {column: vocabulary.texts() for column, vocabulary in encoding.vocabularies.items()}
        features, made = encoding.features, dict[str, Column]()
        if encoding.domain is not None and encoding.domains is not None:
            made[encoding.domain] = domain(encoding.domains.texts(), encoding.domain)
        keyed: tuple[CategoricalFeature | SequenceFeature, ...] = (*features.categorical, *features.sequences)
        places = {f.name: i for kind in (features.single, features.several) for i, f in enumerate(kind)}
        for feature in keyed:
            own = known.get(getattr(feature, "items", None) or feature.name)
            made.setdefault(feature.name, category(feature, places[feature.name], own, encoding.separator))
        made |= {feature.name: vector(feature) for feature in features.vectors}
        made |= {name: words(name) for name in encoding.texts}
        made |= {feature.name: quantity(feature, place) for place, feature in enumerate(features.continuous)}
        for name, seen in encoding.timestamps.items():
            hours, _, days = (made.get(part) for part in timestamp_columns(name))
            made[name] = time(name, seen, hours, days)
        return cls({column: made[column] for column in encoding.roles})

    def table(self, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
        """Return the values of rows as a table."""
        import pyarrow as pa

        types = {TEXT: pa.string(), TEXTS: pa.list_(pa.string()), NUMBER: pa.float64(), NUMBERS: pa.list_(pa.float32())}
        return pa.table(
            {name: pa.array([row[name] for row in rows], types[own.type]) for name, own in self.columns.items()}
        )

    def shown(self, batch: TableBatch) -> list[dict[str, str]]:
        """Return encoded rows as they are in a page's fields."""
        texts = {name: own.shown(batch) for name, own in self.columns.items()}
        return [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]

    def check_page(self) -> None:
        """Reject columns for which a page has no field.

        Raises:
            ValueError: naming them.
        """
        if left_out := [name for name, own in self.columns.items() if own.field is None]:
            raise ValueError(
                f"the model reads columns of vectors ({', '.join(left_out)}), for which a page has no field"
            )


def _moment(days: float, hour: str) -> str:
    """Return days since 1970 as a time of an hour of the day, if it is known; float32 is right to about 3 minutes."""
    minutes = round(1440 * days)
    if hour:
        first = 60 * (24 * round((24 * days - float(hour) - 0.5) / 24) + int(hour))
        minutes = min(max(minutes, first), first + 59)
    return (datetime.datetime(1970, 1, 1) + datetime.timedelta(minutes=minutes)).isoformat(" ", "minutes")


class RowTask(Task):
    """Base of the tasks whose request is a row of a table.

    Attributes:
        encoding: encoding of the row's values.
    """

    additional_properties = True
    encoding: Encoding

    @cached_property
    def row(self) -> Row:
        """The columns, with all the texts that they know: a script's rows are scored without these."""
        return Row.of(self.encoding)

    @property
    def inputs(self) -> Mapping[str, Input]:  # type: ignore[override]
        return self.row.columns

    def exhibit(self, data: Any, most: int) -> Any:
        self.row.check_page()
        return super().exhibit(data, most)
