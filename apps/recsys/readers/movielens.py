"""MovieLens-100k and MovieLens-1M (Harper and Konstan, TiiS 2015), whose ratings become a table of two tasks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from apps.recsys.readers.delimited import read_delimited
from apps.recsys.readers.raw import RawTables
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig

# A rating within a minute of the last one is of the next film on the page; 88.7 % of MovieLens-1M.
WATCHED_NEXT_SECONDS = 60
LAST_ITEMS = 20
"""Number of films that a rating's user rated last."""
# fmt: off
_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on
_PREFIX = r"^\d+[mk]_"
_YEAR = re.compile(r"\((\d{4})\)\s*$")


@dataclass(frozen=True)
class Ratings:
    """All ratings, in the order of the file, and the known facts about films and users.

    Attributes:
        user_N: int64, the user's number, from 1.
        item_N: int64, the film's place in the file of films, from 1; the same whatever source the files came from.
        rating_N: float32, 1 to 5.
        time_N: int64, seconds since 1970, UTC.
        users: columns user_id, gender, age and occupation, one row per user.
        titles, genres, years: facts of each film, in the order of the file of films; an unknown year is NaN.
    """

    user_N: np.ndarray
    item_N: np.ndarray
    rating_N: np.ndarray
    time_N: np.ndarray
    users: pa.Table
    titles: tuple[str, ...]
    genres: tuple[tuple[str, ...], ...]
    years: np.ndarray


def read_movielens_1m(root: Path, num_ratings: int | None = 1_000_209) -> RawTables:
    """Read MovieLens-1M, 6,040 users and 3,706 rated films, with the tasks liked (57.5 %) and watched next (88.7 %).

    ``like`` is 1 if the rating is 4 or 5. ``watched_next`` is 1 if the film was rated within 60 seconds of the user's
    rating before it, so it is the film the user turned to at once; it is missing for a user's first rating. Ratings of
    one second keep the order of the file. Both labels look back from the row, never ahead: the last rating of a user
    has both, and a split by time leaks neither. The rating and the seconds are inputs of neither.

    The inputs are user, film, gender, age (a code of seven ranges), occupation, hour of the day and day of the week
    (UTC, 0 is Monday) as categories, genres as a multi-valued column, and the film's year as a number. The column
    ``last_items`` has the 20 films that the user rated before, for a description of your own. The split is
    leave-last-out by default. A split by time, 10 % each, tests on 1,209 users, 186 of them unseen: 59 % of all users
    have rated on one day only.

    Args:
        root: folder with ``ml-1m.{inter,user,item}`` (RecBole) or ``{ratings,users,movies}.dat`` (GroupLens), these
            also below ``ml-1m``.
        num_ratings: rows that the file of ratings must have; None: any.

    Raises:
        ValueError: a file is missing, truncated or not of that layout.
    """
    return _table(read_ratings_1m(root, num_ratings), age_is_a_code=True)


def read_movielens_100k(root: Path, num_ratings: int | None = 100_000) -> RawTables:
    """Read MovieLens-100k, 943 users and 1,682 films, as `read_movielens_1m` does; the age is a number.

    The folder has ``ml-100k.{inter,user,item}`` (RecBole) or ``u.{data,user,item}`` (GroupLens), these also below
    ``ml-100k``.
    """
    return _table(read_ratings_100k(root, num_ratings), age_is_a_code=False)


def read_ratings_1m(root: Path, num_ratings: int | None = 1_000_209) -> Ratings:
    """Read the files of MovieLens-1M; see `read_movielens_1m`."""
    if (root / "ml-1m.inter").is_file():
        return _read_recbole(root, "ml-1m", num_ratings)
    home = root / "ml-1m" if (root / "ml-1m").is_dir() else root
    lines = _lines(home / "ratings.dat", "::", num_ratings)
    user_columns = ("user_id", "gender", "age", "occupation", "zip_code")
    users = read_delimited(home / "users.dat", _text(user_columns), columns=user_columns, separator="::")
    films = read_delimited(
        home / "movies.dat", _text(("id", "title", "genres")), columns=("id", "title", "genres"), separator="::",
        encoding="latin1",
    )  # fmt: skip
    genres = [text.split("|") for text in films["genres"].to_pylist()]
    ids, titles = films["id"].cast(pa.int64()), films["title"].to_pylist()
    return _ratings(home / "ratings.dat", lines, users, ids, titles, genres)


