"""``moesaic test --sweep``: each form is tested and timed once, and shown in the run's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import fails
from made_page import Html

from apps.base.quiet import quiet
from apps.cli import main, sweep
from apps.cli.train import build
from apps.train.checkpoint.run_folder import mark
from apps.train.cost import cheaper, footprint

FAST = ["--rounds", "2", "--batches", "1"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(footprint, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(cheaper, "CAPACITIES", (0.5,))
    monkeypatch.setattr(cheaper, "SHARES", (0.5, 0.25))


def test_every_form_is_tested_and_shown(trained, capsys):
    argv = ["test", "--config", str(trained / "config.yaml"), "--sweep", *FAST]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    record = json.loads((trained / "sweep.json").read_text())
    own = json.loads((trained / "test.json").read_text())
    first, *others = record["forms"]
    assert first["name"] == "as trained"
    assert first["metrics"] == {k: own[k] for k in ("test/loss", "test/top1")}
    names = [form["name"] for form in others if form["kind"] != cheaper.QUANTIZED]
    assert names == ["top_k=1", "capacity 0.5", "50 % of the experts"]  # a quarter is less than a token takes
    assert record["left_out"] == {"25 % of the experts": "top_k=2 exceeds num_experts=1"}
    assert "25 % of the experts is left out: top_k=2 exceeds num_experts=1" in printed
    by_name = {form["name"]: form for form in record["forms"]}
    # An expert of TinyModule is two matrices of 8 x 8 in float32, and a row of the gate has 8 numbers.
    saved = first["resident"] - by_name["50 % of the experts"]["resident"]
    assert saved == 2 * 4 * (2 * 64 + 8)
    assert all(len(form["seconds"]["8"]["own"]) == 2 for form in record["forms"])
    page = Html((trained / "report.html").read_text())
    assert "Cheaper forms: quality against latency and memory" in page.text
    assert (trained / "sweep.png").is_file()


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on_and_another_one_begins_anew(trained, tmp_path, capsys, monkeypatch):
    config = str(trained / "config.yaml")
    cli = build("test", ["--config", config, "--run_dir", str(tmp_path), "--ckpt_path", str(trained)])
    tested = []
    result = {"test/top1": 0.5, "test/loss": 1.0}
    monkeypatch.setattr(sweep.Sweep, "_tested", lambda self, model: tested.append(model) or result)
    monkeypatch.setattr(sweep.Sweep, "_section", lambda self, measured, left_out: [own.name for own in measured])

    def swept(rounds: int) -> int:
        tested.clear()
        with quiet():
            names = sweep.Sweep(cli, rounds, 1).run(result)
        assert names[:2] == ["as trained", "top_k=1"]
        return len(tested)

    mark(tmp_path)
    every = swept(rounds=1)
    assert every >= 3
    assert swept(rounds=1) == 0
    path = tmp_path / "sweep.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "forms": record["forms"][:2]}))  # the model and one form
    assert swept(rounds=1) == every - 1
    assert swept(rounds=2) == every
    path.write_text("{")
    assert swept(rounds=2) == every
    assert "sweep.json cannot be read: the sweep starts again" in capsys.readouterr().out
    path.unlink()
    (tmp_path / ".moesaic-run").unlink()
    (tmp_path / "sweep.png").touch()
    with pytest.raises(ValueError, match=r"sweep\.png is no run's: it stays as it is"):
        swept(rounds=1)


def test_what_cannot_be_swept_is_one_line(tmp_path, trained, capsys):
    config = str(trained / "config.yaml")
    assert fails(capsys, 2, "validate", "--config", config, "--sweep") == "sweep is an option of test, not of validate"
    assert (
        fails(capsys, 2, "test", "--config", config, "--rounds", "3") == "rounds=3 is an option of moesaic test --sweep"
    )
    line = fails(capsys, 2, "test", "--config", config, "--sweep", "--rounds", "0")
    assert line == "rounds=0 must be at least 1"
    line = fails(capsys, 2, "test", "--config", config, "--sweep", "--batches", "few")
    assert line == "argument --batches: invalid int value: 'few'"
    line = fails(capsys, 2, "test", "--config", config, "--sweep", "--quantize", "int8")
    assert line == "quantize=int8 with sweep, which quantizes the model by itself: leave it out"
    line = fails(capsys, 2, "test", "--config", config, "--ckpt_path", "none", "--sweep")
    assert line == "sweep measures a trained model: give --ckpt_path"
    dense = ["--config", config, "--model.moe", "null", "--run_dir", str(tmp_path / "dense")]
    assert main(["fit", *dense]) == 0
    line = fails(capsys, 1, "test", *dense, "--sweep")
    assert line == "a TinyModule without MoE layers has no experts that could be made cheaper"
    assert not Path(tmp_path / "dense" / "sweep.json").exists()
