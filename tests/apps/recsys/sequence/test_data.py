"""Interactions to histories and batches, on tables of a few rows."""

import datetime
import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from quiet_trainer import quiet_trainer
from refusals import refused
from torch import Tensor

from apps.recsys.sequence.data import HistoryBatch, HistoryData
from apps.recsys.sequence.module import NextItemRecommender

# Items by ascending value are 10 -> 1, 20 -> 2, 30 -> 3, 40 -> 4, 50 -> 5; users 3, 5, 7, 9 are 0, 1, 2, 3.
#   user 7: 10 20 30 40 50 by time -> 1 2 3 4 5
#   user 3: 50 and 10 in the same second, in this order in the file, then 20 -> 5 1 2
#   user 5: 30 20 -> 3 2: too few to hold any out
#   user 9: 40 -> 4: nothing to predict
ROWS = {
    "user": [7, 7, 3, 7, 3, 7, 9, 7, 3, 5, 5],
    "item": [30, 10, 50, 20, 10, 40, 40, 50, 20, 20, 30],
    "time": [3, 1, 9, 2, 9, 4, 1, 5, 10, 8, 7],
    "stars": [5.0, 4.0, 4.0, 2.0, 4.0, 5.0, 1.0, 3.0, 5.0, None, 4.0],
    "title": ["c", "a", "e", "b", "a", "d", "d", "e", "b", "b", "c"],
}


def write(folder: Path, name: str = "clicks.csv", **columns: Any) -> str:
    pa.csv.write_csv(pa.table(ROWS | columns), folder / name)
    return str(folder / name)


def ready(file: str, **options: Any) -> HistoryData:
    data = HistoryData("table", file=file, seed=0, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def rows(padded: Tensor) -> list[list[int]]:
    """Cut off the zeros at the end of each row."""
    return [row[: int(row.nonzero().max()) + 1].tolist() if row.any() else [] for row in padded]


def by_user(loader: Any) -> dict[int, HistoryBatch]:
    """Return the one example of each user, as lists."""
    examples: dict[int, Any] = {}
    for batch in loader:
        seen = [None] * len(batch.user_B) if batch.seen_BH is None else rows(batch.seen_BH)
        for user, items, targets, s in zip(
            batch.user_B.tolist(), rows(batch.items_BS), batch.targets_BS.tolist(), seen, strict=True
        ):
            assert user not in examples
            examples[user] = (items, targets[: len(items)], s)
            assert not any(targets[len(items) :])
    return examples


def test_leave_last_out_by_hand_padded_after_the_last_item(tmp_path):
    data = ready(write(tmp_path))
    assert (data.num_items, data.user_names) == (5, ("3", "5", "7", "9"))
    # user 7 trains on 1 2 3, of which 2 and 3 are targets; user 3 on 5 alone, so on nothing; user 5 on all it has
    assert by_user(data.train_dataloader()) == {2: ([1, 2], [2, 3], None), 1: ([3], [2], None)}
    # the one before the last validates, and is in the history of the last, which tests
    assert by_user(data.val_dataloader()) == {0: ([5], [1], [5]), 2: ([1, 2, 3], [0, 0, 4], [1, 2, 3])}
    assert by_user(data.test_dataloader()) == {
        0: ([5, 1], [0, 2], [5, 1]),
        2: ([1, 2, 3, 4], [0, 0, 0, 5], [1, 2, 3, 4]),
    }
    # prediction: all there is, of everyone
    assert by_user(data.predict_dataloader()) == {
        0: ([5, 1, 2], [0, 0, 0], [5, 1, 2]),
        1: ([3, 2], [0, 0], [3, 2]),
        2: ([1, 2, 3, 4, 5], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]),
        3: ([4], [0], [4]),
    }
    batch = next(iter(ready(write(tmp_path)).test_dataloader()))
    assert batch.items_BS.tolist() == [[5, 1, 0, 0], [1, 2, 3, 4]]
    assert batch.targets_BS.tolist() == [[0, 2, 0, 0], [0, 0, 0, 5]]
    assert (batch.seen_BH.tolist(), batch.user_B.tolist()) == ([[5, 1, 0, 0], [1, 2, 3, 4]], [0, 2])
    assert (batch.index_B.tolist(), batch.seconds_BS.tolist()) == ([0, 1], [[9, 9, 0, 0], [1, 2, 3, 4]])
    assert {t.dtype for t in batch} == {torch.int64}
    data = ready(write(tmp_path), time_column=None)
    assert by_user(data.predict_dataloader())[2][0] == [3, 1, 2, 4, 5]
    assert next(iter(data.train_dataloader())).seconds_BS is None


