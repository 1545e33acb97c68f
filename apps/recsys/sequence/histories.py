"""Interactions in any order to one sequence of items a user: arrays, and no Python work a row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apps.recsys import encode

if TYPE_CHECKING:
    import pyarrow as pa

    from apps.recsys.readers.movielens import Ratings


@dataclass(frozen=True)
class Histories:
    """The items of each user, oldest first. User u has ``item_N[offsets[u]:offsets[u + 1]]``.

    Attributes:
        item_N: int32, item ids from 1; 0 is never an item.
        offsets: int64 (users + 1,).
        user_names: the users as the data calls them, by position.
        item_names: by id; entry 0 is "".
        item_genres: by id, entry 0 is (); empty where the data knows no genres.
    """

    item_N: NDArray[np.int32]
    offsets: NDArray[np.int64]
    user_names: tuple[str, ...]
    item_names: tuple[str, ...]
    item_genres: tuple[tuple[str, ...], ...] = ()

    @property
    def num_items(self) -> int:
        return len(self.item_names) - 1

    @property
    def num_users(self) -> int:
        return len(self.user_names)

    @property
    def length_U(self) -> NDArray[np.int64]:
        """Items of each user."""
        return np.diff(self.offsets)


def build(
    user_N: NDArray[Any], item_N: NDArray[Any], time_N: NDArray[Any] | None, keep_N: NDArray[np.bool_], min_count: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    """Order interactions by user and time, and number what is left of users and items.

    Interactions of one user and time keep their order in the file. Items are numbered from 1 by ascending value, users
    from 0 likewise, so that the numbers depend on neither the order of the file nor its source.

    Args:
        user_N, item_N: values that can be sorted.
        time_N: likewise; None: the order of the rows.
        keep_N: interactions that count, such as those with a good rating; the others are as if they were not there.
        min_count: items with fewer interactions are left out, with these; counted once, after ``keep_N``.

    Returns:
        Item ids (N',) and offsets (users + 1,) as in `Histories`, and the distinct users and items that are left.

    Raises:
        ValueError: nothing is left.
    """
    if min_count > 1:
        _, code, count = np.unique(item_N[keep_N], return_inverse=True, return_counts=True)
        keep_N = keep_N.copy()
        keep_N[keep_N] = count[code] >= min_count
    user, item = user_N[keep_N], item_N[keep_N]
    if not len(user):
        raise ValueError("no interaction is left to make histories of")
    users, user_code = np.unique(user, return_inverse=True)
    items, item_code = np.unique(item, return_inverse=True)
    # lexsort is stable and sorts by its last key first
    order = np.lexsort((user_code,) if time_N is None else (time_N[keep_N], user_code))
    offsets = np.concatenate(([0], np.cumsum(np.bincount(user_code, minlength=len(users)))))
    return (item_code[order] + 1).astype(np.int32), offsets.astype(np.int64), users, items


def from_ratings(ratings: Ratings, min_rating: float | None = None, min_count: int = 1) -> Histories:
    """MovieLens as histories; items keep the order of the file of films.

    Raises:
        ValueError: no rating is left.
    """
    keep = np.ones(len(ratings.user_N), bool) if min_rating is None else ratings.rating_N >= min_rating
    item_N, offsets, users, items = build(ratings.user_N, ratings.item_N, ratings.time_N, keep, min_count)
    return Histories(
        item_N,
        offsets,
        user_names=tuple(str(u) for u in users.tolist()),
        item_names=("", *(ratings.titles[i - 1] for i in items.tolist())),
        item_genres=((), *(ratings.genres[i - 1] for i in items.tolist())),
    )


def from_table(
    path: Path,
    user: str,
    item: str,
    time: str | None = None,
    rating: str | None = None,
    name: str | None = None,
    min_rating: float | None = None,
    min_count: int = 1,
) -> Histories:
    """A CSV (with a header) or Parquet file with one interaction a row.

    Args:
        path: ends in .csv, .csv.gz, .tsv, .tsv.gz or .parquet.
        user, item: columns of numbers or text.
        time: column by which a user's interactions are ordered; None: they are in order.
        rating: column of numbers for ``min_rating``.
        name: column with the item's name; of several names of an item the first one counts. None: the item itself.
        min_rating: interactions with a lower rating, or none, are left out.
        min_count: see `build`.

    Raises:
        ValueError: the file is missing, is of another type or cannot be read, has not the columns, or a user, an item
            or a time is missing in it, or a time is neither a number nor a date; or no interaction is left.
    """
    table = _read_columns(path, [c for c in (user, item, time, rating, name) if c is not None])
    for column in (user, item, time):
        if column is not None and table[column].null_count:
            row = int(np.argmax(table[column].is_null().to_numpy()))
            raise ValueError(f"{path}: column {column!r} has no value in row {row}")
    keep = np.ones(table.num_rows, bool)
    if min_rating is not None:
        assert rating is not None
        keep = _numbers(table, rating, path) >= min_rating  # false for NaN
    order = None if time is None else encode.to_order([(str(path), table[time])], time)
    try:
        item_N, offsets, users, items = build(_sortable(table[user]), _sortable(table[item]), order, keep, min_count)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    names = [str(i) for i in items.tolist()]
    if name is not None:
        values = _sortable(table[item])
        _, first = np.unique(values, return_index=True)
        first = first[np.searchsorted(values[first], items)]
        names = ["" if n is None else str(n) for n in table[name].take(first).to_pylist()]
    return Histories(item_N, offsets, tuple(str(u) for u in users.tolist()), ("", *names))


def _read_columns(path: Path, columns: list[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    if not path.is_file():
        raise ValueError(f"{path} is missing")
    suffixes = path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]
    kind = suffixes[0] if suffixes else ""
    if kind not in (".csv", ".tsv", ".parquet"):
        raise ValueError(f"{path}: a table ends in .csv, .tsv or .parquet, not {kind!r}")
    try:
        if kind == ".parquet":
            found = pa.parquet.read_schema(path).names
        else:
            parse = pa.csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",")
            with pa.csv.open_csv(path, parse_options=parse) as reader:
                found = reader.schema.names
        if lacking := [c for c in columns if c not in found]:
            raise ValueError(f"{path} has no column {lacking[0]!r}; it has {', '.join(found[:20])}")
        if kind == ".parquet":
            return pa.parquet.read_table(path, columns=columns)
        convert = pa.csv.ConvertOptions(include_columns=columns, strings_can_be_null=True, null_values=[""])
        return pa.csv.read_csv(path, parse_options=parse, convert_options=convert)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is corrupt: {' '.join(str(error).split())[:160]}") from error


def _sortable(column: pa.ChunkedArray) -> NDArray[Any]:
    """Values that numpy sorts: text stays text, times become numbers."""
    import pyarrow as pa

    if pa.types.is_temporal(column.type):
        column = column.cast(pa.int32() if column.type.bit_width == 32 else pa.int64())
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = column.to_numpy()
    return values.astype(str) if values.dtype == object else values


def _numbers(table: pa.Table, column: str, path: Path) -> NDArray[np.float64]:
    import pyarrow as pa

    try:
        return table[column].cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: column {column!r} is not numbers ({' '.join(str(error).split())[:80]})") from error
