"""The best and the last checkpoint are kept, a failed write leaves the old one, and a module is made from them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from resuming import differences
from tiny_app import TinyData, TinyModule
from trainings import MOE, fit, load, trainer

from apps.base.files import read_json
from apps.train.checkpoint.checkpoints import AtomicCheckpointIO, BestAndLast
from apps.train.checkpoint.paths import find_checkpoint, is_hub_folder, is_sharded, named_checkpoint, run_name
from apps.train.optim.optimizers import OptimizerConfig
from apps.train.publish.exported import Description


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"n": 1}, path)

    def full(checkpoint, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*: No space left on device; the earlier one is"):
        io.save_checkpoint({"n": 2}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert load(path) == {"n": 1}


def test_checkpoints_of_an_earlier_run_are_put_aside_before_the_first_step(tmp_path):
    for epochs in (1, 2):
        fit(TinyModule(3), tmp_path, max_epochs=epochs)
    (tmp_path / "average.ckpt").write_bytes(b"of the earlier run")

    class Killed(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(TinyModule(3), tmp_path, Killed())
    assert not list(tmp_path.glob("*.ckpt"))
    assert {p.name for p in (tmp_path / "earlier" / "2").glob("*.ckpt")} == {"best.ckpt", "last.ckpt", "average.ckpt"}
    assert [load(tmp_path / "earlier" / number / "last.ckpt")["epoch"] for number in ("1", "2")] == [0, 1]


def fit_with_scores(folder: Path, scores: list[float], **options) -> Trainer:
    """An epoch for each validation score, of which the highest is the best, or as ``options`` say."""
    rest = iter(scores)

    class Score(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("val/score", next(rest))

    module = TinyModule(3)
    module.monitor, module.monitor_mode = "val/score", "max"
    return fit(module, folder, Score(), **{"max_epochs": len(scores)} | options)


def test_the_best_is_the_best_and_no_nan_and_the_last_is_the_last(tmp_path):
    made = fit_with_scores(tmp_path, [math.nan, 0.5, 0.9, 0.7])
    assert load(tmp_path / "best.ckpt")["epoch"] == 2
    assert load(tmp_path / "last.ckpt")["epoch"] == 3
    assert made.checkpoint_callback.best_score == pytest.approx(0.9)


def test_validations_within_an_epoch_choose_the_best(tmp_path):
    # 9 steps, validated after steps 2, 4, 6 and 8; the epoch's end has no score of its own.
    made = fit_with_scores(tmp_path, [0.5, 0.9, 0.7, 0.8], max_epochs=1, val_check_interval=2)
    assert made.checkpoint_callback.best_score == pytest.approx(0.9)
    assert load(tmp_path / "best.ckpt")["global_step"] == 4
    assert load(tmp_path / "last.ckpt")["global_step"] == 9
    # The next run's epoch ends with the best validation.
    made = fit_with_scores(tmp_path, [0.5, 0.4, 0.9], max_epochs=1, val_check_interval=3)
    assert (made.checkpoint_callback.best_score, load(tmp_path / "best.ckpt")["global_step"]) == (pytest.approx(0.9), 9)


def test_a_best_within_an_epoch_resumes_exactly(tmp_path):
    within = {"max_epochs": 1, "val_check_interval": 2}
    fit_with_scores(tmp_path / "one", [0.9, 0.5, 0.7, 0.8], **within)
    fit_with_scores(tmp_path / "two", [0.5, 0.7, 0.8], ckpt_path=str(tmp_path / "one" / "best.ckpt"), **within)
    one, two = (load(tmp_path / name / "last.ckpt") for name in ("one", "two"))
    assert one["global_step"] == 9
    for saved in (one, two):  # not counted from the run's start on resuming
        del saved["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    assert differences(one, two) == []
    # No later score was better: the copy is the best of the new folder too.
    assert differences(*(load(tmp_path / name / "best.ckpt") for name in ("one", "two"))) == []


def test_the_score_of_a_best_that_is_not_there_is_forgotten(tmp_path, caplog):
    fit_with_scores(tmp_path / "one", [0.9])
    best, last = (tmp_path / "one" / f"{name}.ckpt" for name in ("best", "last"))
    best.unlink()
    made = fit_with_scores(tmp_path / "two", [0.5], ckpt_path=str(last), max_epochs=2)
    assert f"there is no {best}, so its val/score of 0.9 is forgotten" in caplog.messages
    assert made.checkpoint_callback.best_score == pytest.approx(0.5)
    assert load(tmp_path / "two" / "best.ckpt")["epoch"] == 1


def test_another_value_than_the_model_s_needs_a_mode():
    module = TinyModule(3)
    module.monitor, module.monitor_mode = "val/score", "max"
    for monitor in (None, "val/score"):
        saves = BestAndLast("kept", monitor)
        saves.setup(None, module, "validate")
        assert (saves.monitor, saves.mode) == ("val/score", "max")
    saves = BestAndLast("kept", "val/loss", "min")
    saves.setup(None, module, "validate")
    assert (saves.monitor, saves.mode) == ("val/loss", "min")
    with pytest.raises(ValueError, match="monitor='val/loss' is not the model's, val/score: give mode, min or max"):
        BestAndLast("kept", "val/loss").setup(None, module, "validate")


def test_a_value_that_no_validation_logs_is_named_once(tmp_path, caplog):
    module = TinyModule(3)
    module.monitor = "val_acc"
    fit(module, tmp_path, max_epochs=2)
    assert [r.getMessage() for r in caplog.records if "val_acc" in r.getMessage()] == [
        "validation logs no val_acc, so there is no best.ckpt: give the model, or BestAndLast, another monitor"
    ]
    assert not (tmp_path / "best.ckpt").exists()


def test_what_a_kill_in_the_middle_of_a_write_left_is_removed(tmp_path):
    (tmp_path / ".best.ckpt.0a1b2c3d.tmp").write_bytes(b"half")
    (tmp_path / ".last.ckpt.tmp").mkdir()  # of shards
    fit(TinyModule(3), tmp_path, limit_train_batches=1, limit_val_batches=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "metrics.csv"]


def test_the_first_rank_decides_what_all_write(tmp_path):
    own = BestAndLast(dirpath=str(tmp_path), monitor="acc", mode="max")
    trainer = SimpleNamespace(
        callback_metrics={"acc": torch.tensor(0.1)}, strategy=SimpleNamespace(broadcast=lambda score: 0.7)
    )
    with mock.patch.object(own, "_save") as saved:
        own._judge(trainer, None)
        own._judge(trainer, None)
    assert own.best_score == 0.7
    saved.assert_called_once_with(trainer, None, "best.ckpt")


def test_a_checkpoint_is_plain_and_makes_the_module_again(tmp_path):
    module = TinyModule(3, width=10, moe=MOE, optimizer=OptimizerConfig(lr=0.02))
    fit(module, tmp_path)
    path = tmp_path / "last.ckpt"
    assert load(path)["hyper_parameters"]["moe"]["num_experts"] == 4
    again = TinyModule.load_from_checkpoint(path)
    assert again.optimizer_config == OptimizerConfig(lr=0.02)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in module.state_dict().items())
    assert TinyModule.load_from_checkpoint(path, dropout=0.7).net[2].p == 0.7


def test_arguments_that_are_damaged_are_one_line():
    checkpoint = {"hyper_parameters": {"num_classes": [3]}, "state_dict": {}}
    with pytest.raises(ValueError, match=r"^few\.ckpt makes no TinyModule, so it is damaged or of .*: TypeError: "):
        TinyModule.restored(checkpoint, "few.ckpt")


@pytest.mark.parametrize(
    ("argument", "value", "problem"),
    [
        ("width", 10**12, r"net.0.weight is \(8, 2\) there and \(1000000000000, 2\) here"),
        ("width", 10**18, "overflow"),
        ("moe", dataclasses.replace(MOE, num_experts=10**9), r"\(1000000000, "),
    ],
)
def test_sizes_that_a_checkpoint_does_not_have_are_not_made(argument, value, problem):
    module = TinyModule(3, moe=MOE)
    module.keep_arguments({argument: value})
    checkpoint = {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
    with pytest.raises(ValueError, match=rf"^big\.ckpt does not fit a TinyModule of its arguments: .*{problem}"):
        TinyModule.restored(checkpoint, "big.ckpt")


def test_more_layers_than_a_checkpoint_has_are_not_made():
    class ManyLayers(TinyModule):
        def __init__(self, num_layers: int = 1) -> None:
            super().__init__(3)
            self.more = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(num_layers))

    module = ManyLayers()
    checkpoint = {"hyper_parameters": {"num_layers": 10**12}, "state_dict": module.state_dict()}
    with pytest.raises(ValueError, match=r": the checkpoint has \d+ tensors, and the model over \d+$"):
        ManyLayers.restored(checkpoint, "deep.ckpt")


class FewOptions(TinyModule):
    """Takes none of what ``SparseModule`` and ``TinyModule`` could do besides."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)


