"""Batches of a table and of files to predict: what they hold, in which order, resumed in mid-epoch."""

import datetime
import threading

import pyarrow as pa
import pytest
import torch
from own_table import by_row, config_of, same
from refusals import refused

from apps.data.loader import ResumableLoader
from apps.recsys.schema import SplitConfig
from apps.recsys.tables.rows import streaming
from apps.recsys.tables.rows.scoring import one_ahead
from apps.recsys.tables.rows.streaming import FileRows, as_json_has_it


def test_a_shuffled_batch_equals_its_rows_and_one_of_none_is_a_batch(own):
    rows = own().rows("train")
    order = [4, 0, 5, 5, 1]
    whole = by_row(rows.__getitems__(order), rows.features)
    single = [by_row(rows[i], rows.features)[0] for i in order]
    assert same(whole, single)
    rows = own().rows("train")
    one = rows[3]
    assert len(one) == 1
    assert one.to("cpu") is one
    assert one.single_FB[0].tolist() == [3]
    empty = rows.__getitems__([])
    assert (len(empty), empty.single_FB.shape, empty.dense_BC.shape) == (0, (2, 0), (0, 1))
    assert [own.values_N.numel() for own in empty.lists] == [0]


def test_tables_with_one_kind_of_column_alone_and_batches_of_workers_are_whole(own):
    dense = own(config_of(categorical=(), continuous=("age",)))
    batch = dense.rows("train")[:]
    assert (batch.single_FB.shape, batch.lists, batch.domain_B, batch.group_B) == ((0, 6), (), None, None)
    categories = own(config_of()).rows("train")[:]
    assert categories.dense_BC.shape == (6, 0)
    lists = own(config_of(categorical=(), multi_valued=("tags",))).rows("train")[:]
    assert lists.lists[0].length_B.tolist() == [2, 0, 1, 1, 2, 1]
    assert lists.lists[0].row_N.tolist() == [0, 0, 2, 3, 4, 4, 5]
    data = own(num_workers=2, eval_batch_size=4)
    alone = [by_row(b, data.features) for b in own(eval_batch_size=4).train_eval_dataloader()]
    assert same([by_row(b, data.features) for b in data.train_eval_dataloader()], alone)


