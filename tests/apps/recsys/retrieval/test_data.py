"""Pairs of users and items from a table, and the catalog, by hand."""

import pyarrow as pa
import pytest
import torch
from made_pairs import FILMS, ROWS, TABLE, columns as made_columns, made_pairs, retriever
from own_table import by_row
from refusals import refused
from torch.testing import assert_close

from apps.data.array_files import ArraysInMemory
from apps.recsys.retrieval.catalog import Catalog, Seen, last_rows
from apps.recsys.retrieval.columns import arrays_of, encoding_of_part, names_of, raw_columns, take_columns
from apps.recsys.tables.data import TableData
from apps.recsys.tables.encode.new_rows import NewRows
from apps.recsys.tables.rows.rows import TableRows


@pytest.fixture
def data(tmp_path):
    return made_pairs(tmp_path, user_column="user", exclude_seen=True)


def test_liked_rows_are_pairs_and_the_catalog_has_each_item_as_its_last_training_row_has_it(data):
    assert (data.describe(), data.item_values) == ("table: 6 train, 2 val, 3 test pairs, 5 items", ("", *FILMS))
    train = data.examples("train").__getitems__(range(6))
    films = [data.item_values[i] for i in train.item_B.tolist()]
    assert films == ["Alien", "Brazil", "Alien", "Dune", "Dune", "Casablanca"]
    assert train.seen_BH is None
    assert (train.own_B.tolist(), train.count_U.tolist()) == ([0, 1, 0, 3, 3, 2], [2, 1, 1, 2])
    assert_close(train.log_q_U.exp(), torch.tensor([2, 1, 1, 2]) / 7)  # Fargo counts as if one liked it
    assert names_of(data.user_features) == ("user", "age")
    assert (train.user.dense_BC[:, 0].tolist(), train.user.single_FB.shape) == ([30, 30, 40, 40, 50, 50], (1, 6))
    assert data.examples("test").__getitems__([0, 1, 2]).seen_BH.tolist() == [[1, 2, 3], [1, 2, 4], [3, 4, 5]]
    assert data.examples("val").__getitems__([1]).seen_BH.tolist() == [[3, 4, 5]]  # cy, the second of two
    catalog = data.catalog
    assert catalog.count_I.tolist() == [2, 1, 1, 2, 0]
    (items,) = catalog.batches(data.item_features)
    part = encoding_of_part(data.encoding, names_of(data.item_features))
    assert raw_columns(items, part).to_pydict() == {
        "film": list(FILMS),
        "genres": [["sci-fi", "horror"], ["sci-fi"], ["drama"], ["sci-fi"], []],
        "year": [1979, 1985, 1943, 1984, 1996],
    }
    # a pair's item has the catalogue's columns: Casablanca's year of bob's row is another
    test = data.examples("test").__getitems__([0, 1, 2])
    assert test.item_B.tolist() == [0, 3, 1]  # training lacks Eraserhead
    assert (test.count_U.tolist(), test.item.dense_BC[test.own_B[1:], 0].tolist()) == ([1, 1], [1943, 1979])


def test_rows_of_rare_users_whose_items_stay_candidates_are_counted(tmp_path, caplog):
    dan = [("dan", 20, film, "sci-fi", 1985, 5) for film in ("Alien", "Dune", "Brazil")]  # one row trains
    pa.csv.write_csv(pa.table(made_columns(ROWS + dan)), tmp_path / "more.csv")
    more = {"train_file": str(tmp_path / "more.csv"), "user_column": "user", "exclude_seen": True}
    for min_count, seen, count in ((1, [[1]], 0), (2, [[0]], 1)):
        caplog.clear()
        rare = made_pairs(tmp_path, table={**TABLE, "min_count": min_count}, **more)
        rare.setup("fit")
        assert rare.examples("test").__getitems__([3]).seen_BH.tolist() == seen
        wanted = "exclude_seen: 1 of 10 training rows have row 0 of column 'user' (missing, or rarer than"
        assert sum(line.startswith(wanted) for line in caplog.messages) == count


