"""The columns of a table that are a user's, and those that are an item's: parts of a description and of a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apps.recsys.encoding.features import CategoricalFeature, Features
from apps.recsys.encoding.profiles import Profile
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.encoding.vocabulary import Vocabulary
from apps.recsys.schema import nearest, timestamp_columns
from apps.recsys.tables.rows.batch import Ragged, TableBatch
from apps.recsys.tables.rows.rows import arrays_of_lists

if TYPE_CHECKING:
    import pyarrow as pa


def names_of(features: Features) -> tuple[str, ...]:
    """Return the names of all columns, in the order of the description."""
    parts = (features.categorical, features.continuous, features.vectors, features.sequences)
    return tuple(f.name for part in parts for f in part)


def part_of(features: Features, columns: Collection[str]) -> Features:
    """Return the description of only some columns, in the order of the batches, without tasks and domains.

    A sequence of items whose column is not among them has a table of its own.
    """
    return Features(
        categorical=tuple(f for f in features.categorical if f.name in columns),
        continuous=tuple(f for f in features.continuous if f.name in columns),
        vectors=tuple(f for f in features.vectors if f.name in columns),
        sequences=tuple(
            f if f.items in columns else replace(f, items=None) for f in features.sequences if f.name in columns
        ),
        numbers=features.numbers,
    )


def encoding_of_part(encoding: Encoding, columns: Collection[str]) -> Encoding:
    """Return the encoding of only some columns, so that rows need have no others."""
    features, known = part_of(encoding.features, columns), encoding.vocabularies
    vocabularies = {column: values for column, values in known.items() if column in columns}
    sequences = (f for f in encoding.features.sequences if f.name in columns)
    vocabularies |= {f.name: known[f.items] for f in sequences if f.items is not None and f.items in known}
    return replace(
        encoding,
        features=features,
        vocabularies=vocabularies,
        domain=None,
        domains=None,
        timestamps={t: known for t, known in encoding.timestamps.items() if {*timestamp_columns(t)} & {*columns}},
        texts={column: text for column, text in encoding.texts.items() if column in columns},
    )


def divide(features: Features, user: Sequence[str], item: Sequence[str], item_column: str) -> tuple[Features, Features]:
    """Return the descriptions of the user's columns and of the item's.

    Args:
        features: all columns.
        user: names of the user's columns; none: all others.
        item: names of the item's columns.
        item_column: column that tells one item from another. It is among neither where it is not named.

    Raises:
        ValueError: a name that is not a column, a column on both sides, a side without one, or an ``item_column`` that
            tells no items apart.
    """
    names = names_of(features)
    for option, columns in (("user_columns", user), ("item_columns", item)):
        for column in columns:
            if column not in names:
                raise ValueError(f"{option} names {column!r}, which is no column of the data{nearest(column, names)}")
    both = [column for column in user if column in item]
    if both:
        raise ValueError(f"column {both[0]!r} is among user_columns and item_columns: a tower must not see the other's")
    id_feature(features, item_column)
    user = user or [name for name in names if name not in item and name != item_column]
    if item_column in user:
        raise ValueError(f"user_columns has {item_column!r}, which is item_column: the user's tower would see the item")
    for option, columns in (("user_columns", user), ("item_columns", item)):
        if not columns:
            raise ValueError(f"{option} names no column")
    return part_of(features, user), part_of(features, item)


def id_feature(features: Features, column: str, option: str = "item_column") -> CategoricalFeature:
    """Return the column that tells one item, or one user, from another; ``option`` names it in messages.

    Raises:
        ValueError: it is not a categorical column of one value with a row for each value.
    """
    feature = next((f for f in features.categorical if f.name == column), None)
    if feature is None:
        near = nearest(column, [f.name for f in features.categorical])
        raise ValueError(f"{option}={column!r} is no categorical column{near}")
    if feature.multi_valued or feature.hashed:
        what = "has several values a row" if feature.multi_valued else "is hashed"
        raise ValueError(f"{option}={column!r} {what}: it must have a row for each value")
    return feature


def take_columns(batch: TableBatch, features: Features, part: Features) -> TableBatch:
    """Return the columns of ``part`` in a batch of ``features``; labels, users and domains are as they were."""
    kept = {*names_of(part)}
    dense_BC = batch.dense_BC[:, [c for c, f in enumerate(features.continuous) if f.name in kept]]
    single = [f.name in kept for f in features.single]
    lists = tuple(own for own, f in zip(batch.lists, features.several, strict=True) if f.name in kept)
    vector_BV = batch.vector_BV
    if vector_BV is not None:
        places = [f.name in kept for f in features.vectors for _ in range(f.size)]
        vector_BV = vector_BV[:, places] if any(places) else None
    return replace(batch, single_FB=batch.single_FB[single], dense_BC=dense_BC, vector_BV=vector_BV, lists=lists)


def numbers_of(roles: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns whose role is to be numbers."""
    return tuple(column for column, role in roles.items() if role == "continuous")


