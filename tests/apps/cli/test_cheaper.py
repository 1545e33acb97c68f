"""``--quantize`` and ``test --sweep``: cheaper forms are tested, timed, shown in the run's report, and saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import fails
from made_page import Html

import apps
from apps.base.quiet import quiet
from apps.cli import main, sweep
from apps.cli.train import build
from apps.train.checkpoint.run_folder import mark
from apps.train.cost import cheaper, footprint
from apps.train.cost.quantizing import quantize_model, read_form


def test_a_test_of_quantized_experts_says_so(trained, tmp_path, monkeypatch, capsys):
    argv = ["--config", str(trained / "config.yaml"), "--ckpt_path", str(trained)]
    assert main(["test", *argv, "--run_dir", str(tmp_path / "plain")]) == 0
    assert main(["test", *argv, "--run_dir", str(tmp_path / "own"), "--quantize", "int4:4"]) == 0
    plain, own = (json.loads((tmp_path / name / "test.json").read_text()) for name in ("plain", "own"))
    # 4 experts of 8 x 8 and 8 x 8 numbers: half a byte each, and 2 groups of 8 channels with 4 bytes.
    assert own["quantized"] == {"experts": "int4:4", "bytes_before": 4 * 128 * 4, "bytes_after": 4 * 2 * (32 + 64)}
    assert "quantized" not in plain
    assert own["test/loss"] != plain["test/loss"]
    assert own["test/loss"] == pytest.approx(plain["test/loss"], rel=0.1)
    assert "experts in int4:4: 768 bytes in place of 2,048" in " ".join(capsys.readouterr().out.split())
    assert "experts in int4:4" in Html((tmp_path / "own" / "report.html").read_text()).text
    # The card of the model itself has none of these figures.
    apps.load(trained).save_pretrained(tmp_path / "folder", run=tmp_path / "own")
    assert "is of experts in int4:4" in (tmp_path / "folder" / "README.md").read_text()


def test_a_prediction_is_that_of_the_quantized_model(trained, tmp_path):
    argv = ["predict", "--config", str(trained / "config.yaml"), "--output", str(tmp_path / "own.jsonl")]
    assert main([*argv, "--quantize", "int8", "--trainer.limit_predict_batches", "1"]) == 0
    written = [json.loads(line)["output"] for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    model = apps.load(trained)
    data = build("predict", ["--config", str(trained / "config.yaml")]).datamodule
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    with torch.no_grad():
        plain = model.predict_step(batch, 0)
        expected = quantize_model(model, "int8").predict_step(batch, 0)
    torch.testing.assert_close(torch.tensor(written), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize(
    ("command", "how", "rule"),
    [
        ("test", "int3", "quantize=int3 is not one of int8, int4, or either with a group size, such as int4:64"),
        ("fit", "int8", "quantize is an option of test and predict, not of fit"),
        ("validate", "int8", "quantize is an option of test and predict, not of validate"),
    ],
)
def test_other_words_and_commands_are_refused(trained, capsys, command, how, rule):
    assert fails(capsys, 2, command, "--config", str(trained / "config.yaml"), "--quantize", how).endswith(rule)
    assert [read_form(word) for word in ("int8", "int4", "int4:64")] == [(8, None), (4, None), (4, 64)]
    for word in ("int3", "int4:", "int4:0", "8", "INT8", "int4:-8"):
        with pytest.raises(ValueError, match=f"quantize={word} is not one of int8, int4"):
            read_form(word)


def test_a_group_that_does_not_divide_is_named(trained, tmp_path, capsys):
    argv = ["--config", str(trained / "config.yaml"), "--run_dir", str(tmp_path), "--ckpt_path", str(trained)]
    line = fails(capsys, 1, "test", *argv, "--quantize", "int4:5")
    assert "experts.w_in cannot be quantized: group_size=5 does not divide the 8 inputs" in line


def test_a_quantized_model_is_tested_and_not_trained(trained, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "small"
    quantize_model(apps.load(trained), "int4").save_pretrained(folder)
    argv = ["--config", str(trained / "config.yaml"), "--run_dir", str(tmp_path / "run")]
    how = f"0.5:{tmp_path / 'experts.safetensors'}"
    assert main(["test", *argv, "--ckpt_path", str(folder), "--offload", how]) == 0
    own = json.loads((tmp_path / "run" / "test.json").read_text())["offloaded"]
    assert (own["slots"], own["experts"]) == (2, 4)
    line = fails(capsys, 2, "fit", *argv, "--weights", str(folder))
    assert "has experts in int4, which do not train" in line
    line = fails(capsys, 1, "test", *argv, "--ckpt_path", str(folder), "--quantize", "int8")
    assert "are quantized already" in line


@pytest.mark.parametrize(("strategy", "waits"), [("auto", True), ("ExpertParallelStrategy", False)])
def test_experts_wait_for_a_checkpoint_that_is_read_before_the_model_is_moved(trained, strategy, waits):
    argv = ["--config", str(trained / "config.yaml"), "--ckpt_path", str(trained)]
    model = build("test", [*argv, "--offload", "0.5:experts.safetensors", "--trainer.strategy", strategy]).model
    assert {p.is_meta for n, p in model.named_parameters() if ".experts." in n} == {waits}
    assert not any(p.is_meta for n, p in model.named_parameters() if ".experts." not in n)


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
