"""MovieLens 1M and 100k, on files of a few rows in the layouts of their sources."""

from pathlib import Path

import numpy as np
import pytest
from made_sources import FILMS, check_config, write, write_100k, write_grouplens_1m, write_recbole_1m
from refusals import refused

from apps.recsys.readers.movielens import (
    last_items,
    read_movielens_1m,
    read_movielens_100k,
    read_ratings_1m,
    watched_next,
)


@pytest.mark.parametrize("layout", ["grouplens", "grouplens in its folder", "recbole"])
def test_movielens_1m(tmp_path: Path, layout: str) -> None:
    if layout == "recbole":
        write_recbole_1m(tmp_path)
    else:
        write_grouplens_1m(tmp_path / "ml-1m" if "folder" in layout else tmp_path)
    raw = read_movielens_1m(tmp_path, num_ratings=5)
    check_config(raw)
    assert raw.val is None
    assert raw.test is None
    rows = raw.train.to_pylist()
    # The film's number is its place in the file of films, the same in both layouts: GroupLens' 7 is the fourth.
    # User 1 rated at 0, 100 and 161 s: 100 s later, then 61 s later; neither is within 60. User 2 rated twice in the
    # last second of 1 January 1970, a Thursday (3): the second of them in the file is the next one.
    assert rows[0] == {
        "user_id": 1, "item_id": 2, "gender": "F", "age": "1", "occupation": "10", "hour": 0, "weekday": 3,
        "genres": ["Adventure"], "year": 1995.0, "last_items": [1], "rating": 5.0, "watched_next": 0.0,
        "timestamp": 100,
    }  # fmt: skip
    assert [r["item_id"] for r in rows] == [2, 1, 4, 4, 2]
    assert [r["hour"] for r in rows] == [0, 0, 23, 0, 23]
    assert [r["watched_next"] for r in rows] == [0.0, None, None, 0.0, 1.0]
    assert rows[1]["genres"] == ["Animation", "Children's", "Comedy"]
    assert read_ratings_1m(tmp_path, 5).titles == tuple(title for _, title, _ in FILMS)
    config, like = raw.config, raw.config.tasks["like"]
    assert (like.column, like.at_least, config.multi_valued) == ("rating", 4, ("genres",))
    assert (config.user, config.time, config.split.kind) == ("user_id", "timestamp", "leave_last_out")
    assert not {"rating", "timestamp", "watched_next"} & set(config.features)


def test_what_is_watched_next_and_before_by_hand():
    # User 7: 10, 70 (60 s later: next), 131 (61 s: not). User 3: 5, 5 (0 s: next). Rows in the order of the file.
    user = np.array([7, 3, 7, 3, 7])
    time = np.array([131, 5, 10, 5, 70])
    soon, known = watched_next(user, time)
    assert (known.tolist(), soon[known].tolist()) == ([True, False, False, True, True], [False, True, True])
    # The labels of the first rows by time are the same without the rows after them.
    rng = np.random.default_rng(0)
    user, time = rng.integers(0, 5, 200), np.sort(rng.integers(0, 2000, 200))
    whole, half = watched_next(user, time), watched_next(user[:100], time[:100])
    for a, b in zip(whole, half, strict=True):
        assert (a[:100] == b).all()
    # User 7 rates 5, 6, 8, 9 in this order, the middle two in one second; user 3 rates 4. Rows are as in the file.
    user, time, item = np.array([7, 3, 7, 7, 7]), np.array([30, 1, 20, 20, 10]), np.array([9, 4, 6, 8, 5])
    assert last_items(user, time, item).to_pylist() == [[5, 6, 8], [], [5], [5, 6], []]
    assert last_items(user, time, item, length=2).to_pylist() == [[6, 8], [], [5], [5, 6], []]
    assert last_items(user[:0], time[:0], item[:0]).to_pylist() == []


@pytest.mark.parametrize("layout", ["grouplens", "recbole"])
def test_movielens_100k(tmp_path: Path, layout: str) -> None:
    raw = read_movielens_100k(write_100k(tmp_path, layout), num_ratings=2)
    check_config(raw)
    first, second = raw.train.to_pylist()
    assert (first["user_id"], first["item_id"], first["age"], first["occupation"]) == (196, 2, 49.0, "other")
    assert (first["genres"], first["year"]) == (["unknown"], None)
    assert (second["genres"], second["year"]) == (["Action", "Thriller"], 1995.0)
    assert "age" in raw.config.continuous
    assert "age" not in raw.config.categorical


def test_movielens_truncated(tmp_path: Path) -> None:
    root = write_recbole_1m(tmp_path / "a")
    refused(r"ml-1m\.inter is truncated: 5 rows, not 1,000,209", lambda: read_movielens_1m(root))
    films = (root / "ml-1m.item").read_text("utf8").splitlines(keepends=True)
    (root / "ml-1m.item").write_text("".join(films[:-1]), "utf8")
    with pytest.raises(
        ValueError, match=r"ml-1m\.inter rates film 'Misérables, Les \(1995\)', which the file of films"
    ):
        read_movielens_1m(root, num_ratings=5)
    root = write_grouplens_1m(tmp_path / "b")
    write(root / "users.dat", "1::F::1::10::48067")
    with pytest.raises(ValueError, match=r"ratings\.dat has a rating of user 2, whom the file of users lacks"):
        read_movielens_1m(root, num_ratings=5)
    write(root / "ratings.dat", "1::1::5")
    refused(r"ratings\.dat is corrupt: .*Expected 4 columns, got 3", lambda: read_movielens_1m(root, num_ratings=None))
    write(root / "ratings.dat", "1::1::55::7")
    with pytest.raises(ValueError, match=r"ratings\.dat is corrupt: ratings go from 1 to 5, not 55 to 55"):
        read_movielens_1m(root, num_ratings=None)
    (root / "movies.dat").unlink()
    refused(r"movies\.dat is missing", lambda: read_movielens_1m(root, num_ratings=None))
