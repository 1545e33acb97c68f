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
from apps.report.page import html


def test_test_prints_the_figures_and_writes_a_report(trained, capsys, monkeypatch):
    monkeypatch.setattr(html, "script", lambda: "")
    assert main(["test", "--config", str(trained / "config.yaml")]) == 0
    device, first, *_, last = capsys.readouterr().out.splitlines()[1:]
    assert device.startswith("device cpu ")
    assert first.startswith("test loss ")  # which the training monitors
    assert last == f"also in {trained / 'test.json'}"
    page = Html((trained / "report.html").read_text())
    assert "net.3" in page.text
    assert "Routing in the test" in page.text
    assert f"moesaic test --config {trained / 'config.yaml'}" in page.text
    written = json.loads((trained / "test.json").read_text())
    assert written["checkpoint"].endswith("best.ckpt")
    assert 0 <= written["test/top1"] <= 1


def test_a_pretrained_folder_is_tested_and_carries_the_figures_of_its_run(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(html, "script", lambda: "")
    config = str(trained / "config.yaml")
    assert main(["test", "--config", config]) == 0
    apps.load(trained).save_pretrained(tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    own = json.loads((trained / "test.json").read_text())
    assert f"| top1 | {own['test/top1']:.6g} |" in card
    assert f"| command | moesaic test --config {config} |" in card
    assert f"| torch | {torch.__version__} |" in card
    argv = ["--config", config, "--ckpt_path", str(tmp_path / "folder"), "--run_dir", str(tmp_path / "other")]
    assert main(["test", *argv]) == 0
    assert json.loads((tmp_path / "other" / "test.json").read_text())["test/loss"] == own["test/loss"]
    assert fails(capsys, 2, "fit", *argv).endswith(
        "folder has no optimizer state to continue with: start a new run with --weights"
    )


def test_the_report_is_shown_in_the_browser_when_asked(trained, capsys, monkeypatch):
    monkeypatch.setattr(html, "script", lambda: "")
    shown = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    argv = ["--config", str(trained / "config.yaml"), "--open"]
    assert main(["test", *argv]) == 0
    assert shown == [(trained / "report.html").resolve().as_uri()]
    assert fails(capsys, 2, "validate", *argv).endswith("open is an option of test and predict, not of validate")


def test_a_checkpoint_alone_is_enough(trained, capsys):
    before = (trained / "metrics.csv").read_bytes()
    assert main(["validate", "--ckpt_path", str(trained / "checkpoints" / "last.ckpt")]) == 0
    assert "top1" in capsys.readouterr().out
    assert (trained / "metrics.csv").read_bytes() == before


def test_predict_writes_a_line_an_example(trained):
    assert main(["predict", "--config", str(trained / "config.yaml"), "--trainer.limit_predict_batches", "2"]) == 0
    lines = (trained / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 16
    assert len(json.loads(lines[0])["output"]) == 3


def test_flags_beat_what_the_checkpoint_remembers_and_the_checkpoint_beats_the_defaults(trained, config):
    flags = ["--run_dir", "other", "--model.width", "12", "--model.dropout", "0.5"]
    assert main(["fit", "--config", config, *flags]) == 0
    ckpt = ["--ckpt_path", "other/checkpoints/last.ckpt"]
    remembered = build("test", ["--config", config, *ckpt])
    assert remembered.model.net[2].p == 0.5
    assert remembered.model.net[0].out_features == 12
    assert build("test", ["--config", config, *ckpt, "--model.dropout", "0.2"]).model.net[2].p == 0.2


def test_a_structural_clash_names_both_values(trained, capsys):
    argv = ["test", "--config", str(trained / "config.yaml"), "--model.moe.num_experts", "6"]
    line = fails(capsys, 1, *argv)
    assert "model.moe.num_experts=4 in the checkpoint, 6 here" in line
    line = fails(capsys, 1, "fit", *argv[1:], "--ckpt_path", "last")
    assert "model.moe.num_experts=4 in the checkpoint, 6 here" in line
    line = fails(capsys, 1, *argv[:3], "--model.moe", "null")
    assert "model.moe" in line


def test_a_run_s_folder_is_a_checkpoint(trained, capsys):
    assert main(["test", "--ckpt_path", str(trained)]) == 0
    assert f"configuration: {trained / 'config.yaml'}" in capsys.readouterr().err
    assert json.loads((trained / "test.json").read_text())["checkpoint"] == str(trained / "checkpoints" / "best.ckpt")


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