def read_ratings_100k(root: Path, num_ratings: int | None = 100_000) -> Ratings:
    """Read the files of MovieLens-100k; see `read_movielens_100k`."""
    if (root / "ml-100k.inter").is_file():
        return _read_recbole(root, "ml-100k", num_ratings)
    home = root / "ml-100k" if (root / "ml-100k").is_dir() else root
    lines = _lines(home / "u.data", "\t", num_ratings)
    user_columns = ("user_id", "age", "gender", "occupation", "zip_code")
    users = read_delimited(home / "u.user", _text(user_columns), columns=user_columns, separator="|")
    film_columns = ("id", "title", "released", "video", "url", *_GENRES_100K)
    films = read_delimited(
        home / "u.item", _text(("id", "title", *_GENRES_100K)), columns=film_columns, separator="|", encoding="latin1"
    )
    flags = zip(*(films[genre].to_pylist() for genre in _GENRES_100K), strict=True)
    genres = [[g for g, flag in zip(_GENRES_100K, row, strict=True) if flag == "1"] for row in flags]
    ids, titles = films["id"].cast(pa.int64()), films["title"].to_pylist()
    return _ratings(home / "u.data", lines, users, ids, titles, genres)


def _lines(path: Path, separator: str, num_ratings: int | None) -> pa.Table:
    """Read a file of ratings: columns user, item, rating and time."""
    types = {"user": pa.int64(), "item": pa.int64(), "rating": pa.float32(), "time": pa.int64()}
    return read_delimited(path, types, columns=tuple(types), separator=separator, num_rows=num_ratings)


def _read_recbole(root: Path, name: str, num_ratings: int | None) -> Ratings:
    """Read RecBole's atomic files: tabs, and a header of names with types. The films of ml-1m are called by title."""
    path = root / f"{name}.inter"
    types = {"user_id": pa.string(), "item_id": pa.string(), "rating": pa.float32(), "timestamp": pa.int64()}
    lines = read_delimited(path, types, separator="\t", num_rows=num_ratings)
    lines = lines.rename_columns(["user", "item", "rating", "time"])
    users = read_delimited(root / f"{name}.user", _text(("user_id", "gender", "age", "occupation")), separator="\t")
    names = ("item_id", "movie_title", "release_year", "genre" if name == "ml-1m" else "class")
    films = read_delimited(root / f"{name}.item", _text(names), separator="\t")
    bare, years, genres = (films[n].to_pylist() for n in names[1:])
    # its film 267 of 100k is "unkonwn" of the year "unkonwn"
    titles = [f"{title} ({year})" if year.isdigit() else title for title, year in zip(bare, years, strict=True)]
    # both files count users from 1, in ml-1m as "1m_1"
    lines = lines.set_column(0, "user", pc.replace_substring_regex(lines["user"], _PREFIX, "").cast(pa.int64()))
    users = users.set_column(0, "user_id", pc.replace_substring_regex(users["user_id"], _PREFIX, ""))
    return _ratings(path, lines, users, films["item_id"], titles, [text.split() for text in genres])


def _ratings(
    path: Path, lines: pa.Table, users: pa.Table, ids: pa.ChunkedArray, titles: list[str], genres: list[list[str]]
) -> Ratings:
    place = pc.index_in(lines["item"], value_set=ids.combine_chunks())
    if place.null_count:
        odd = lines["item"].filter(place.is_null())[0].as_py()
        raise ValueError(f"{path} rates film {odd!r}, which the file of films lacks: one of the two is truncated")
    user_ids = users["user_id"].cast(pa.int64())
    users = users.set_column(users.column_names.index("user_id"), "user_id", user_ids)
    known = pc.is_in(lines["user"], value_set=user_ids.combine_chunks())
    if not pc.all(known).as_py():
        odd = lines["user"].filter(pc.invert(known))[0].as_py()
        raise ValueError(
            f"{path} has a rating of user {odd}, whom the file of users lacks: one of the two is truncated"
        )
    rating_N = lines["rating"].to_numpy()
    if len(rating_N) and not 1 <= rating_N.min() <= rating_N.max() <= 5:
        raise ValueError(f"{path} is corrupt: ratings go from 1 to 5, not {rating_N.min():g} to {rating_N.max():g}")
    matches = (_YEAR.search(title) for title in titles)
    return Ratings(
        user_N=lines["user"].to_numpy(),
        item_N=place.to_numpy().astype(np.int64) + 1,
        rating_N=rating_N,
        time_N=lines["time"].to_numpy(),
        users=users.select(["user_id", "gender", "age", "occupation"]),
        titles=tuple(titles),
        genres=tuple(map(tuple, genres)),
        years=np.array([float(m[1]) if m else np.nan for m in matches], np.float32),
    )


