"""``moesaic validate``, ``test`` and ``predict`` of a checkpoint: which one, what it remembers, what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import fails
from made_page import Html
from tiny_app import TinyModule

import apps
from apps.cli import main
from apps.cli.train import build


def test_test_prints_the_figures_writes_a_report_and_shows_it_when_asked(trained, tmp_path, capsys, monkeypatch):
    shown, config = [], str(trained / "config.yaml")
    monkeypatch.setattr("webbrowser.open", shown.append)
    assert main(["test", "--config", config, "--open"]) == 0
    assert shown == [(trained / "report.html").resolve().as_uri()]
    device, first, *_, last = capsys.readouterr().out.splitlines()[1:]
    assert device.startswith("device cpu ")
    assert first.startswith("test loss ")  # which the training monitors
    assert last == f"also in {trained / 'test.json'}"
    page = Html((trained / "report.html").read_text())
    for words in ("net.3", "Routing in the test", f"moesaic test --config {config}"):
        assert words in page.text
    own = json.loads((trained / "test.json").read_text())
    assert own["checkpoint"].endswith("best.ckpt")
    assert 0 <= own["test/top1"] <= 1
    # A pretrained folder carries the figures of its run, and is tested.
    apps.load(trained).save_pretrained(tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert f"| top1 | {own['test/top1']:.6g} |" in card
    assert f"| command | moesaic test --config {config} --open |" in card
    assert f"| torch | {torch.__version__} |" in card
    argv = ["--config", config, "--ckpt_path", str(tmp_path / "folder"), "--run_dir", str(tmp_path / "other")]
    assert main(["test", *argv]) == 0
    assert json.loads((tmp_path / "other" / "test.json").read_text())["test/loss"] == own["test/loss"]
    assert fails(capsys, 2, "fit", *argv).endswith(
        "folder has no optimizer state to continue with: start a new run with --weights"
    )
    line = fails(capsys, 2, "validate", "--config", config, "--open")
    assert line.endswith("open is an option of test and predict, not of validate")


def test_a_checkpoint_alone_is_enough_and_predict_writes_a_line_an_example(trained, capsys):
    before = (trained / "metrics.csv").read_bytes()
    assert main(["validate", "--ckpt_path", str(trained / "checkpoints" / "last.ckpt")]) == 0
    assert "top1" in capsys.readouterr().out
    assert (trained / "metrics.csv").read_bytes() == before
    assert main(["predict", "--config", str(trained / "config.yaml"), "--trainer.limit_predict_batches", "2"]) == 0
    lines = (trained / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 16
    assert len(json.loads(lines[0])["output"]) == 3


def test_flags_beat_what_the_checkpoint_remembers_and_the_checkpoint_beats_the_defaults(trained, config):
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] |= {"width": 12, "dropout": 0.5, "moe": None}
    torch.save({**checkpoint, "state_dict": TinyModule(3, width=12).state_dict()}, "other.ckpt")
    argv = ["--config", config, "--model.moe", "null", "--ckpt_path", "other.ckpt"]
    remembered = build("test", argv).model
    assert (remembered.net[2].p, remembered.net[0].out_features) == (0.5, 12)
    assert build("test", [*argv, "--model.dropout", "0.2"]).model.net[2].p == 0.2


def test_a_structural_clash_names_both_values(trained, capsys):
    argv = ["test", "--config", str(trained / "config.yaml"), "--model.moe.num_experts", "6"]
    line = fails(capsys, 1, *argv)
    assert "model.moe.num_experts=4 in the checkpoint, 6 here" in line
    line = fails(capsys, 1, "fit", *argv[1:], "--ckpt_path", "last")
    assert "model.moe.num_experts=4 in the checkpoint, 6 here" in line
    line = fails(capsys, 1, *argv[:3], "--model.moe", "null")
    assert "model.moe" in line


def test_a_run_s_folder_is_a_checkpoint(trained, capsys):
    assert build("test", ["--ckpt_path", str(trained)]).ckpt_path == trained / "checkpoints" / "best.ckpt"
    assert f"configuration: {trained / 'config.yaml'}" in capsys.readouterr().err


def test_a_model_is_loaded_by_opening_its_checkpoint_once(trained, monkeypatch):
    opened, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: (opened.append(path), load(path, **options))[1])
    model = apps.load(trained)
    assert opened == [trained / "checkpoints" / "best.ckpt"]
    assert type(model) is TinyModule
    assert not model.training


@pytest.mark.parametrize("name", ["apps.nlp.gone.Translator", "apps.vision.gone.VisionClassifier"])
def test_a_checkpoint_of_a_class_that_is_gone_is_one_line_that_names_it(trained, capsys, tmp_path, name):
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**checkpoint, "module_class": name}, tmp_path / "old.ckpt")
    flags = ["--ckpt_path", str(tmp_path / "old.ckpt")]
    line = fails(capsys, 1, "test", "--config", str(trained / "config.yaml"), *flags)
    assert line == f"{flags[1]} holds a model of class {name}, and this run's is of class tiny_app.TinyModule"
    with pytest.raises(ValueError, match=f"holds a model of class {name}, which no app has .*; the apps have a apps"):
        apps.load(tmp_path / "old.ckpt")


def test_a_test_whose_report_comes_first_may_be_repeated(config, monkeypatch):
    def report(self):
        Path("new").mkdir(exist_ok=True)
        Path("new", "picture.png").touch()

    monkeypatch.setattr(TinyModule, "on_test_end", report)
    for _ in range(2):
        assert main(["test", "--config", config, "--ckpt_path", "none", "--run_dir", "new"]) == 0