def test_times_of_the_items(tmp_path: Path) -> None:
    # Times are cut as the items are, and follow a filter of interactions. Fractions of a second are rounded down.
    data = ready(write(tmp_path, time=[t + 0.75 for t in ROWS["time"]]), max_length=2)
    (batch,) = data.train_dataloader()
    assert sorted(batch.seconds_BS.tolist()) == [[1, 2], [7, 0]]
    (batch,) = data.predict_dataloader()
    assert batch.seconds_BS.tolist() == [[9, 10], [7, 8], [4, 5], [1, 0]]
    data = ready(write(tmp_path), min_rating=3, rating_column="stars")
    (batch,) = data.predict_dataloader()
    assert rows(batch.seconds_BS)[batch.user_B.tolist().index(2)] == [1, 3, 4, 5]
    dates = [f"2024-05-31 12:00:{t:02}.5" for t in ROWS["time"]]
    (batch,) = ready(write(tmp_path, time=dates)).predict_dataloader()
    noon = int(datetime.datetime(2024, 5, 31, 12, tzinfo=datetime.UTC).timestamp())
    assert (batch.seconds_BS[0, :3] - noon).tolist() == [9, 9, 10]
    for unit in (10**3, 10**6, 10**9):
        (batch,) = ready(write(tmp_path, time=[(noon + t) * unit for t in ROWS["time"]])).predict_dataloader()
        assert (batch.seconds_BS[0, :3] - noon).tolist() == [9, 9, 10]


def test_windows_by_hand(tmp_path: Path) -> None:
    # 8 items train on 1 to 6: 5 targets, cut from the end into pieces of 2
    one = {"user": [1] * 8, "item": list(range(1, 9)), "time": list(range(8)), "stars": [5.0] * 8, "title": ["x"] * 8}
    file = write(tmp_path, **one)
    data = ready(file, max_length=2, train_windows="all")
    batch = next(iter(data.train_dataloader()))
    pairs = sorted(zip(rows(batch.items_BS), rows(batch.targets_BS), strict=True))
    assert pairs == [([1], [2]), ([2, 3], [3, 4]), ([4, 5], [5, 6])]
    batch = next(iter(ready(file, max_length=2, train_windows="last").train_dataloader()))
    assert (rows(batch.items_BS), rows(batch.targets_BS)) == ([[4, 5]], [[5, 6]])
    data = ready(file, max_length=5, train_windows="all")
    assert rows(next(iter(data.train_dataloader())).items_BS) == [[1, 2, 3, 4, 5]]


def random_table(folder: Path, seed: int = 0) -> tuple[str, dict[int, list[int]]]:
    """A file, and each user's items in order by plain Python."""
    rng = np.random.default_rng(seed)
    user = rng.geometric(0.15, 400)  # a few users with many items, many with few
    item, time = rng.integers(0, 50, 400), rng.integers(0, 60, 400)
    table = {"user": user, "item": item, "time": time}
    pa.csv.write_csv(pa.table(table), folder / "random.csv")
    number = {value: n + 1 for n, value in enumerate(sorted(set(item.tolist())))}
    order: dict[int, list[tuple[int, int, int]]] = {}
    for n, (u, i, t) in enumerate(zip(user.tolist(), item.tolist(), time.tolist(), strict=True)):
        order.setdefault(u, []).append((t, n, number[i]))
    return str(folder / "random.csv"), {u: [i for _, _, i in sorted(order[u])] for u in sorted(order)}


