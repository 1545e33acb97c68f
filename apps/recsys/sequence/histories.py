"""Histories made of interactions in any order: one sequence of items a user, without Python work for each row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apps.data.array_files import ArrayFiles, ArrayWriter, read_texts, save_texts
from apps.recsys.encoding.categories import MISSING, Codes, factorize
from apps.recsys.encoding.numbers import Part, to_numbers, to_order
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
        item_values: the items as the data calls them, by id; entry 0 is "".
        item_names: the items' names by id, entry 0 is ""; the values where the data has no other names.
        item_genres: the items' genres by id, entry 0 is (); empty where the data knows no genres.
        num_unknown: number of interactions left out because the model does not know their items. A user who has no
            other is kept, without items.
    """

    item_N: NDArray[np.int32]
    offsets: NDArray[np.int64]
    user_names: tuple[str, ...]
    item_values: tuple[str, ...]
    item_names: tuple[str, ...]
    item_genres: tuple[tuple[str, ...], ...] = ()
    num_unknown: int = 0

    @property
    def length_U(self) -> NDArray[np.int64]:
        """The number of items of each user."""
        return np.diff(self.offsets)


_TEXTS = ("user_names", "item_values", "item_names")


def write(histories: Histories, writer: ArrayWriter) -> None:
    """Write histories to be read by ``read``."""
    writer.save("item_N", histories.item_N)
    writer.save("offsets", histories.offsets)
    for name in _TEXTS:
        save_texts(writer, name, getattr(histories, name))
    save_texts(writer, "item_genres", map("|".join, histories.item_genres))
    writer.finish({"num_unknown": histories.num_unknown})


def read(files: ArrayFiles) -> Histories:
    """Return the histories that ``write`` wrote; the items are mapped into memory."""
    texts = {name: tuple(read_texts(files, name)) for name in _TEXTS}
    genres = tuple(tuple(text.split("|")) if text else () for text in read_texts(files, "item_genres"))
    item_N, offsets = files["item_N"].numpy(), files["offsets"].numpy()
    return Histories(item_N, offsets, **texts, item_genres=genres, num_unknown=files.info["num_unknown"])


def build(
    user_N: NDArray[Any],
    item_N: NDArray[Any],
    time_N: NDArray[Any] | None,
    keep_N: NDArray[np.bool_],
    min_count: int,
    id_N: NDArray[np.int32] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    """Order interactions by user and time, and number what is left of users and items.

    Interactions of one user and time keep their order in the file. Items are numbered from 1 by ascending value, users
    from 0 likewise, so that the numbers depend on neither the order of the file nor its source.

    Args:
        user_N, item_N: users and items, of any values that can be sorted.
        time_N: times, likewise; None: the order of the rows.
        keep_N: True for interactions that count, such as those with a good rating.
        min_count: items with fewer interactions are left out, with these; counted once, after ``keep_N``.
        id_N: ids that the items have already. An item of id 0 is left out, but its user stays.

    Returns:
        Item ids (N',) and offsets (users + 1,) of `Histories`, and the distinct users and items that are left.

    Raises:
        ValueError: nothing is left.
    """
    if min_count > 1:
        _, code, count = np.unique(item_N[keep_N], return_inverse=True, return_counts=True)
        keep_N = keep_N.copy()
        keep_N[keep_N] = count[code] >= min_count
    users, user_code = np.unique(user_N[keep_N], return_inverse=True)
    if id_N is not None:
        user_code, keep_N = user_code[id_N[keep_N] > 0], keep_N & (id_N > 0)
    if not len(user_code):
        raise ValueError("no interaction is left to make histories of")
    items, item_code = np.unique(item_N[keep_N], return_inverse=True)
    # lexsort is stable and sorts by its last key first
    order = np.lexsort((user_code,) if time_N is None else (time_N[keep_N], user_code))
    offsets = np.concatenate(([0], np.cumsum(np.bincount(user_code, minlength=len(users)))))
    ids = (item_code + 1).astype(np.int32) if id_N is None else id_N[keep_N]
    return ids[order], offsets.astype(np.int64), users, items


def from_ratings(
    ratings: Ratings, min_rating: float | None = None, min_count: int = 1, known: Items | None = None
) -> Histories:
    """Return MovieLens as histories; items keep the order of the file of films.

    Args:
        ratings: ratings that `readers.movielens` has read.
        min_rating, min_count, known: see `from_table`.

    Raises:
        ValueError: no rating is left.
    """
    keep = np.ones(len(ratings.user_N), bool) if min_rating is None else ratings.rating_N >= min_rating
    films = ["", *map(str, range(1, len(ratings.titles) + 1))]
    id_N, unknown = _known_ids(known, films, ratings.item_N, keep)
    item_N, offsets, users, items = build(
        ratings.user_N, ratings.item_N, ratings.time_N, keep, min_count if known is None else 1, id_N
    )
    own = Items(("", *map(str, items.tolist())), ("", *(ratings.titles[i - 1] for i in items.tolist())))
    used = known or own
    genres = dict(zip(films[1:], ratings.genres, strict=True))
    return Histories(
        item_N,
        offsets,
        user_names=tuple(str(u) for u in users.tolist()),
        item_values=used.values,
        item_names=used.names,
        item_genres=((), *(genres.get(value, ()) for value in used.values[1:])),
        num_unknown=unknown,
    )


def _known_ids(
    known: Items | None, values: Sequence[str], item_N: NDArray[Any], keep_N: NDArray[np.bool_]
) -> tuple[NDArray[np.int32] | None, int]:
    """Return the known items' ids, 0 for others, and how many of ``keep_N`` have none; None where no items are known.

    ``values`` are the texts of the numbers in ``item_N``.
    """
    if known is None:
        return None, 0
    ids = {value: i for i, value in enumerate(known.values) if i}
    id_N = np.array([ids.get(value, 0) for value in values], np.int32)[item_N]
    return id_N, int((id_N[keep_N] == 0).sum())


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
) -> Histories:
    """Return the histories of CSV (with a header) or Parquet files with one interaction a row.

    Users and items are compared as `factorize` does: 7 and "7.0" are the same, "007" is another. They are numbered by
    value where all are whole numbers, else in the order of text.

    Args:
        files: the files, one after the other.
        user, item: columns of numbers or text.
        time: column by which a user's interactions are ordered; None: they are in order.
        rating: column of numbers for ``min_rating``.
        name: column with the item's name, of which an item's first one counts; None: the item itself.
        min_rating: lowest rating of an interaction that counts; interactions without one are left out too.
        min_count: see `build`.
        known: the items that a model knows: they keep their ids and names, and others are left out, but not their
            users; min_count then leaves out nothing.

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
    id_N, unknown = _known_ids(known, items, item_N, keep)
    try:
        item_of_N, offsets, used_users, used_items = build(
            user_N, item_N, order, keep, min_count if known is None else 1, id_N
        )
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from error
    user_names = tuple(users[u] for u in used_users.tolist())
    if known is not None:
        return Histories(item_of_N, offsets, user_names, known.values, known.names, num_unknown=unknown)
    names = values = [items[i] for i in used_items.tolist()]
    if name is not None and name != item:
        coded = factorize(parts(name), name)
        texts = [*coded.values.to_pylist(), ""]  # the last one is where MISSING points
        _, first = np.unique(item_N, return_index=True)
        names = [texts[code] for code in coded.codes[first[used_items]].tolist()]
    return Histories(item_of_N, offsets, user_names, ("", *values), ("", *names))


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
