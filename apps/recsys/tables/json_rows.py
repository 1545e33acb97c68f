"""Rows of a table as JSON objects: their schema by a model's encoding, and how some of them become a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apps.base.messages import first_line
from apps.recsys.encoding.features import CategoricalFeature, SequenceFeature
from apps.recsys.encoding.table_encoding import Encoding

if TYPE_CHECKING:
    import pyarrow as pa

_LARGEST = 3.4028234663852886e38
"""The largest number of float32."""
_LONGEST, _MOST = 10_000, 1_000
"""Characters of a text, and values of a list, at most."""
_NAMED = 5
"""Values of a column that its description names."""
_NUMBER = {"type": "number", "minimum": -_LARGEST, "maximum": _LARGEST}
_CATEGORY = {"type": ["string", "number", "boolean"], "maxLength": _LONGEST}


def row_schema(encoding: Encoding, title: str, description: str) -> dict[str, Any]:
    """Return the JSON schema of a row, with a row as its example."""
    columns = {column: _Column(encoding, column, role) for column, role in encoding.roles.items()}
    return {
        "title": title,
        "description": f"{description} Each column may be null, but for that of a domain; others are left out.",
        "type": "object",
        "required": list(columns),
        "properties": {column: own.schema for column, own in columns.items()},
        "examples": [{column: own.example for column, own in columns.items()}],
    }


def row_reader(encoding: Encoding) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return the function that turns a row into plain values of one type a column.

    It raises a ValueError for a timestamp that is none.
    """
    from apps.recsys.encoding.timestamps import to_seconds

    roles = encoding.roles

    def read(row: Mapping[str, Any]) -> dict[str, Any]:
        import pyarrow as pa

        values = {column: _plain(row[column], role) for column, role in roles.items()}
        for column, known in encoding.timestamps.items():
            try:
                to_seconds(pa.chunked_array([[values[column]]], pa.string()), column, "the inputs", known=known)
            except ValueError as error:
                raise ValueError(f"{column}={values[column]!r}: {first_line(error).rpartition(': ')[2]}") from None
        return values

    return read


def table_of(rows: Sequence[Mapping[str, Any]], encoding: Encoding) -> pa.Table:
    """Return rows that have been read as a table."""
    import pyarrow as pa

    types = {"multi_valued": pa.list_(pa.string()), "sequences": pa.list_(pa.string())}
    types |= {"vectors": pa.list_(pa.float32()), "continuous": pa.float64()}
    return pa.table(
        {
            column: pa.array([row[column] for row in rows], types.get(role, pa.string()))
            for column, role in encoding.roles.items()
        }
    )


def _plain(value: Any, role: str) -> Any:
    """Return a value as its column's type has it: a category and its text are the same to an encoding."""
    if value is None:
        return None
    if role in ("continuous", "vectors"):  # a whole number may be larger than an int64
        return [float(own) for own in value] if isinstance(value, list) else float(value)
    if isinstance(value, list):
        return [str(own) for own in value]
    return str(value)


class _Column:
    """The schema of a column, and a value of it.

    Args:
        encoding: encoding of the table.
        column: name of the column.
        role: its role.
    """

    schema: dict[str, Any]
    example: Any

    def __init__(self, encoding: Encoding, column: str, role: str) -> None:
        if column == encoding.domain and encoding.domains is not None:
            domains = list(encoding.domains.texts())
            self.schema, self.example = {"enum": domains, "description": "The domain."}, domains[0]
        elif role == "continuous":
            number = next(f for f in encoding.features.continuous if f.name == column)
            self.schema = {**_NUMBER, "type": ["number", "null"]}
            self.example = number.quantiles[len(number.quantiles) // 2] if number.quantiles else number.mean
        elif role == "vectors":
            size = next(f.size for f in encoding.features.vectors if f.name == column)
            self.schema = {"type": ["array", "null"], "items": _NUMBER, "minItems": size, "maxItems": size}
            self.example = [0.0] * size
        elif role == "texts":
            self.schema, self.example = {"type": ["string", "null"], "maxLength": _LONGEST}, "a text"
        elif role == "timestamps":
            says = "Seconds since 1970, 20240531, or a text such as 2024-05-31 12:00; UTC where it names no zone."
            self.schema = {"type": ["string", "number", "null"], "maxLength": 64, "description": says}
            self.example = "2024-05-31 12:00"
        else:
            value, says, first = _category(encoding, column)
            if role == "categorical":
                self.schema, self.example = {**value, "type": [*value["type"], "null"], "description": says}, first
            else:
                says = f"The oldest first. {says}" if role == "sequences" else says
                lists = {"type": ["array", "null"], "items": value, "maxItems": _MOST}
                self.schema, self.example = {**lists, "description": says}, [first]


def _category(encoding: Encoding, column: str) -> tuple[dict[str, Any], str, Any]:
    """Return the schema of a value of a categorical column, what it may be in words, and one."""
    features = encoding.features
    both: tuple[CategoricalFeature | SequenceFeature, ...] = (*features.categorical, *features.sequences)
    own = next(feature for feature in both if feature.name == column)
    table = getattr(own, "items", None) or column
    if own.hashed:
        return _CATEGORY, "Any value: it is hashed.", "a value"
    if table not in encoding.vocabularies:
        row = {"type": ["integer"], "minimum": 0, "maximum": own.num_rows - 1}
        return row, "The number of a row of the model's table.", min(1, own.num_rows - 1)
    known = encoding.vocabularies[table].texts()
    shown = ", ".join(map(repr, known[:_NAMED]))
    says = f"One of {len(known):,} values, such as {shown}; another is taken for one that was never seen."
    return _CATEGORY, says, known[0] if len(known) else "a value"