@pytest.mark.parametrize("max_length", [1, 3, 1000])
def test_every_split_is_what_a_loop_over_users_gives(tmp_path: Path, max_length: int) -> None:
    file, sequences = random_table(tmp_path)
    data = ready(file, max_length=max_length, batch_size=7, eval_batch_size=5)
    assert [int(u) for u in data.user_names] == list(sequences)
    assert {1, 2, 3} < {len(s) for s in sequences.values()}
    expected: dict[str, dict[int, Any]] = {"train": {}, "val": {}, "test": {}, "predict": {}}
    for place, sequence in enumerate(sequences.values()):
        train = sequence[:-2] if len(sequence) >= 3 else sequence
        if len(train) > 1:
            kept = train[-max_length - 1 :]
            expected["train"][place] = (kept[:-1], kept[1:], None)
        if len(sequence) >= 3:
            for name, cut in (("val", 2), ("test", 1)):
                seen = sequence[:-cut]
                history = seen[-max_length:]
                expected[name][place] = (history, [0] * (len(history) - 1) + [sequence[-cut]], seen)
        history = sequence[-max_length:]
        expected["predict"][place] = (history, [0] * len(history), sequence)
    for name, examples in expected.items():
        assert by_user(getattr(data, f"{name}_dataloader")()) == examples, name


@pytest.mark.parametrize("max_length", [1, 4, 1000])
def test_all_windows_have_each_training_pair_once(tmp_path: Path, max_length: int) -> None:
    file, sequences = random_table(tmp_path)
    data = ready(file, max_length=max_length, train_windows="all", batch_size=7)
    examples = []
    for batch in data.train_dataloader():
        assert batch.items_BS.shape[1] <= max_length
        mask = batch.targets_BS > 0
        user = batch.user_B[:, None].expand_as(mask)[mask].tolist()
        examples += list(zip(user, batch.items_BS[mask].tolist(), batch.targets_BS[mask].tolist(), strict=True))
    expected = []
    for place, sequence in enumerate(sequences.values()):
        train = sequence[:-2] if len(sequence) >= 3 else sequence
        expected += [(place, a, b) for a, b in itertools.pairwise(train)]
    assert sorted(examples) == sorted(expected)


def test_min_rating_and_min_item_count(tmp_path):
    data = ready(write(tmp_path), min_rating=4, rating_column="stars")
    # Left: user 7: 10 30 40; user 3: 50 10 20; user 5: 30 (20 has no rating). User 9's 40 has one star.
    # The items are numbered anew: 10 20 30 40 50 are all there.
    assert (data.num_items, data.user_names) == (5, ("3", "5", "7"))
    assert by_user(data.predict_dataloader())[2][0] == [1, 3, 4]
    assert by_user(data.test_dataloader()) == {0: ([5, 1], [0, 2], [5, 1]), 2: ([1, 3], [0, 4], [1, 3])}
    # 20 is in three histories, the others in two
    data = HistoryData("table", file=write(tmp_path), min_item_count=3, name_column="title")
    assert data.item_names == ("", "b")
    # counted after the ratings: with four stars 20 is left once, and no item is left twice but 10 and 30
    data = HistoryData("table", file=write(tmp_path), min_rating=4, rating_column="stars", min_item_count=2)
    assert data.item_names == ("", "10", "30")


def test_names_and_numbers_do_not_depend_on_the_order_of_the_file_and_a_missing_one_is_named(tmp_path):
    a = ready(write(tmp_path, "a.csv"), name_column="title")
    backwards = {name: values[::-1] for name, values in ROWS.items()}
    b = ready(write(tmp_path, "b.csv", **backwards), name_column="title")
    assert a.item_names == b.item_names == ("", "a", "b", "c", "d", "e")
    assert a.user_names == b.user_names
    assert (by_user(a.test_dataloader())[2], a.item_genres) == (by_user(b.test_dataloader())[2], ())
    refused(r"file='.*nowhere\.csv': no such file", lambda: ready(str(tmp_path / "nowhere.csv")))


