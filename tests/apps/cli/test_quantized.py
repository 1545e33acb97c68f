"""``--quantize`` of the command line, and quantized models that are saved."""

from __future__ import annotations

import json

import pytest
import torch
from commands import fails
from made_page import Html

import apps
from apps.cli import main
from apps.cli.train import build
from apps.train.cost.quantizing import quantize_model, read_form


def test_a_word_is_read():
    assert [read_form(word) for word in ("int8", "int4", "int4:64")] == [(8, None), (4, None), (4, 64)]
    for word in ("int3", "int4:", "int4:0", "8", "INT8", "int4:-8"):
        with pytest.raises(ValueError, match=f"quantize={word} is not one of int8, int4"):
            read_form(word)


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
