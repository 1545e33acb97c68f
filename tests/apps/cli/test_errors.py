"""An error ends in one line that names its cause, and leaves the files of before."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path

import pytest
import torch
import yaml
from commands import fails, full_disk
from PIL import Image
from tiny_app import CONFIG, TinyModule

from apps.cli import main
from apps.cli.configs import merge
from apps.cli.errors import describe


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.moe.num_expert", "8"], "model.moe.num_expert does not exist; did you mean 'num_experts'?"),
        (["--model.moe.num_experts", "many"], "model.moe.num_experts=many is not of type int"),
        (["--model.moe.router", "TokenChoic"], "router=TokenChoic does not exist; did you mean 'TokenChoice'?"),
        (["--model.moe.router", "core.TokenChoic"], "no attribute 'TokenChoic'; did you mean 'TokenChoice'?"),
        (["--model.moe.expert", "core.FNN"], "model.moe.expert=core.FNN does not exist: module 'core' has "),
        (
            ["--model.moe.router", "coer.Hash"],
            "router=coer.Hash does not exist: No module named 'coer', neither installed, nor",
        ),
        (["--trainer.logger", "CSVLoger"], "trainer.logger=CSVLoger does not exist; did you mean 'CSVLogger'?"),
        (["--trainer.callbacks", "ModelChekpoint"], "callbacks=ModelChekpoint does not exist; did you mean 'ModelC"),
        (["--model.moe.router.topk", "1"], "model.moe.router.topk does not exist; did you mean 'top_k'?"),
        (["--model.moe.router", "core.Hash"], "model.moe.router needs vocab_size, which has no default"),
        (["--model.wdth", "8"], "model.wdth does not exist; did you mean 'width'?"),
        (
            ["--model", "apps.nlp.gone.Translator"],
            "apps.nlp.gone.Translator does not exist: No module named 'apps.nlp.gone'",
        ),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs=x is not of type int"),
        (["--trainer.gradient_clip_val", "x"], "trainer.gradient_clip_val=x is not one of "),
        (["--seed_everything", "abc"], "seed_everything=abc is not one of bool, int"),
        (["--trainer.precision", "half"], "trainer.precision=half is not one of 64, 32, 16, transformer-engine, "),
        (["--model.optimizer.name", "sgd"], "model.optimizer.name=sgd is not one of adamw, muon, row_adam"),
        (["--trainer.max_epochs"], "trainer.max_epochs"),
        (["--nonsense", "1"], "nonsense does not exist"),
        (["stray"], "unexpected argument 'stray': options are written --key value"),
        (["--config", "tny.yaml"], "no configuration tny.yaml; did you mean tiny.yaml?"),
        (["--config"], "argument --config/-c: expected one argument"),
        (["--trainer.max_epoch", "1"], "trainer.max_epoch does not exist; did you mean 'max_epochs'?"),
        (["--data", "VisionDat"], "data=VisionDat does not exist; did you mean 'VisionData'?"),
        (["--model", "Tinny"], "model=Tinny does not exist"),
        (["--trainer.default_root_dir", "r1"], "trainer.default_root_dir=r1 would split the run: give --run_dir"),
        (["--model.num_classes", "7"], "model.num_classes=7 does not fit the data, whose num_classes is 3"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_option(config, capsys, flags, message):
    assert message in fails(capsys, 2, "fit", "--config", config, *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {init_args: {wdth: 3}}", "model.wdth does not exist; did you mean 'width'?"),
        ("model: {class_path: tiny_app.TinyModul}", "TinyModul"),
        ("model: {class_path: nowhere.Model}", "No module named 'nowhere'"),
        (
            "trainer: {strategy: {class_path: apps.gone.TorchRecStrategy}}",
            "strategy=apps.gone.TorchRecStrategy does not exist: No module",
        ),
        ("trainer: {max_stps: 3}", "trainer.max_stps does not exist; did you mean 'max_steps'?"),
        ("just words", "wrong.yaml is not a configuration"),
    ],
)
def test_a_wrong_configuration_is_one_line(config, capsys, text, message):
    Path("wrong.yaml").write_text(text)
    assert message in fails(capsys, 2, "fit", "--config", config, "--config", "wrong.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.moe.router.top_k", "9"], "top_k=9 exceeds num_experts=4"),
        (["--model.moe.capacity_factor", "-1"], "capacity_factor=-1"),
        (["--model.width", "7"], "width=7 is not even"),
        (["--model.optimizer.lr", "-1"], "optimizer.lr=-1"),
        (["--data.batch_size", "0"], "batch_size=0 must be at least 1"),
        (["--model.explode_at", "1"], "the training loss is nan at step 2"),
        (["--trainer.max_epochs", "-5"], "max_epochs"),
        (["--trainer.accelerator", "tpuu"], "tpuu"),
        (["--ckpt_path", "tiny.yaml"], "tiny.yaml is not a readable checkpoint"),
    ],
)
def test_what_cannot_run_is_one_line_that_names_the_value(config, capsys, flags, message):
    assert message in fails(capsys, 1, "fit", "--config", config, *flags)


WRONG = {
    "wdth": ("3", "model.wdth does not exist; did you mean 'width'?", 2),
    "width": ("wide", "model.width=wide is not of type int", 2),
    "ema_decay": ("2.0", "model.ema_decay=2.0 is not in (0, 1)", 1),
}
"""By argument of the model: a wrong value, what is said, and the exit code."""


@pytest.mark.parametrize("argument", WRONG)
@pytest.mark.parametrize("origin", ["file", "overlay", "flag", "checkpoint"])
def test_a_wrong_key_type_or_range_is_named_with_its_origin(run, capsys, origin, argument):
    value, message, code = WRONG[argument]
    values = yaml.safe_load(f"model: {{init_args: {{{argument}: {value}}}}}")
    Path("wrong.yaml").write_text(yaml.safe_dump(merge(yaml.safe_load(CONFIG), values) if origin == "file" else values))
    words, start = {
        "file": (["fit", "--config", "wrong.yaml"], "wrong.yaml: "),
        "overlay": (["fit", "--config", "tiny.yaml", "--config", "wrong.yaml"], "wrong.yaml: "),
        "flag": (["fit", "--config", "tiny.yaml", f"--model.{argument}", value], "--"),
        "checkpoint": (["test", "--config", "tiny.yaml", "--ckpt_path", "wrong.ckpt"], "wrong.ckpt: "),
    }[origin]
    if origin == "checkpoint":
        contents = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        contents["hyper_parameters"][argument] = yaml.safe_load(value)
        torch.save(contents, "wrong.ckpt")
        if argument == "wdth":  # a checkpoint is data: its arguments are checked before a parser sees them
            message, code = "model: TinyModule has no field 'wdth'; did you mean 'width'?", 1
    assert fails(capsys, code, *words).splitlines()[-1] == f"{start}{message}"


def test_other_wrong_commands(capsys):
    assert "arguments are required: --ckpt_path" in fails(capsys, 2, "convert", "upcycle")
    assert "'fashion_mnist'" in fails(capsys, 1, "data", "prepare", "fashion_mnits")
    assert "list|prepare" in fails(capsys, 2, "data")


def test_a_damaged_checkpoint_is_one_line(trained, capsys, tmp_path):
    whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("text", b"hello")):
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        line = fails(capsys, 1, "test", "--config", str(trained / "config.yaml"), "--ckpt_path", str(path))
        assert f"{path} is not a readable checkpoint" in line
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    argv = ["test", "--config", str(trained / "config.yaml"), "--ckpt_path", str(tmp_path / "other.ckpt")]
    assert "is not a checkpoint of a training run" in fails(capsys, 1, *argv)


def test_a_bug_is_one_line_too_and_the_traceback_can_be_had(config, capsys, monkeypatch):
    def broken(self, batch):
        raise KeyError("gone")

    monkeypatch.setattr(TinyModule, "task_loss", broken)
    assert "KeyError: 'gone' (--traceback shows where)" in fails(capsys, 1, "fit", "--config", config)
    assert main(["fit", "--config", config, "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_no_disk_space_is_one_line_and_the_old_checkpoint_stays(run, config, capsys):
    """The checkpoint is the largest file of the run."""
    before = {p.name: p.read_bytes() for p in Path("run/checkpoints").iterdir()}
    argv = ["fit", "--config", config, "--run_dir", "run", "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    with full_disk(len(before["last.ckpt"]) // 2):
        line = fails(capsys, 1, *argv)
    assert "cannot write the checkpoint" in line
    assert "File too large; the earlier one is intact" in line
    assert {p.name: p.read_bytes() for p in Path("run/checkpoints").iterdir()} == before


@pytest.mark.parametrize(
    ("limit", "what"), [(64, "runs/tiny/tensorboard"), (8192, "runs/tiny/tensorboard")], ids=["first_file", "mid_epoch"]
)
def test_a_full_disk_is_one_line_that_names_what_could_not_be_written(config, capsys, monkeypatch, limit, what):
    """TensorBoard's file grows the fastest. It is written in a thread, whose traceback would be printed as well."""
    uncaught: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    Path("runs").mkdir()
    with full_disk(limit):
        line = fails(capsys, 1, "fit", "--config", config, "--data.n", "2400")
    assert re.fullmatch(f"{what}: File too large", line)
    assert not uncaught
    assert not list(Path("runs").rglob("*.tmp"))