def test_seen_lists_and_last_rows_by_hand():
    # user 1 has items 3 (twice) and 1, user 2 none, user 3 item 2; user or item 0 is unknown
    seen = Seen.of(torch.tensor([1, 1, 3, 1, 0, 3]), torch.tensor([3, 1, 2, 3, 1, 0]), num_users=4)
    assert seen.by_user(torch.tensor([3, 0, 1, 2])).tolist() == [[2, 0], [0, 0], [1, 3], [0, 0]]
    assert seen.by_user(torch.tensor([2])).tolist() == [[0]]
    assert Seen.of(*torch.zeros(2, 1, dtype=torch.int64), 2).by_user(torch.tensor([1, 0])).tolist() == [[0], [0]]
    assert last_rows(torch.tensor([2, 0, 1, 2, 1]), 2).tolist() == [4, 3]


def test_without_a_task_all_rows_are_pairs_and_a_table_without_labels_is_enough(tmp_path):
    data = made_pairs(tmp_path, positive=None, user_columns=["age"])
    assert (data.sizes(), data.catalog.count_I.tolist()) == ({"train": 9, "val": 3, "test": 3}, [2, 2, 2, 2, 1])
    assert data.catalog.seen is None
    assert data.examples("test").__getitems__([0]).seen_BH is None
    assert names_of(data.user_features) == ("age",)
    data = made_pairs(tmp_path, table={**TABLE, "tasks": {}}, positive=None)
    assert data.describe() == "table: 9 train, 3 val, 3 test pairs, 5 items"
    batch = data.examples("train").__getitems__([0, 8])
    assert [data.item_values[i] for i in batch.item_B.tolist()] == ["Alien", "Fargo"]
    with pytest.raises(ValueError, match=r"table\.tasks names no label"):
        TableData("table", train_file="any.csv", table={**TABLE, "tasks": {}})


def test_uniform_negatives_are_drawn_from_the_catalog_by_the_seed(tmp_path):
    data = made_pairs(tmp_path, num_uniform=200, seed=3)
    data.setup("fit")
    first, again = (next(iter(data.train_dataloader())) for _ in range(2))
    assert torch.equal(first.count_U, again.count_U)
    assert int(first.count_U.sum()) == 204
    assert len(first.count_U) == 5 == len(first.item)
    # 4 pairs and 200 draws: an item's probability is (4 share + 200 / 5) / 204
    assert_close(first.log_q_U.exp(), (4 * torch.tensor([2, 1, 1, 2, 1]) / 7 + 40) / 204)
    assert int(data.examples("val").__getitems__([0, 1]).count_U.sum()) == 2


def test_parts_of_a_batch_are_its_columns_and_a_catalog_is_kept_as_plain_values(data):
    rows = TableRows(data.opened, data.features, torch.arange(15))
    whole = by_row(rows[:], data.features)
    for part in (data.user_features, data.item_features):
        taken = by_row(take_columns(rows[:], data.features, part), part)
        for own, of_whole in zip(taken, whole, strict=True):
            assert {k: own[k] for k in own.keys() - {"dense"}} == {k: of_whole[k] for k in own.keys() - {"dense"}}
    assert take_columns(rows[:], data.features, data.item_features).dense_BC[:, 0].tolist() == [row[4] for row in ROWS]
    again = Catalog.from_state(data.catalog.state())
    features = data.item_features
    rows, own = (by_row(next(of.batches(features)), features) for of in (again, data.catalog))
    assert (rows, again.seen.items.tolist()) == (own, data.catalog.seen.items.tolist())


def test_what_users_had_is_the_checkpoint_s_and_values_without_a_row_are_missing(data, tmp_path):
    state = data.encoding_state
    for exclude_seen, want in ((True, [[1, 2, 3]]), (False, None)):
        given = made_pairs(tmp_path, user_column="user", exclude_seen=exclude_seen)
        given.adopt(state)
        seen_BH = given.examples("test").__getitems__([0]).seen_BH
        assert (None if seen_BH is None else seen_BH.tolist()) == want
    data.adopt({**state, "catalogue": {**state["catalogue"], "seen": None}})
    refused("exclude_seen=True: the checkpoint does not keep what users had", lambda: data.examples("test"))
    rare = made_pairs(tmp_path, table={**TABLE, "min_count": 3})  # sci-fi is there six times, Alien twice
    part = encoding_of_part(rare.encoding, ["film", "genres"])
    batch = TableRows(rare.opened, rare.features, torch.arange(3))[:]
    raw = raw_columns(take_columns(batch, rare.features, part.features), part)
    assert raw.to_pydict() == {"film": [None] * 3, "genres": [["sci-fi"], ["sci-fi"], []]}


