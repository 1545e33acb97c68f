"""A training: what it leaves behind, and what its configurations and flags make."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import yaml
from commands import fails
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_app import TinyData

from apps.cli import main
from apps.cli.request import Request
from apps.cli.train import build
from apps.train.checkpoint.checkpoints import BestAndLast


def test_fit_leaves_logs_checkpoints_and_its_configuration(trained):
    files = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= files
    assert any(f.startswith("tensorboard/events") for f in files)
    assert not any(f.endswith(".tmp") for f in files)
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert saved["run_dir"] == str(trained)
    assert saved["model"]["init_args"]["moe"]["router"]["init_args"]["top_k"] == 2
    assert saved["seed_everything"] == 0
    with open(trained / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {f"lr-AdamW/{group}" for group in ("router", "experts", "rest", "rest_no_decay")} < set(rows[0])
    for name in ("lr-AdamW/rest", "train/grad_norm", "train/examples_per_second", "train/peak_memory_mib"):
        assert [row["step"] for row in rows if row[name]] == ["0", "1", "2"], name


def content(folder: Path) -> dict[str, bytes]:
    """The files of a run's folder, without those of an earlier run."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    files = {str(p.relative_to(folder)): p.read_bytes() for p in paths}
    return {name: data for name, data in files.items() if not name.startswith("earlier/")}


def test_the_run_is_named_after_its_configurations_and_a_new_one_puts_all_of_it_aside(run, config, capsys):
    Path("small.yaml").write_text("trainer: {limit_train_batches: 1}")
    Path("runs").mkdir()
    run = run.rename("runs/tiny-small")
    of_the_test = {"test.json", "report/load.png"}
    (run / "report").mkdir()
    for name in of_the_test:
        (run / name).write_text("{}")
    before = content(run)
    assert main(["fit", "--config", config, "--config", "small.yaml", "--data.num_classes", "5"]) == 0
    assert "runs/tiny-small held an earlier run: it is in runs/tiny-small/earlier/1 now" in capsys.readouterr().out
    assert content(run / "earlier" / "1") == before
    names = {name for name in content(run) if "events" not in name}
    assert names == {name for name in before if "events" not in name} - of_the_test
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    with open(run / "metrics.csv") as file:
        assert {row["step"] for row in csv.DictReader(file)} == {"0"}
    # The earlier run can be tested where it is.
    assert main(["test", "--ckpt_path", str(run / "earlier" / "1" / "checkpoints" / "best.ckpt")]) == 0
    tested = json.loads((run / "earlier" / "1" / "test.json").read_text())
    assert tested["checkpoint"].startswith("runs/tiny-small/earlier/1/")
    assert "test.json" not in content(run)


def test_a_fit_that_fails_before_its_first_step_leaves_the_earlier_run_whole(run, config, capsys, monkeypatch):
    def broken(self):
        raise ValueError("no data today")

    before, argv = content(run), ["fit", "--config", config, "--run_dir"]
    with monkeypatch.context() as patch:
        patch.setattr(TinyData, "train_dataloader", broken)
        for folder in ("run", "new"):
            assert "no data today" in fails(capsys, 1, *argv, folder, "--data.batch_size", "4")
    assert content(run) == before
    assert not Path("new").exists()
    # One that fails at its first step has nothing to keep.
    for _ in range(2):
        assert "loss is nan" in fails(capsys, 1, *argv, "run", "--model.explode_at", "0")
    kept = content(run / "earlier" / "1")
    assert {name: kept[name] for name in before} == before
    assert not (run / "earlier" / "2").exists()
    assert len(list((run / "tensorboard").glob("events*"))) == 1