def epoch_of(data, epoch, loader=None):
    loader = data.train_dataloader() if loader is None else loader
    loader.batch_sampler.sampler.set_epoch(epoch)
    return [b.index_B.tolist() for b in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_hangs_on_seed_and_number_alone_and_resumes_in_the_middle(own, workers):
    data = own(batch_size=2)
    whole = epoch_of(data, 1)
    assert sorted(i for batch in whole for i in batch) == [0, 1, 2, 3, 4, 5]
    assert whole == epoch_of(own(batch_size=2, num_workers=workers), 1)
    assert whole != epoch_of(data, 0)
    assert whole != epoch_of(own(batch_size=2, seed=1), 1)
    stopped = data.train_dataloader()
    stopped.batch_sampler.sampler.set_epoch(1)
    next(iter(stopped))
    resumed = own(batch_size=2, num_workers=workers).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    assert epoch_of(data, 1, resumed) == whole[1:]


def test_loaders(own):
    data = own(split=SplitConfig("given", val=0.34), batch_size=3, eval_batch_size=1, drop_last=True)
    data.prepare_data()
    data.setup("fit")
    assert isinstance(data.train_dataloader(), ResumableLoader)
    assert [len(b) for b in data.train_dataloader()] == [3]  # of 4
    assert [len(b) for b in data.val_dataloader()] == [1, 1]
    assert [b.index_B.tolist() for b in data.test_dataloader()] == [[6], [7]]
    assert [b.index_B.tolist() for b in data.predict_dataloader()] == [[6], [7]]
    order = [int(b.index_B) for b in data.train_eval_dataloader()]
    assert order == sorted(order)
    state = torch.get_rng_state()
    list(data.val_dataloader())
    list(data.train_dataloader())
    assert torch.equal(state, torch.get_rng_state())
    assert own().val_dataloader() == []
    with pytest.raises(ValueError, match=r"table has no test rows: test_file .* or a share split.test"):
        own(test_file=None, split=SplitConfig("random", val=0, test=0)).test_dataloader()


def test_subsets_and_excluded_features_leave_what_was_learned(own):
    data = own(subset=4)
    chosen = data.rows("train").index.tolist()
    assert (len(chosen), data.features) == (4, own().features)
    assert (chosen, len(data.rows("test"))) == (own(subset=4, seed=7).rows("train").index.tolist(), 2)
    refused("subset=7 exceeds the 6 training rows", lambda: own(subset=7).rows("train"))
    refused("subset=1 leaves task 'click' one class", lambda: own(subset=1).rows("train"))
    data = own(exclude=["age", "tags"])
    assert [f.name for f in data.features.categorical] == ["city", "user"]
    assert data.features.continuous == ()
    refused("exclude='agee' is not a feature; did you mean 'age'", lambda: own(exclude=["agee"]).features)


CITIES = ["Oslo", "Paris", "", "Rome", "Rome", "Oslo", "NA"]
ROWS = {
    "key": [f"k{i}" for i in range(7)],
    "city": CITIES,
    "tags": ["z|y", "", "w", "x", "x|y", "", "y"],
    "user": [1, 2, 77, 3, 1, 5, 6],
    "age": [25.0, None, 30.0, 5.0, 40.0, 1.0, 2.0],
    "shop": ["fr", "de", "de", "fr", "de", "de", "fr"],
}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_pieces_and_files_join_to_one_table(own, tmp_path, monkeypatch, kind):
    table = pa.table(ROWS)
    for number, part in enumerate((table.slice(0, 3), table.slice(3))):
        path = tmp_path / f"new-{number}.{kind}"
        if kind == "csv":
            pa.csv.write_csv(part, path)
        else:
            pa.parquet.write_table(part, path)
    data = own(predict_file=f"new-*.{kind}", predict_columns=["key", "city"], eval_batch_size=2)
    (whole,) = FileRows(sorted(tmp_path.glob(f"new-*.{kind}")), data.encoding, 10)
    assert whole.kept is None
    monkeypatch.setattr(streaming, "_PIECE_ROWS", 4)  # a piece is two batches, and one lies in both files
    batches = list(data.predict_dataloader())
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    assert torch.cat([batch.index_B for batch in batches]).tolist() == list(range(7))
    assert same([row for b in batches for row in by_row(b, data.features)], by_row(whole, data.features))
    assert [key for batch in batches for key in batch.kept["key"].to_pylist()] == ROWS["key"]
    expected = [None if kind == "csv" and city == "" else city for city in CITIES]
    assert [city for batch in batches for city in batch.kept["city"].to_pylist()] == expected
    assert batches[0].to("meta").kept is batches[0].kept


def test_each_process_takes_its_batches(own, tmp_path):
    pa.parquet.write_table(pa.table(ROWS), tmp_path / "new.parquet")
    encoding = own().encoding
    parts = [
        [batch.index_B.tolist() for batch in FileRows([tmp_path / "new.parquet"], encoding, 2, {}, rank, 3)]
        for rank in range(3)
    ]
    assert parts == [[[0, 1], [6]], [[2, 3]], [[4, 5]]]


def test_kept_values_are_those_of_json():
    moment = datetime.datetime(2024, 5, 31, 12)
    for values, expected in (
        ([1, None], [1, None]),
        ([1.5, float("nan"), float("-inf")], [1.5, None, None]),
        ([moment, None], ["2024-05-31 12:00:00", None]),
        ([[1.0, float("nan")], None], [[1.0, None], None]),
        (["007", ""], ["007", ""]),
        ([b"x"], ["b'x'"]),
    ):
        assert as_json_has_it(pa.chunked_array([values])).to_pylist() == expected
    texts = pa.chunked_array([pa.array(["a", "b", "a"]).dictionary_encode()])
    assert as_json_has_it(texts).type == pa.string()


def test_one_item_is_made_ahead():
    made = []

    def items():
        for i in range(3):
            made.append((i, threading.current_thread() is threading.main_thread()))
            yield i
        raise ValueError("the fourth")

    coming = one_ahead(items())
    assert made == []
    assert [next(coming), next(coming), next(coming)] == [0, 1, 2]
    refused("the fourth", lambda: next(coming))
    assert made == [(0, False), (1, False), (2, False)]