def test_movielens(tmp_path: Path) -> None:
    # the films are numbered by their place in movies.dat, without those that nobody rated: 3 -> 1, 2 -> 2
    ratings = ("1::2::5::30", "1::3::3::10", "1::2::4::20", "2::3::5::1")
    (tmp_path / "ratings.dat").write_text("\n".join(ratings) + "\n")
    films = ("3::Heat (1995)::Action|Crime", "9::Unrated (1990)::Drama", "2::Jumanji (1995)::Adventure")
    (tmp_path / "movies.dat").write_text("\n".join(films) + "\n")
    (tmp_path / "users.dat").write_text("1::F::1::10::1\n2::M::56::16::2\n")
    with pytest.raises(ValueError, match=r"ratings\.dat is truncated: 4 rows, not 1,000,209"):
        HistoryData("movielens_1m", root=str(tmp_path)).setup()
    from apps.recsys.readers.movielens import read_ratings_1m
    from apps.recsys.sequence.histories import Items, from_ratings

    data = HistoryData("movielens_1m", root=str(tmp_path), seed=0)
    data._opened = from_ratings(read_ratings_1m(tmp_path, num_ratings=4))
    assert data.item_names == ("", "Heat (1995)", "Jumanji (1995)")
    assert data.item_genres == ((), ("Action", "Crime"), ("Adventure",))
    assert by_user(data.predict_dataloader()) == {0: ([1, 2, 2], [0] * 3, [1, 2, 2]), 1: ([1], [0], [1])}
    liked = from_ratings(read_ratings_1m(tmp_path, num_ratings=4), min_rating=4)
    assert liked.item_N.tolist() == [2, 2, 1]
    # A model that knows the third film alone: Heat's two ratings are left out, and user 2 has no other.
    known = from_ratings(read_ratings_1m(tmp_path, num_ratings=4), known=Items(("", "3"), ("", "Jumanji (1995)")))
    assert (known.item_N.tolist(), known.num_unknown, known.user_names) == ([1, 1], 2, ("1", "2"))
    assert (known.offsets.tolist(), known.item_genres) == ([0, 2, 2], ((), ("Adventure",)))


def test_the_same_items_are_encoded_once_and_go_to_another_process(tmp_path):
    file, cache = write(tmp_path), tmp_path / "cache"
    first = ready(file, cache_dir=str(cache))
    again = HistoryData(dataset="table", file=file, cache_dir=str(cache))
    again.adopt(first.encoding_state)
    again.setup("fit")
    assert again.histories.item_N.tolist() == first.histories.item_N.tolist()
    assert len([*(cache / "histories").iterdir()]) == 1
    data = ready(write(tmp_path))
    again = pickle.loads(pickle.dumps(data))
    assert by_user(again.test_dataloader()) == by_user(data.test_dataloader())


def test_the_loader_has_the_options_of_the_data_and_one_interaction_is_enough_to_predict(tmp_path):
    assert ready(write(tmp_path)).train_dataloader().state_dict()["seed"] == 0
    with pytest.raises(ValueError, match="batch_size=3 exceeds the 2 training examples"):
        ready(write(tmp_path), batch_size=3, drop_last=True).train_dataloader()
    data = HistoryData("table", file=write(tmp_path, user=list(range(11))))
    data.setup("predict")
    assert len(next(iter(data.predict_dataloader())).index_B) == 11