def test_what_a_module_does_not_take_is_not_in_its_checkpoint(tmp_path):
    module, run = FewOptions(3), trainer(tmp_path)
    run.fit(module, TinyData())
    run.save_checkpoint(tmp_path / "few.ckpt")
    assert dict(module.hparams) == {"num_classes": 3}
    again = FewOptions.load_from_checkpoint(tmp_path / "few.ckpt")
    assert torch.equal(again.net[0].weight, module.net[0].weight)


@pytest.fixture
def run(tmp_path):
    """A run's folder with a best and a last checkpoint, the last one of shards."""
    (tmp_path / "checkpoints" / "last.ckpt").mkdir(parents=True)
    (tmp_path / "checkpoints" / "last.ckpt" / "checkpoint.pt").touch()
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    return tmp_path


def test_a_run_s_folder_means_its_average_else_its_best_checkpoint_else_its_last(run):
    average, best, last = (run / "checkpoints" / f"{name}.ckpt" for name in ("average", "best", "last"))
    average.touch()
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == named_checkpoint(str(run), run) == average
    average.unlink()
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == find_checkpoint(best) == best
    best.unlink()
    assert is_sharded(last)
    assert find_checkpoint(run) == find_checkpoint(str(last)) == last


def test_a_word_means_one_of_a_run_anything_else_is_a_path_and_what_is_not_there_is_named(run, tmp_path):
    other = tmp_path / "other"
    assert named_checkpoint("last", run) == run / "checkpoints" / "last.ckpt"
    assert named_checkpoint(str(run), other) == run / "checkpoints" / "best.ckpt"
    with pytest.raises(FileNotFoundError, match=r"^no checkpoint .*other/checkpoints/best\.ckpt$"):
        named_checkpoint("best", other)
    with pytest.raises(FileNotFoundError, match=r"^no checkpoint nope\.ckpt$"):
        find_checkpoint("nope.ckpt")
    with pytest.raises(FileNotFoundError, match=r"^no checkpoint .*average\.ckpt$"):
        named_checkpoint("average", run)
    (run / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no checkpoint: a run has checkpoints/best\.ckpt or"):
        find_checkpoint(run / "empty")
    checkpoint = tmp_path / "digits" / "checkpoints" / "best.ckpt"
    assert run_name(checkpoint) == "digits"
    assert run_name(tmp_path / "digits" / "earlier" / "2" / "checkpoints" / "best.ckpt") == "digits/earlier/2"


def test_json_that_is_nested_too_deeply_is_no_description_of_a_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000)
    assert not is_hub_folder(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is not a JSON file"):
        read_json(path)
    with pytest.raises(ValueError, match=r"config\.json is not a model that moesaic export has written"):
        Description.from_json(path.read_text(), path)