def column_of(batch: TableBatch, features: Features, column: str) -> Tensor:
    """Return the row of a column of one value in its table, int64 (B,), in a batch of ``features``."""
    single = [f.name for f in features.single]
    return batch.single_FB[single.index(column)].long()


def raw_columns(batch: TableBatch, encoding: Encoding) -> pa.Table:
    """Return the columns of a batch as they are in a table; a value that has no row of its own is missing.

    Row numbers that the table itself contains are kept as they are; 0 is missing where training rows have no value.
    Texts, whose vectors a batch has, and timestamps, which it has in parts, are not among them.

    Args:
        batch: the columns of ``encoding.features``.
        encoding: meaning of the rows.

    Raises:
        ValueError: a column is hashed: its values are not kept.
    """
    import pyarrow as pa

    features, columns = encoding.features, dict[str, Any]()
    items = {s.name: s.items or s.name for s in features.sequences}
    rows: tuple[Tensor | Ragged, ...] = (*batch.single_FB, *batch.lists)
    for feature, own in zip((*features.single, *features.several), rows, strict=True):
        if feature.hashed:
            raise ValueError(f"column {feature.name!r} is hashed: the model does not keep its values")
        known = encoding.vocabularies.get(items.get(feature.name, feature.name))
        if isinstance(own, Ragged):
            columns[feature.name] = _lists(own, _values(own.values_N, known, known is not None))
        else:
            profile = encoding.profiles.get(feature.name, Profile())
            columns[feature.name] = _values(own, known, known is not None or bool(profile.missing))
    for number, values_B in zip(encoding.features.continuous, batch.dense_BC.t().cpu().numpy(), strict=True):
        columns[number.name] = pa.array(values_B, from_pandas=True)
    if encoding.features.vectors:
        assert batch.vector_BV is not None
        parts = batch.vector_BV.cpu().split([f.size for f in encoding.features.vectors], dim=1)
        for vector, values_BS in zip(encoding.features.vectors, parts, strict=True):
            vectors = [None if row[0] != row[0] else row for row in values_BS.tolist()]
            columns[vector.name] = pa.array(vectors, pa.list_(pa.float32()))
    made = (*encoding.texts, *(part for column in encoding.timestamps for part in timestamp_columns(column)))
    return pa.table({column: values for column, values in columns.items() if column not in made})


def _values(row_N: Tensor, known: Vocabulary | None, no_0: bool) -> pa.Array:
    """Return the values of rows, which are the row numbers if none are known; ``no_0``: null for row 0."""
    import pyarrow as pa

    place_N = row_N.cpu().numpy()
    places = pa.array(place_N, mask=place_N == 0 if no_0 else None)
    return places if known is None else pa.array(["", *known.texts()]).take(places)


def _lists(column: Ragged, values: pa.Array) -> pa.Array:
    """Return the values of each example as a list, without nulls."""
    import pyarrow as pa

    there_N = torch.tensor(values.is_valid().to_numpy(zero_copy_only=False))
    ends = column.row_N.cpu()[there_N].bincount(minlength=len(column.length_B)).cumsum(0)
    return pa.ListArray.from_arrays(pa.array([0, *ends.tolist()], pa.int32()), values.drop_null())


def arrays_of(batch: TableBatch, features: Features) -> dict[str, Tensor]:
    """Return the columns of a batch as the arrays that ``TableRows`` reads, without labels."""
    arrays = {"dense": batch.dense_BC, "label": torch.zeros(len(batch), 0)}
    if batch.vector_BV is not None:
        arrays["vectors"] = batch.vector_BV
    if len(batch.single_FB):
        arrays["categorical"] = batch.single_FB.t().contiguous()
    for name, column in zip(arrays_of_lists(features).values(), batch.lists, strict=True):
        lengths = column.length_B.long()
        arrays[f"{name}_offsets"] = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        arrays[f"{name}_values"] = column.values_N
    return arrays
