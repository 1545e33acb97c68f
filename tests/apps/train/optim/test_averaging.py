"""Averages of the weights: the moving one, and the mean of the last epochs, by hand, over a kill, in a longer run."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trainings
from resuming import CONFIG, Stop, checkpoint, differences, fit
from tiny_app import TinyData, TinyModule

from apps.cli import main as moesaic
from apps.train.checkpoint.paths import find_checkpoint
from apps.train.optim.averaging import WeightEMA, mean_weights
from apps.train.optim.optimizers import OptimizerConfig

# 26 points in batches of 8: 4 steps an epoch, 3 epochs. No schedule: it would depend on the length of the run.
AVERAGED = (
    CONFIG.replace("ema_decay: 0.99", "average_last: 2")
    .replace("{lr: 0.01}", "{lr: 0.01, schedule: constant, warmup_steps: 0}")
    .replace("class_path: tiny_app.TinyData", "class_path: tiny_app.TinyData\n  init_args: {n: 26}")
)
# The loss falls: by "max" no epoch after the first is better, and the third ends the training.
EARLY = """
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: val/loss, mode: max, patience: 2}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``config.yaml`` and its runs of two epochs, ``short``, and of three, ``run``."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "config.yaml").write_text(AVERAGED)
    fit(str(folder / "config.yaml"), folder / "short", "--trainer.max_epochs", "2")
    fit(str(folder / "config.yaml"), folder / "run")
    return folder


@pytest.fixture
def config(made: Path) -> str:
    return str(made / "config.yaml")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the run of three epochs, to go on in."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def weights(run_dir: Path, name: str = "last", key: str = "state_dict") -> dict[str, torch.Tensor]:
    return checkpoint(run_dir, name)[key]


def files(run_dir: Path) -> list[str]:
    return sorted(str(p.relative_to(run_dir / "checkpoints")) for p in (run_dir / "checkpoints").rglob("*.*"))


def assert_alike(one: Path, other: Path) -> None:
    for name in ("last", "average"):
        assert differences(weights(one, name), weights(other, name)) == []


def test_the_mean_of_files_by_hand(tmp_path):
    for i, value in enumerate((1.0, 2.0, 6.0)):
        torch.save({"w": torch.full((2,), value), "half": torch.tensor(value).half()}, tmp_path / f"{i}.pt")
    mean = mean_weights([tmp_path / f"{i}.pt" for i in range(3)])
    assert mean["w"].tolist() == [3.0, 3.0]
    assert (mean["w"].dtype, mean["half"].dtype) == (torch.float32, torch.float16)


def test_the_average_is_that_of_the_last_epochs_ends(made):
    ends, average = [weights(made / "short"), weights(made / "run")], weights(made / "run", "average")
    for name, value in average.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (ends[0][name] + ends[1][name]) / 2, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, ends[1][name])
    assert not torch.equal(average["net.0.weight"], ends[1]["net.0.weight"])
    assert differences(weights(made / "run", "average", "trained_state_dict"), ends[1]) == []
    assert files(made / "run") == ["average.ckpt", "best.ckpt", "epochs/1.pt", "epochs/2.pt", "last.ckpt"]


def test_it_is_a_checkpoint_as_others(config, run):
    path = run / "checkpoints" / "average.ckpt"
    module = TinyModule.load_from_checkpoint(path)
    assert torch.equal(module.net[0].weight, weights(run, "average")["net.0.weight"])
    assert moesaic(["test", "--config", config, "--run_dir", str(run), "--ckpt_path", "average"]) == 0
    assert json.loads((run / "test.json").read_text())["checkpoint"] == str(path)


def test_a_stopped_run_has_the_same_average(config, tmp_path, made):
    # Batch 2 lies in mid-epoch before the first saved step, 4 is the first of an epoch, and 4 + 7 the last of all.
    for stop in (2, 4, 7):
        with pytest.raises(Stop):
            fit(config, tmp_path / "broken", "--ckpt_path", "last", stop_at=stop)
    fit(config, tmp_path / "broken", "--ckpt_path", "last")
    for name in ("last", "average"):
        assert differences(checkpoint(made / "run", name), checkpoint(tmp_path / "broken", name)) == []
    assert files(made / "run") == files(tmp_path / "broken")


def test_a_run_killed_after_its_last_epoch_writes_it_when_it_is_resumed(config, run, made):
    (run / "checkpoints" / "average.ckpt").unlink()
    fit(config, run, "--ckpt_path", "last")
    assert_alike(run, made / "run")