def test_row_numbers_are_kept_and_0_is_missing_where_values_are(tmp_path):
    columns = {
        "kind": [FILMS.index(row[2]) if row[2] in FILMS else 9 for row in ROWS],  # Alien is 0
        "part": [None if row[2] == "Alien" else 3 for row in ROWS],
        "tags": ["0|2" if row[2] == "Alien" else "" if row[2] == "Dune" else "1|0" for row in ROWS],
    }
    pa.csv.write_csv(pa.table({**made_columns(), **columns}), tmp_path / "numbered.csv")
    sizes = {"kind": 10, "part": 4, "tags": 3}
    table = {**TABLE, "categorical": ["user", "film", "kind", "part"], "multi_valued": ["tags"], "num_rows": sizes}
    file = str(tmp_path / "numbered.csv")
    data = made_pairs(tmp_path, train_file=file, table=table, item_columns=["film", *columns])
    (items,) = data.catalog.batches(data.item_features)
    assert raw_columns(items, encoding_of_part(data.encoding, names_of(data.item_features))).to_pydict() == {
        "film": list(FILMS), "kind": [0, 1, 2, 3, 4], "part": [None, 3, 3, 3, 3],
        "tags": [[0, 2], [1, 0], [1, 0], [], [1, 0]],
    }  # fmt: skip


def test_a_user_s_last_items_are_columns_of_its_tower(tmp_path):
    last = ["", "Alien", "Alien|Brazil", "", "", "", "Alien", "Dune|Solaris|Alien", *[""] * 7]
    table = {**TABLE, "sequences": {"last": {"items": "film", "length": 2}}}
    pa.csv.write_csv(pa.table({**made_columns(), "last": last}), tmp_path / "last.csv")
    data = made_pairs(tmp_path, train_file=str(tmp_path / "last.csv"), table=table, user_columns=["age", "last"])
    assert [(f.name, f.items) for f in data.user_features.sequences] == [("last", None)]
    assert data.item_features.sequences == ()
    rows = TableRows(data.opened, data.features, torch.arange(15))[:]
    taken = take_columns(rows, data.features, data.user_features)
    assert len(taken.lists) == len(take_columns(rows, data.features, data.item_features).lists) == 1
    part = encoding_of_part(data.encoding, names_of(data.user_features))
    raw = raw_columns(taken, part).to_pydict()
    assert list(raw) == ["last", "age"]
    assert raw["last"][:8] == [[], ["Alien"], ["Alien", "Brazil"], [], [], [], ["Alien"], ["Alien"]]  # Solaris is none
    again = TableRows(arrays_of(taken, data.user_features), data.user_features, torch.arange(15))[:]
    assert raw_columns(again, part).to_pydict() == raw
    arrays = ArraysInMemory()
    NewRows(pa.table({"age": [row[1] for row in ROWS], "last": last}), part, arrays)
    assert raw_columns(TableRows(arrays, part.features, torch.arange(15))[:], part).to_pydict() == raw
    tower = retriever(data).user_tower.eval()
    vectors_BD = tower(taken)
    assert (vectors_BD[0] - vectors_BD[1]).norm() > 1e-3  # ann of 30 without a film, and after Alien


# A later table: ann's Dune and Gattaca train, which she likes, and dan's Fargo.
LATER = [
    ("ann", 32, "Dune", "sci-fi", 1990, 5),
    ("ann", 32, "Gattaca", "sci-fi|drama", 1997, 5),
    ("ann", 32, "Brazil", "sci-fi", 1985, 5),
    ("ann", 32, "Alien", "sci-fi|horror", 1979, 5),
    ("dan", 20, "Fargo", "drama", 1996, 2),
    ("dan", 20, "Dune", "sci-fi", 1990, 4),
    ("dan", 20, "Gattaca", "sci-fi", 1997, 4),
]