def _table(ratings: Ratings, age_is_a_code: bool) -> RawTables:
    age_code = ("age",) if age_is_a_code else ()
    config = TableConfig(
        categorical=("user_id", "item_id", "gender", *age_code, "occupation", "hour", "weekday"),
        multi_valued=("genres",),
        continuous=("year",) if age_is_a_code else ("year", "age"),
        tasks={"like": TaskConfig("rating", at_least=4), "watched_next": TaskConfig("watched_next")},
        user="user_id",
        time="timestamp",
        item="item_id",
        split=SplitConfig("leave_last_out"),
    )
    film = pa.array(ratings.item_N - 1)
    user_row = pc.index_in(pa.array(ratings.user_N), value_set=ratings.users["user_id"].combine_chunks())
    of_user = ratings.users.drop_columns("user_id").take(user_row)
    age = of_user["age"] if age_is_a_code else of_user["age"].cast(pa.float32())
    next_N, known_N = watched_next(ratings.user_N, ratings.time_N)
    columns = {
        "user_id": pa.array(ratings.user_N),
        "item_id": pa.array(ratings.item_N),
        "gender": of_user["gender"],
        "age": age,
        "occupation": of_user["occupation"],
        "hour": pa.array((ratings.time_N // 3600 % 24).astype(np.int32)),
        "weekday": pa.array(((ratings.time_N // 86400 + 3) % 7).astype(np.int32)),  # 1970 began on a Thursday
        "genres": pa.array([list(g) for g in ratings.genres], pa.list_(pa.string())).take(film),
        "year": pa.array(ratings.years[ratings.item_N - 1], from_pandas=True),
        "last_items": last_items(ratings.user_N, ratings.time_N, ratings.item_N),
        "rating": pa.array(ratings.rating_N),
        "watched_next": pa.array(next_N.astype(np.float32), mask=~known_N),
        "timestamp": pa.array(ratings.time_N),
    }
    return RawTables(pa.table(columns), None, None, config)


def watched_next(user_N: np.ndarray, time_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell whether each rating came within `WATCHED_NEXT_SECONDS` of the user's one before, and whether there was one.

    Args:
        user_N, time_N: int64, rows in any order; rows of one user and second keep theirs.

    Returns:
        Two arrays of bool (N,).
    """
    order = np.lexsort((time_N, user_N))  # stable
    user, time = user_N[order], time_N[order]
    known = np.zeros(len(user), bool)
    known[1:] = user[1:] == user[:-1]
    soon = np.zeros(len(user), bool)
    soon[1:] = known[1:] & (time[1:] - time[:-1] <= WATCHED_NEXT_SECONDS)
    next_N, known_N = np.empty_like(soon), np.empty_like(known)
    next_N[order], known_N[order] = soon, known
    return next_N, known_N


def last_items(user_N: np.ndarray, time_N: np.ndarray, item_N: np.ndarray, length: int = LAST_ITEMS) -> pa.ListArray:
    """Return the last films of each rating's user before it, at most ``length``, the oldest first.

    Args:
        user_N, time_N, item_N: int64, rows in any order; rows of one user and second keep theirs.
        length: largest number of films.
    """
    order = np.lexsort((time_N, user_N))  # stable
    user = user_N[order]
    place = np.arange(len(user))
    starts_user = np.r_[True, user[1:] != user[:-1]] if len(user) else np.zeros(0, bool)
    before = np.minimum(place - np.maximum.accumulate(np.where(starts_user, place, 0)), length)
    first_N, count_N = np.empty_like(place), np.empty_like(place)
    first_N[order], count_N[order] = place - before, before
    offsets = np.r_[0, np.cumsum(count_N)]
    films = item_N[order][np.repeat(first_N - offsets[:-1], count_N) + np.arange(offsets[-1])]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(films, pa.int32()))


def _text(names: tuple[str, ...]) -> dict[str, pa.DataType]:
    return dict.fromkeys(names, pa.string())