def test_a_short_name_a_long_name_and_a_user_s_own_class_are_routers(config, tmp_path):
    def router(*flags: str) -> str:
        return type(build("fit", ["--config", config, *flags]).model.net[3].router.config).__name__

    Path("mine.py").write_text(
        "from dataclasses import dataclass\nimport core\n\n\n@dataclass(frozen=True)\n"
        'class Mine(core.TokenChoice):\n    """One of my own."""\n\n    mood: str = "fine"\n'
    )
    sys.path.insert(0, str(tmp_path))
    try:
        assert router() == "TokenChoice"
        assert router("--model.moe.router", "core.TokenChoice") == "TokenChoice"
        assert router("--model.moe.router", "mine.Mine", "--model.moe.router.mood", "good") == "Mine"
    finally:
        sys.path.remove(str(tmp_path))


def test_later_files_override_earlier_ones_and_flags_both(config):
    Path("over.yaml").write_text("model: {init_args: {moe: {num_experts: 6}, width: 12}}\ntrainer: {max_epochs: 7}")
    cli = build("fit", ["--config", config, "--config=over.yaml", "--model.width", "16", "--data.num_classes=5"])
    assert cli.model.num_classes == 5  # the data decide it
    layer = cli.model.net[3]
    assert layer.router.gate.weight.shape == (6, 16)
    assert layer.experts.w_in.shape == (6, 16, 8)  # hidden_dim is still the first file's
    assert cli.trainer.max_epochs == 7


def test_a_profile_is_written_into_the_run_s_folder(config, capsys):
    argv = ["fit", "--config", config, "--trainer.max_steps", "6", "--run_dir", "run"]
    assert main([*argv, "--trainer.profiler", "pytorch"]) == 0
    assert "profile: run/profile" in capsys.readouterr().out
    assert "moe.experts" in Path("run/profile/fit-profile.txt").read_text()
    message = "trainer.profiler='pytorc' is none of simple, advanced, pytorch"
    assert message in fails(capsys, 1, *argv, "--trainer.profiler", "pytorc")


def test_loggers_and_monitors_of_the_user_s_replace_the_run_s_and_get_all_once(config, monkeypatch):
    calls, keep = [], CSVLogger.log_hyperparams
    monkeypatch.setattr(CSVLogger, "log_hyperparams", lambda self, params: calls.append(params) or keep(self, params))
    own = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "own"]
    own += ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.log_momentum=true"]
    assert main(["fit", "--config", config, "--run_dir", "run", *own]) == 0
    assert list(Path("own").rglob("metrics.csv"))
    assert not Path("run/tensorboard").exists()
    assert calls == [yaml.safe_load(Path("run/config.yaml").read_text())]
    assert calls[0]["model"]["init_args"]["moe"]["num_experts"] == 4
    with open("run/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for name in ("lr-AdamW/rest", "lr-AdamW/rest-momentum"):
        assert [row["step"] for row in rows if row[name]] == ["0", "1", "2"]


def test_a_resumed_run_has_its_own_hyperparameters_in_tensorboard(run, config):
    assert (
        main(["fit", "--config", config, "--run_dir", "run", "--trainer.max_epochs", "2", "--ckpt_path", "last"]) == 0
    )
    saved = yaml.safe_load(Path("run/tensorboard/hparams.yaml").read_text())
    assert saved == yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["trainer"]["max_epochs"] == 2
    events = EventAccumulator("run/tensorboard").Reload()
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model/init_args/moe/num_experts" in start
    assert b"val/loss" in events.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert "hp_metric" not in events.Tags()["scalars"]


def test_a_module_of_the_user_s_own_logs_its_norm_and_its_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "lightning.pytorch.demos.boring_classes.BoringModel", "--trainer.log_every_n_steps", "1"]
    data = ["--data", "lightning.pytorch.demos.boring_classes.BoringDataModule", "--trainer.max_steps", "2"]
    assert main(["fit", *argv, *data, "--run_dir", "run", "--trainer.accelerator", "cpu"]) == 0
    header = Path("run/metrics.csv").read_text().partition("\n")[0].split(",")
    assert {"lr-SGD", "train/grad_norm", "train/peak_memory_mib"} < set(header)


OWN = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/top1", "--trainer.callbacks.mode=max"]
"""A checkpoint callback that is named on the command line."""