@pytest.mark.slow
def test_a_longer_run_goes_on_from_the_trained_weights_with_the_epochs_beside_them(config, made, tmp_path, caplog):
    last, average = (made / "short" / "checkpoints" / f"{name}.ckpt" for name in ("last", "average"))
    for start in (last, average):
        fit(config, tmp_path / start.stem, "--ckpt_path", str(start))
        assert_alike(made / "run", tmp_path / start.stem)
        assert files(tmp_path / start.stem)[-3:] == ["epochs/1.pt", "epochs/2.pt", "last.ckpt"]
    lonely = tmp_path / "alone" / "last.ckpt"
    lonely.parent.mkdir()
    shutil.copy(last, lonely)
    fit(config, tmp_path / "without", "--ckpt_path", str(lonely))
    assert f"the weights of epochs 1, 2 are not beside {lonely}: the average is without them" in caplog.text
    # Of the third epoch alone: its own weights.
    of_one = checkpoint(tmp_path / "without", "average")
    assert differences(of_one["state_dict"], of_one["trained_state_dict"]) == []


@pytest.mark.parametrize(("start", "then"), [("last", "best"), ("average", "average")])
def test_a_longer_run_has_no_average_of_the_shorter_one(config, run, start, then):
    with pytest.raises(Stop):
        fit(config, run, "--trainer.max_epochs", "5", "--ckpt_path", start, stop_at=5)
    assert find_checkpoint(run).name == f"{then}.ckpt"


def test_a_new_run_in_the_folder_does_not_average_the_old_one(config, run):
    fit(config, run, "--trainer.max_epochs", "1")
    assert checkpoint(run, "average")["averaged_epochs"] == [0]
    assert "epochs/2.pt" not in files(run)


def test_wrong_options():
    with pytest.raises(ValueError, match="average_last=0 is not at least 1"):
        TinyModule(3, average_last=0)
    with pytest.raises(ValueError, match=r"average_last=3 with ema_decay=0\.9: the weights have one average"):
        TinyModule(3, average_last=3, ema_decay=0.9)


@pytest.mark.slow
def test_an_early_stop_stays_one(tmp_path):
    early_config, flags = str(tmp_path / "early.yaml"), ("--trainer.max_epochs", "9")
    Path(early_config).write_text(AVERAGED.rstrip() + EARLY)
    fit(early_config, tmp_path / "unbroken", *flags)
    before = checkpoint(tmp_path / "unbroken")
    assert before["global_step"] == 12
    assert checkpoint(tmp_path / "unbroken", "average")["averaged_epochs"] == [1, 2]
    # Resumed in the second epoch, it remembers the score of the first.
    with pytest.raises(Stop):
        fit(early_config, tmp_path / "broken", *flags, stop_at=6)
    fit(early_config, tmp_path / "broken", *flags, "--ckpt_path", "last")
    assert differences(before, checkpoint(tmp_path / "broken")) == []
    # Resumed after its end, it does no epoch more.
    fit(early_config, tmp_path / "unbroken", *flags, "--ckpt_path", "last")
    assert differences(before, checkpoint(tmp_path / "unbroken")) == []


def test_the_average_moves_by_the_formula_and_a_tensor_with_two_names_once():
    module, average = TinyModule(3), WeightEMA(0.99)
    module.again = module.net[0]
    names, weight = ("net.0.weight", "again.weight"), module.net[0].weight
    trainer = SimpleNamespace(global_step=1, state=SimpleNamespace(fn="fit"))
    average.on_fit_start(trainer, module)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    for _ in range(2):  # two micro-batches of one step
        average.on_train_batch_end(trainer, module)
    average.on_validation_epoch_start(trainer, module)
    # d = min(0.99, 2 / 11), so the average has moved by 9/11 of the 1.0 that was added.
    assert torch.allclose(weight, before + 9 / 11)
    average.on_validation_epoch_end(trainer, module)
    assert torch.equal(weight, before + 1.0)
    saved = {"state_dict": module.state_dict()}
    average.on_save_checkpoint(trainer, module, saved)
    for name in names:
        assert torch.allclose(saved["state_dict"][name], before + 9 / 11)
    # Names that differ, as in older checkpoints: the last one's value, as load_state_dict takes it.
    saved["state_dict"] |= {"net.0.weight": before, "again.weight": before + 2}
    resumed = WeightEMA(0.99)
    resumed.on_load_checkpoint(trainer, module, saved)
    resumed.on_fit_start(trainer, module)
    for name in names:
        assert torch.equal(resumed.average[name], before + 2)


def test_the_average_is_what_is_validated_saved_and_left(tmp_path):
    module = TinyModule(3, moe=trainings.MOE, ema_decay=0.9, optimizer=OptimizerConfig(lr=0.05))
    trainings.fit(module, tmp_path, max_epochs=2)
    checkpoint = trainings.load(tmp_path / "last.ckpt")
    trained, average = checkpoint["trained_state_dict"], checkpoint["state_dict"]
    assert not torch.equal(trained["net.0.weight"], average["net.0.weight"])
    assert torch.equal(module.net[0].weight, average["net.0.weight"])
    fresh = TinyModule(3, moe=trainings.MOE)
    fresh.load_state_dict(average)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mean = trainings.trainer(tmp_path / "again", logger=False).validate(fresh, TinyData(), verbose=False)
    last = [r for r in trainings.rows(tmp_path) if r["val/loss"]][-1]
    assert mean[0]["val/loss"] == pytest.approx(float(last["val/loss"]))