@torch.no_grad()
def test_a_catalog_grows_and_takes_what_the_new_rows_lack_from_the_checkpoint(data, tmp_path):
    before = retriever(data).eval()
    checkpoint = {"encoding": data.encoding_state, "state_dict": before.state_dict()}
    before.adopt_encoding(checkpoint)
    pa.csv.write_csv(pa.table(made_columns(LATER)), tmp_path / "later.csv")
    options = {"train_file": str(tmp_path / "later.csv"), "user_column": "user", "exclude_seen": True}
    later = made_pairs(tmp_path, **options)
    later.extend(checkpoint["encoding"])
    assert later.item_values == ("", *FILMS, "Gattaca")
    (items,) = later.catalog.batches(later.item_features)
    part = encoding_of_part(later.encoding, names_of(later.item_features))
    assert raw_columns(items, part).to_pydict() == {
        "film": [*FILMS, "Gattaca"],
        "genres": [["sci-fi", "horror"], ["sci-fi"], ["drama"], ["sci-fi"], ["drama"], ["sci-fi", "drama"]],
        "year": [1979, 1985, 1943, 1990, 1996, 1997],
    }
    assert later.catalog.count_I.tolist() == [0, 0, 0, 1, 0, 1]
    # ann, bob, cy and dan had films of both tables
    seen = later.catalog.seen.by_user(torch.arange(1, 5)).tolist()
    assert seen == [[1, 2, 3, 4, 6], [1, 2, 4, 0, 0], [3, 4, 5, 0, 0], [5, 0, 0, 0, 0]]
    after = retriever(later).eval()
    wide = after.widened(checkpoint, later.encoding_state)
    after.adopt_encoding(wide)
    after.load_state_dict(wide["state_dict"])
    assert_close(after.index().vectors_ID[:3], before.index().vectors_ID[:3])
    assert after.predict({"user": ["ann", "dan"], "age": [32, 20]})["film"].tolist()[:1] == ["Fargo"]
    other = made_pairs(tmp_path, **options, item_columns=["film", "year"], user_columns=["user", "age"])
    other.extend(checkpoint["encoding"])
    refused("item_columns are not those of the checkpoint, whose catalog has others", lambda: other.catalog)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"item_column": "flim"}, "item_column='flim' is no categorical column; did you mean 'film'"),
     ({"item_column": "genres"}, "item_column='genres' has several values a row"),
     ({"item_columns": ["film", "yaer"]}, "item_columns names 'yaer', which is no column of the data; did you mean"),
     ({"item_columns": []}, "item_columns names no column"),
     ({"user_columns": ["age", "year"]}, "column 'year' is among user_columns and item_columns"),
     ({"item_columns": ["year"], "user_columns": ["film"]}, "user_columns has 'film', which is item_column"),
     ({"user_column": "age"}, "user_column='age' is no categorical column"),
     ({"positive": "like it"}, "positive='like it'"), ({"exclude_seen": True}, "exclude_seen=True needs user_column"),
     ({"num_uniform": -1}, "num_uniform=-1 must not be negative"), ({"top_k": 0}, "top_k=0 must be at least 1"),
     ({"rank": "runs/x", "candidates": 5}, "candidates=5 are fewer than the 10 items"),
     ({"negatives": {"per_positive": 4}}, "num_uniform gives a retriever further ones")],
)  # fmt: skip
def test_bad_options_are_refused(tmp_path, changed, message):
    refused(message, lambda: made_pairs(tmp_path, **changed).setup("fit"))


def test_tasks_of_numbers_and_items_without_values_are_refused(tmp_path):
    stars = {**TABLE, "tasks": {"stars": {"column": "stars", "kind": "ordinal"}}}
    with pytest.raises(ValueError, match="positive='stars' is a task of kind 'ordinal': it must be 'binary'"):
        made_pairs(tmp_path, table=stars, positive="stars").setup("fit")
    with pytest.raises(ValueError, match="item_column='film' is hashed: it must have a row for each value"):
        made_pairs(tmp_path, table={**TABLE, "hash_rows": {"film": 9}}).setup("fit")
    numbered = {**TABLE, "categorical": ["user", "year"], "continuous": ["age"], "num_rows": {"year": 2000}}
    with pytest.raises(ValueError, match=r"item_column='year' is in table\.num_rows, which keeps no values"):
        made_pairs(tmp_path, table=numbered, item_column="year", item_columns=["year"]).setup("fit")
    rare = made_pairs(tmp_path, table={**TABLE, "min_count": 2})  # Fargo is rated once
    assert (rare.item_values, rare.sizes()) == (("", *FILMS[:4]), {"train": 6, "val": 2, "test": 3})