def test_callbacks_of_the_user_s_add_to_the_run_s(config, capsys):
    Path("more.yaml").write_text("trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]}")
    argv = ["--config", config, "--config", "more.yaml", "--run_dir", "run", *OWN]
    trainer = build("fit", argv).trainer
    assert [type(c) for c in trainer.checkpoint_callbacks] == [ModelCheckpoint, BestAndLast]
    assert [type(c) for c in trainer.early_stopping_callbacks] == [EarlyStopping]
    # The average is kept beside the last epoch's weights, and is what the run's folder means.
    assert main(["fit", *argv, "--model.average_last", "1"]) == 0
    assert f"ModelCheckpoint: {Path('run/ModelCheckpoint').resolve()}" in capsys.readouterr().out
    assert {p.name for p in Path("run/checkpoints").glob("*.ckpt")} == {"best.ckpt", "last.ckpt", "average.ckpt"}
    (own,) = Path("run/ModelCheckpoint").iterdir()
    assert main(["test", "--ckpt_path", str(own)]) == 0
    assert main(["fit", *argv, "--trainer.fast_dev_run", "true"]) == 0
    assert not Path("run/earlier").exists()


def test_a_single_callback_and_one_that_replaces_best_and_last(config):
    stopping = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    assert len(build("fit", ["--config", config, *stopping]).trainer.early_stopping_callbacks) == 1
    more = ["--trainer.callbacks+=BestAndLast", "--trainer.callbacks.every_n_steps=2", *OWN]
    kept = build("fit", ["--config", config, *more]).trainer.checkpoint_callbacks
    assert [type(c) for c in kept] == [ModelCheckpoint, BestAndLast]
    assert kept[1].every_n_steps == 2


def test_a_checkpoint_callback_in_the_folder_of_best_and_last_is_an_error(config, capsys):
    argv = ["fit", "--config", config, "--run_dir", "run", *OWN, "--trainer.callbacks.dirpath=run/checkpoints"]
    message = "is the folder of the run's own best.ckpt and last.ckpt: give another, or leave it out"
    assert message in fails(capsys, 2, *argv)


def test_a_run_that_begins_with_weights_has_a_folder_of_its_own(run, config, capsys):
    """Without --run_dir: the configuration's, else one by the name of the weights' run; never that of their run."""
    for name in ("tiny", "tiny_tuned", "tiny_tuned/earlier/1", "other"):
        shutil.copytree(run, Path("runs", name), dirs_exist_ok=True)
    Path("other.yaml").write_text(Path(config).read_text())
    own = ["--config", "runs/tiny/config.yaml", "--weights", "runs/tiny/checkpoints/best.ckpt"]
    Path("runs/tiny/config.yaml").write_text(Path("run/config.yaml").read_text().replace(": run\n", ": runs/tiny\n"))
    for words, folder in (
        (["--weights", "runs/tiny"], "runs/tiny_tuned"),
        (["--config", config, "--weights", "runs/tiny"], "runs/tiny_tuned"),
        (own, "runs/tiny_tuned"),
        (["--config", "other.yaml", "--weights", "runs/tiny"], "runs/other"),
        (["--weights", "runs/tiny_tuned"], "runs/tiny_tuned_tuned"),
        (["--weights", "runs/tiny_tuned/earlier/1"], "runs/tiny_tuned_earlier_1_tuned"),
    ):
        assert Request.read("fit", words).run_dir == Path(folder)
    before = content(Path("runs/tiny"))
    capsys.readouterr()
    assert main(["fit", *own, "--trainer.limit_train_batches", "1"]) == 0
    assert capsys.readouterr().out.partition("\n")[0].endswith(" -> runs/tiny_tuned")
    assert yaml.safe_load(Path("runs/tiny_tuned/config.yaml").read_text())["run_dir"] == "runs/tiny_tuned"
    assert content(Path("runs/tiny")) == before
    # What is resumed lies in the same folder.
    resumed = Request.read("fit", ["--config", "other.yaml", "--weights", "runs/tiny", "--ckpt_path", "last"])
    assert resumed.checkpoint == Path("runs/other/checkpoints/last.ckpt")
