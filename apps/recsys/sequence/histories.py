"""Histories made of interactions in any order: one sequence of items per user, without Python work for each row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apps.data.array_files import ArrayFiles, ArrayWriter, read_texts, save_texts
from apps.recsys.encoding.categories import MISSING, Codes, factorize
from apps.recsys.encoding.numbers import Part, to_numbers, to_order
from apps.recsys.encoding.timestamps import seconds_of_numbers
from apps.recsys.encoding.vocabulary import Vocabulary
from apps.recsys.readers import user_tables

if TYPE_CHECKING:
    from apps.recsys.readers.movielens import Ratings


@dataclass(frozen=True)
class Items:
    """The items that a model knows, by id; entry 0 of each is "".

    Attributes:
        values: the items as its training data called them.
        names: the items' names; the values where the data had no other names.
    """

    values: tuple[str, ...]
    names: tuple[str, ...]

    def state(self) -> dict[str, Any]:
        """Return values and names as tensors, for a checkpoint."""
        import pyarrow as pa

        parts = {"items": self.values, "names": self.names}
        return {part: Vocabulary.of(pa.array(texts[1:], pa.string())).state() for part, texts in parts.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Items:
        return cls(*(("", *Vocabulary(**state[part]).texts()) for part in ("items", "names")))

    def extended(self, values: Sequence[str], names: Sequence[str], wanted: NDArray[np.bool_]) -> Items:
        """Return these items, and after them the ``wanted`` ones of ``values`` that are new, with their names."""
        places = [i for i in np.flatnonzero(wanted).tolist() if values[i] not in self.ids]
        new_values, new_names = (tuple(texts[i] for i in places) for texts in (values, names))
        return Items(self.values + new_values, self.names + new_names)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The items' ids by value."""
        return {value: i for i, value in enumerate(self.values) if i}

    @property
    def digest(self) -> str:
        """A hash of the items and their order."""
        return hashlib.sha256(json.dumps([self.values, self.names]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Histories:
    """The items of each user, oldest first. User u has ``item_N[offsets[u]:offsets[u + 1]]``.

    Attributes:
        item_N: int32, item ids from 1; 0 is never an item.
        offsets: int64 (users + 1,).
        user_names: the users as the data calls them, by position.
        items: the items by id.
        item_genres: the items' genres by id, entry 0 is (); empty if the data knows no genres.
        num_unknown: number of interactions left out because the model does not know their items. A user who has no
            other is kept, without items.
        second_N: int64, the time of each interaction in whole seconds; None if the data have no times.
    """

    item_N: NDArray[np.int32]
    offsets: NDArray[np.int64]
    user_names: tuple[str, ...]
    items: Items
    item_genres: tuple[tuple[str, ...], ...] = ()
    num_unknown: int = 0
    second_N: NDArray[np.int64] | None = None

    @property
    def length_U(self) -> NDArray[np.int64]:
        """The number of items of each user."""
        return np.diff(self.offsets)


def write(histories: Histories, writer: ArrayWriter) -> None:
    """Write histories to be read by ``read``."""
    writer.save("item_N", histories.item_N)
    writer.save("offsets", histories.offsets)
    save_texts(writer, "user_names", histories.user_names)
    save_texts(writer, "item_values", histories.items.values)
    save_texts(writer, "item_names", histories.items.names)
    save_texts(writer, "item_genres", map("|".join, histories.item_genres))
    if histories.second_N is not None:
        writer.save("second_N", histories.second_N)
    writer.finish({"num_unknown": histories.num_unknown, "has_times": histories.second_N is not None})


def read(files: ArrayFiles) -> Histories:
    """Return the histories that ``write`` wrote; items and times are mapped into memory."""
    users, values, names = (tuple(read_texts(files, name)) for name in ("user_names", "item_values", "item_names"))
    genres = tuple(tuple(text.split("|")) if text else () for text in read_texts(files, "item_genres"))
    item_N, offsets = files["item_N"].numpy(), files["offsets"].numpy()
    second_N = files["second_N"].numpy() if files.info["has_times"] else None
    return Histories(item_N, offsets, users, Items(values, names), genres, files.info["num_unknown"], second_N)


def whole_seconds(order_N: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.int64]:
    """Return times, as ``encoding.numbers.to_order`` gives them, in whole seconds: int64 (N,), rounded down.

    Dates are int64 microseconds there. Numbers are float64, and dates or times as for ``seconds_of_numbers``; those
    beyond 2^62 become 2^62.
    """
    if order_N.dtype == np.int64:
        return (order_N // 1_000_000).astype(np.int64)
    return np.floor(seconds_of_numbers(order_N)).clip(-(2.0**62), 2.0**62).astype(np.int64)


def build(
    user_N: NDArray[np.int64],
    item_N: NDArray[np.int64],
    time_N: NDArray[Any] | None,
    keep_N: NDArray[np.bool_],
    users: Sequence[str],
    values: Sequence[str],
    names: Sequence[str],
    min_count: int,
    known: Items | None,
    second_N: NDArray[np.int64] | None = None,
    extends: bool = False,
) -> Histories:
    """Order interactions by user and time, and number the remaining users and items.

    Interactions of one user and time keep their order in the file. Items are numbered from 1 in the order of
    ``values``, users from 0 in the order of ``users``, so that the numbers depend on neither the order of the file nor
    its source.

    Args:
        user_N, item_N: the place of each interaction's user in ``users``, and of its item in ``values``.
        time_N: times, of any values that can be sorted; None: the order of the rows.
        keep_N: True for interactions that count, such as those with a good rating.
        users, values, names: the users, the items and the items' names as the data calls them.
        min_count: items with fewer interactions are left out, with these; counted once, after ``keep_N``.
        known: the items that a model knows: they keep their ids and names, and others are left out, but not their
            users; min_count then leaves out nothing.
        second_N: the times in whole seconds, which the histories keep; None: they have no times.
        extends: whether other items that have ``min_count`` interactions get the ids after the ids of ``known``.

    Raises:
        ValueError: nothing is left.
    """
    if extends and known is not None:
        known = known.extended(values, names, np.bincount(item_N[keep_N], minlength=len(values)) >= max(min_count, 1))
    if min_count > 1 and known is None:
        keep_N = keep_N & (np.bincount(item_N[keep_N], minlength=len(values)) >= min_count)[item_N]
    kept_users, user_n = np.unique(user_N[keep_N], return_inverse=True)
    if known is None:
        kept_items, id_n = np.unique(item_N[keep_N], return_inverse=True)
        id_n = id_n + 1
        known = Items(*(("", *(texts[i] for i in kept_items.tolist())) for texts in (values, names)))
    else:
        id_n = np.array([known.ids.get(value, 0) for value in values])[item_N[keep_N]]
    known_n = id_n > 0
    if not known_n.any():
        raise ValueError("no interaction is left to make histories of")
    user_n = user_n[known_n]
    # lexsort is stable and sorts by its last key first
    order = np.lexsort((user_n,) if time_N is None else (time_N[keep_N][known_n], user_n))
    offsets = np.concatenate(([0], np.cumsum(np.bincount(user_n, minlength=len(kept_users)))))
    return Histories(
        id_n[known_n][order].astype(np.int32),
        offsets.astype(np.int64),
        user_names=tuple(users[u] for u in kept_users.tolist()),
        items=known,
        num_unknown=int((~known_n).sum()),
        second_N=None if second_N is None else second_N[keep_N][known_n][order],
    )


def from_ratings(
    ratings: Ratings,
    min_rating: float | None = None,
    min_count: int = 1,
    known: Items | None = None,
    extends: bool = False,
) -> Histories:
    """Return MovieLens as histories; items keep the order of the file of films.

    Args:
        ratings: ratings that `readers.movielens` has read.
        min_rating, min_count, known, extends: see `from_table`.

    Raises:
        ValueError: no rating is left.
    """
    keep = np.ones(len(ratings.user_N), bool) if min_rating is None else ratings.rating_N >= min_rating
    users = [str(user) for user in range(int(ratings.user_N.max()) + 1)]
    films = ["", *map(str, range(1, len(ratings.titles) + 1))]
    titles = ["", *ratings.titles]
    histories = build(
        ratings.user_N,
        ratings.item_N,
        ratings.time_N,
        keep,
        users,
        films,
        titles,
        min_count,
        known,
        second_N=ratings.time_N,
        extends=extends,
    )
    genres = dict(zip(films[1:], ratings.genres, strict=True))
    return replace(histories, item_genres=((), *(genres.get(value, ()) for value in histories.items.values[1:])))


def from_table(
    files: Sequence[Path],
    user: str,
    item: str,
    time: str | None = None,
    rating: str | None = None,
    name: str | None = None,
    min_rating: float | None = None,
    min_count: int = 1,
    known: Items | None = None,
    extends: bool = False,
) -> Histories:
    """Return the histories of CSV (with a header) or Parquet files with one interaction per row.

    Users and items are compared as `factorize` does: 7 and "7.0" are the same, "007" is another. They are numbered by
    value where all are integers, else in the order of text.

    Args:
        files: the files, one after the other.
        user, item: columns of numbers or text.
        time: column by which a user's interactions are ordered; None: they are in order.
        rating: column of numbers for ``min_rating``.
        name: column with the item's name, of which an item's first one counts; None: the item itself.
        min_rating: lowest rating of an interaction that counts; interactions without one are left out too.
        min_count, known, extends: see `build`.

    Raises:
        ValueError: a file cannot be read or lacks a column; one column has two roles; a user, an item or a time is
            missing, a time is neither a number nor a date, or a rating no number; or no interaction is left.
    """
    given = {"user_column": user, "item_column": item, "time_column": time, "rating_column": rating}
    roles: dict[str, str] = {}
    for role, column in {**given, "name_column": name}.items():
        if column in roles and not (role == "name_column" and column == item):
            raise ValueError(f"{role}={column!r} is {roles[column]} too")
        if column is not None:
            roles.setdefault(column, role)
    tables = [user_tables.read_columns(path, roles, () if rating is None else (rating,), time) for path in files]

    def parts(column: str) -> list[Part]:
        return [(str(path), table[column]) for path, table in zip(files, tables, strict=True)]

    user_N, users = _numbered(factorize(parts(user), user), user)
    item_N, items = _numbered(factorize(parts(item), item), item)
    keep = np.ones(len(user_N), bool)
    if min_rating is not None:
        assert rating is not None
        keep = to_numbers(parts(rating), rating) >= min_rating  # false for NaN
    order = None if time is None else to_order(parts(time), time)
    names = items
    if (known is None or extends) and name is not None and name != item:
        coded = factorize(parts(name), name)
        texts = [*coded.values.to_pylist(), ""]  # the last one is where MISSING points
        _, first = np.unique(item_N, return_index=True)
        names = [texts[code] for code in coded.codes[first].tolist()]
    try:
        seconds = None if order is None else whole_seconds(order)
        return build(user_N, item_N, order, keep, users, items, names, min_count, known, seconds, extends)
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from error


def _numbered(codes: Codes, column: str) -> tuple[NDArray[np.int64], list[str]]:
    """Return the number of each row's value, ascending from 0, and the values by number.

    Raises:
        ValueError: a row has no value.
    """
    missing = codes.codes == MISSING
    if missing.any():
        raise ValueError(f"column {column!r} has no value in row {int(np.argmax(missing))}")
    values = codes.values.to_pylist()
    whole = all(v.removeprefix("-").isdecimal() and v.isascii() for v in values)
    order = sorted(range(len(values)), key=(lambda i: (int(values[i]), values[i])) if whole else values.__getitem__)
    number = np.empty(len(values), np.int64)
    number[order] = np.arange(len(values))
    return number[codes.codes], [values[i] for i in order]
