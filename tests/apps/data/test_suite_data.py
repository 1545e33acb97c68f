"""Behaviour that all data modules share, on a list of numbers, and the sizes of splits."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import Dataset

from apps.data.splits import check_size, count_of
from apps.data.suite_data import SuiteData


@dataclass(frozen=True)
class Unit:
    """The length of a unit."""

    length: int

    @property
    def digest(self):
        return f"of {self.length}"

    def state(self):
        return asdict(self)


class Numbers(Dataset):
    def __init__(self, numbers) -> None:
        self.numbers = torch.tensor(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, positions):
        return self.numbers[torch.as_tensor(positions)]


class Lengths(SuiteData):
    """Ten training lengths and two of the test, in units of the smallest one unless a checkpoint says otherwise."""

    unit = "lengths"
    hold_out = "give {split}_size"

    def __init__(self, smallest=2, given=False, **options) -> None:
        super().__init__("toy", None, None, **{"batch_size": 4, "eval_batch_size": 2, "seed": 0, **options})
        self.smallest, self.given, self.reads = smallest, given, 0

    @property
    def needs_no_dataset(self) -> bool:
        return self.given and self._adopted is not None

    def read(self):
        self.reads += 1
        length = self.smallest if self._adopted is None else self._adopted.length
        return {"train": Numbers(range(length, 10 + length)), "val": Numbers([]), "test": Numbers([length, length])}

    @property
    def encoding(self) -> Unit:
        return self._adopted or Unit(int(self.opened["train"].numbers[0]))

    @staticmethod
    def encoding_of(state) -> Unit:
        return Unit(**state)

    def examples(self, split):
        return self.opened[split]


def test_training_batches_hold_all_examples_and_evaluation_keeps_the_order():
    loader = Lengths().train_dataloader()
    epoch = [batch.tolist() for batch in loader]
    assert sorted(number for batch in epoch for number in batch) == list(range(2, 12))
    assert [len(batch) for batch in epoch] == [4, 4, 2]
    assert [len(batch) for batch in Lengths(drop_last=True).train_dataloader()] == [4, 4]
    resumed = Lengths().train_dataloader()
    resumed.load_state_dict({"epoch": 0, "served": 1, "seed": 0})
    assert [batch.tolist() for batch in resumed] == epoch[1:]
    data = Lengths()
    for evaluated in (data.test_dataloader(), data.predict_dataloader()):
        assert [batch.tolist() for batch in evaluated] == [[2, 2]]
    assert data.val_dataloader() == []  # a training does without
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    model = LightningModule()
    model.validation_step = lambda batch, batch_idx: None
    with pytest.raises(ValueError, match=r"^toy has no val lengths: give val_size$"):
        trainer.validate(model, data, verbose=False)


def test_the_files_are_read_when_they_are_first_needed_and_described_once(caplog, monkeypatch):
    data = Lengths()
    assert data.reads == 0
    with caplog.at_level(logging.INFO):
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        Lengths().setup("fit")  # another process keeps quiet
    assert data.reads == 1
    assert [r.message for r in caplog.records] == ["toy: 10 train, 0 val, 2 test lengths"]


def test_an_adopted_encoding_is_kept_and_read_by():
    data = Lengths()
    assert (data.encoding_state, data.digest_of_given) == ({"length": 2}, None)
    data.adopt({"length": 2})  # as it would read by itself: nothing is read again
    data.setup("fit")
    assert data.reads == 1
    data.adopt({"length": 3})
    assert data.examples("test").numbers.tolist() == [3, 3]
    assert (data.encoding_state, data.digest_of_given) == ({"length": 3}, "of 3")
    assert data.reads == 2


def test_the_encoding_of_the_model_comes_before_the_files_are_read():
    data, model = Lengths(), LightningModule()
    model._encoding = {"length": 5}
    data.trainer = Trainer(logger=False, accelerator="cpu", enable_model_summary=False)
    data.trainer.strategy.connect(model)
    data.prepare_data()
    assert (data.encoding, data.reads) == (Unit(5), 1)
    data = Lengths(given=True)  # what is given to predict needs no dataset
    data.adopt({"length": 2})
    data.prepare_data()
    for stage, reads in (("predict", 0), ("test", 1)):
        data.setup(stage)
        assert data.reads == reads


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: SuiteData("toy", None, None).adopt({"length": 2}),
            r"the checkpoint keeps an encoding \(length\), and SuiteData has none",
        ),
        (lambda: Lengths(batch_size=0), "batch_size=0 must be at least 1"),
        (lambda: Lengths(eval_batch_size=-1), "eval_batch_size=-1 must be at least 1"),
        (lambda: Lengths(num_workers=-1), "num_workers=-1 must not be negative"),
        (lambda: check_size("val_size", -1), "val_size=-1 must not be negative"),
        (lambda: check_size("val_size", 1.0), "val_size=1.0 is neither an integer nor a share below 1"),
        (lambda: check_size("val_size", 1.5), "val_size=1.5 is neither an integer nor a share below 1"),
    ],
)
def test_what_is_impossible_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()


def test_numbers_and_shares_are_sizes():
    for size in (None, 0, 1, 5000, 0.0, 0.5):
        check_size("val_size", size)
    # A size below 1 is a share: 2.5 of 25, to the even number.
    assert [count_of(size, 25) for size in (0.1, 0, 1)] == [2, 0, 1]


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_batches_for_a_gpu_lie_in_pinned_memory(device: str, pinned: bool) -> None:
    data = Lengths()
    strategy = SimpleNamespace(root_device=torch.device(device))  # there is no GPU here
    trainer = {"lightning_module": None, "state": SimpleNamespace(fn="fit"), "overfit_batches": 0}
    data.trainer = SimpleNamespace(strategy=strategy, **trainer)  # type: ignore[assignment]
    assert data.train_dataloader().pin_memory == data.test_dataloader().pin_memory == pinned  # type: ignore[union-attr]