def test_an_error_in_a_worker_is_told_without_its_traceback(config, capsys):
    """torch puts the worker's traceback into the message."""
    images = "data: {class_path: VisionData, init_args: {dataset: image_folder, root: images, image_size: 8}}\n"
    Path("images.yaml").write_text(images)
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png"):
        Path("images", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(Path("images", name))
    cut = Path("images/train/b/0.png")
    cut.write_bytes(cut.read_bytes()[:20])
    more = ("--config", "images.yaml", "--data.val_size", "0", "--data.num_workers", "1")
    line = fails(capsys, 1, "fit", "--config", config, *more)
    assert line.startswith("images/train/b/0.png is corrupt: ")
    assert "Traceback" not in line


def test_an_interrupt_is_one_line(config, capsys, monkeypatch):
    def interrupted(self, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(TinyModule, "task_loss", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main(["fit", "--config", config]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err.strip().startswith("interrupted")


def test_what_a_library_lacks_is_one_line():
    for name in ("torchrec", "fbgemm_gpu"):
        line = f"embedding tables need {name}, which is not installed: it is for Linux on x86-64"
        assert describe(ModuleNotFoundError(f"No module named {name!r}", name=name)) == (line, 1)
    line, code = describe(ImportError("libparquet.so.2600: failed to map segment from shared object"))
    assert (line, code) == describe(MemoryError())
    assert code == 1
    assert line.startswith("out of memory")