def saved(data: HistoryData, path: Path, **options: Any) -> Path:
    """A checkpoint of an untrained model of ``data``."""
    trainer = quiet_trainer(path.parent, fast_dev_run=1)
    trainer.fit(NextItemRecommender(data.num_items, data.max_length, **options), datamodule=data)
    trainer.save_checkpoint(path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_a_model_knows_its_items_in_another_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path)
    path = saved(ready(file, max_length=4, name_column="title"), tmp_path / "it.ckpt")
    # Without item 20 and with a new 35, ranks would be 10 30 35 40 50: ids 1 to 5 as before, of other items.
    new = {"item": [35 if item == 20 else item for item in ROWS["item"]]}
    other = write(tmp_path, "tomorrow.csv", **new, title=["x" if title == "b" else title for title in ROWS["title"]])
    data = HistoryData("table", file=other, max_length=4, name_column="title")
    trainer = quiet_trainer(tmp_path)
    model = NextItemRecommender.load_from_checkpoint(path)
    predicted = trainer.predict(model, datamodule=data, return_predictions=True)
    assert "left out, for they are of items that the model does not know: 3" in caplog.text
    assert predicted is not None
    assert data.item_values == ("", "10", "20", "30", "40", "50")
    assert by_user(data.predict_dataloader())[2][0] == [1, 3, 4, 5]  # user 7's 10, 30, 40 and 50; 2 is 20 still
    names = dict(zip(["10", "20", "30", "40", "50"], "abcde", strict=True))
    for items, names_of_items in zip(predicted[0].item, predicted[0].name, strict=True):
        assert sorted(items) == sorted(names)  # all five, by their own values
        assert names_of_items == [names[item] for item in items]
    # Lightning's own way to a checkpoint says it too, and it goes on into the next one.
    model, again = NextItemRecommender(5, 4), HistoryData("table", file=other, max_length=4)
    trainer.test(model, datamodule=again, ckpt_path=path, weights_only=True, verbose=False)
    assert again.item_values == data.item_values
    trainer.save_checkpoint(tmp_path / "next.ckpt")
    kept = torch.load(tmp_path / "next.ckpt", weights_only=True)["encoding"]["items"]["content"]
    assert bytes(kept.tolist()) == b"1020304050"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_user_of_unknown_items_alone_has_a_prediction(
    tmp_path: Path, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(ready(write(tmp_path), max_length=4), tmp_path / "it.ckpt", exclude_seen=True)
    # Users 5 and 9 have new items alone; 9 is the last one.
    new = [item + 5 if user in (5, 9) else item for user, item in zip(ROWS["user"], ROWS["item"], strict=True)]
    data = HistoryData("table", file=write(tmp_path, "new.csv", item=new), max_length=4, eval_batch_size=batch_size)
    trainer = quiet_trainer(tmp_path)
    model = NextItemRecommender.load_from_checkpoint(path)
    predicted = trainer.predict(model, datamodule=data, return_predictions=True)
    assert "know: 3; users who have no others, and for whom all items score 0: 2, first '5'" in caplog.text
    assert predicted is not None
    assert [name for p in predicted for name in p.user_name] == ["3", "5", "7", "9"]
    score = [own for p in predicted for own in p.score]
    assert score[1] == score[3] == [0.0] * 5
    assert len(score[0]) == 2  # of five items user 3 has seen three
    trainer.test(model, datamodule=data, verbose=False)  # users 3 and 7 have items enough
    assert [b.user_B.tolist() for b in data.test_dataloader()] == ([[0], [2]] if batch_size == 1 else [[0, 2]])
    other = [item + 5 for item in ROWS["item"]]
    unknown = HistoryData("table", file=write(tmp_path, "none.csv", item=other), max_length=4)
    refused(r"none\.csv: no interaction is left", lambda: trainer.predict(model, datamodule=unknown))


def test_ids_stand_for_themselves_in_their_order(tmp_path):
    rows = ["user,item,time", "007,01,1", "007,1,2", "007,2020-01-01,3", "7,1,1", "7,true,2", "7, 01 ,3", "08,1,1"]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "b.csv").write_text("user,item,time\n08,NA,2\n08,01,3\n")
    data = ready(str(tmp_path / "?.csv"))
    assert (data.user_names, data.item_names) == (("007", "7", "08"), ("", "01", "1", "2020-01-01", "NA", "true"))
    assert data.histories.item_N.tolist() == [1, 2, 3, 2, 5, 1, 2, 4, 1]
    predicted = NextItemRecommender(data.num_items, 4).predict_step(next(iter(data.predict_dataloader())), 0)
    assert predicted.user_name == ["0", "1", "2"]  # without a trainer there is no data module to ask
    file = tmp_path / "clicks.csv"
    file.write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u in (10, 9) for t, i in enumerate((10, 9, -1))))
    data = ready(str(file))
    assert (data.user_names, data.item_names) == (("9", "10"), ("", "-1", "9", "10"))


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({}, {"user_column": "person"}, r"column 'person' \(user_column\) is not in '.*clicks\.csv'"),
        ({"item": [None, *ROWS["item"][1:]]}, {}, "column 'item' has no value in row 0"),
        ({"time": [*ROWS["time"][:-1], None]}, {}, "column 'time' orders the rows, but has no value in row 10"),
        # As text they would sort by letters: the last day of 2023 after the first of 2024.
        (
            {"time": ["31/12/2023", *["01/02/2024"] * 10]},
            {},
            r"column 'time' of .*clicks\.csv must hold numbers: row 0 holds '31/12/2023'",
        ),
        ({"time": [*map(str, ROWS["time"][:-1]), "n/a"]}, {}, r"row 10 holds 'n/a'; times are numbers, or dates"),
        (
            {},
            {"min_rating": 4, "rating_column": "title"},
            r"'title' of .*clicks\.csv must hold numbers: row 0 holds",
        ),
        ({}, {"min_rating": 6, "rating_column": "stars"}, r"clicks\.csv: no interaction is left"),
        ({"user": list(range(11))}, {}, "no user has the 3 interactions"),
        ({}, {"item_column": "user"}, "item_column='user' is user_column too"),
        ({}, {"time_column": "item"}, "time_column='item' is item_column too"),
    ],
)
def test_bad_tables(tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ready(write(tmp_path, **columns), **options)
    assert "\n" not in str(caught.value)
