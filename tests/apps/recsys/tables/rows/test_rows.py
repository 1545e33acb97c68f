"""Batches of a table: what they hold, in which order, resumed in mid-epoch."""

from __future__ import annotations

import pytest
import torch
from own_table import by_row, config_of, same

from apps.data.loader import ResumableLoader
from apps.recsys.schema import SplitConfig


def test_a_shuffled_batch_equals_its_rows_one_by_one(own):
    rows = own().rows("train")
    order = [4, 0, 5, 5, 1]
    whole = by_row(rows.__getitems__(order), rows.features)
    single = [by_row(rows[i], rows.features)[0] for i in order]
    assert same(whole, single)


def test_a_batch_of_one_and_of_none(own):
    rows = own().rows("train")
    one = rows[3]
    assert len(one) == 1
    assert one.to("cpu") is one
    assert one.single_FB[0].tolist() == [3]
    empty = rows.__getitems__([])
    assert (len(empty), empty.single_FB.shape, empty.dense_BC.shape) == (0, (2, 0), (0, 1))
    assert [own.values_N.numel() for own in empty.lists] == [0]


def test_tables_with_one_kind_of_column_alone(own):
    dense = own(config_of(categorical=(), continuous=("age",)))
    batch = dense.rows("train")[:]
    assert (batch.single_FB.shape, batch.lists, batch.domain_B, batch.group_B) == ((0, 6), (), None, None)
    categories = own(config_of()).rows("train")[:]
    assert categories.dense_BC.shape == (6, 0)
    lists = own(config_of(categorical=(), multi_valued=("tags",))).rows("train")[:]
    assert lists.lists[0].length_B.tolist() == [2, 0, 1, 1, 2, 1]
    assert lists.lists[0].row_N.tolist() == [0, 0, 2, 3, 4, 4, 5]


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


def test_batches_from_workers_are_whole(own):
    data = own(num_workers=2, eval_batch_size=4)
    alone = [by_row(b, data.features) for b in own(eval_batch_size=4).train_eval_dataloader()]
    assert same([by_row(b, data.features) for b in data.train_eval_dataloader()], alone)


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


def test_subset_draws_training_rows_and_leaves_what_was_learned(own):
    data = own(subset=4)
    chosen = data.rows("train").index.tolist()
    assert len(chosen) == 4
    assert data.features == own().features
    assert chosen == own(subset=4, seed=7).rows("train").index.tolist()
    assert len(data.rows("test")) == 2
    with pytest.raises(ValueError, match="subset=7 exceeds the 6 training rows"):
        own(subset=7).rows("train")
    with pytest.raises(ValueError, match="subset=1 leaves task 'click' one class"):
        own(subset=1).rows("train")


def test_excluded_features_are_not_read(own):
    data = own(exclude=["age", "tags"])
    assert [f.name for f in data.features.categorical] == ["city", "user"]
    assert data.features.continuous == ()
    with pytest.raises(ValueError, match="exclude='agee' is not a feature; did you mean 'age'"):
        _ = own(exclude=["agee"]).features
