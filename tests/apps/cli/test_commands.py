"""The command line as a user meets it: what it says, what it returns, what it leaves behind."""

from __future__ import annotations

import csv
import json
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from places import ROOT, environment
from tiny_app import CONFIG, TinyData, TinyModule

import core
from apps.cli import UsageError, main
from apps.cli.errors import reduce_message
from apps.cli.request import Request, merge, with_nulls
from apps.cli.train import build


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``tiny.yaml`` in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return "tiny.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(CONFIG)
    assert main(["fit", "--config", str(folder / "tiny.yaml"), "--run_dir", str(folder / "run")]) == 0
    return folder / "run"


def fails(capsys: pytest.CaptureFixture, code: int, *argv: str) -> str:
    """Run it; it must end with ``code`` and one line on stderr. Returns that line."""
    capsys.readouterr()
    assert main(list(argv)) == code
    lines = [x for x in capsys.readouterr().err.splitlines() if "parameters" not in x]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


# ---- help


def test_help_is_quick_and_lists_what_there_is():
    script = "import sys; from apps.cli import main; main(sys.argv[1:]); exit('torch' in sys.modules)"
    for argv in (["--help"], ["fit", "--help"], []):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script, *argv], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - start < 5  # 0.1 s on an idle machine
    for command in ("fit", "validate", "test", "predict", "data"):
        assert f"  {command} " in done.stdout
    assert "convert" not in done.stdout


def test_another_package_core_is_named(tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "__init__.py").touch()
    env = environment(tmp_path)
    done = subprocess.run([sys.executable, "-m", "apps.cli", "fit"], env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    other = tmp_path / "core" / "__init__.py"
    assert (
        line
        == f"error: the package core must be {ROOT / 'core'}, and Python finds {other}: take that one off PYTHONPATH"
    )


def test_a_configuration_that_came_along_is_taken_where_there_is_none_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "configs/vision/digits.yaml"
    request = Request.read("fit", ["--config", name])
    assert request.config["model"]["class_path"] == "apps.vision.module.VisionClassifier"
    assert request.run_dir == Path("runs/digits")
    assert not capsys.readouterr().err
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text("model: tiny_app.TinyModule\ndata: tiny_app.TinyData")
    assert Request.read("fit", ["--config", name]).config["model"]["class_path"] == "tiny_app.TinyModule"
    for path in ("configs/vision/digit.yaml", "vision/digits.yaml", "configs/../README.md/x"):
        with pytest.raises(UsageError, match=f"no configuration {path}"):
            Request.read("fit", ["--config", path])
    assert not capsys.readouterr().err


# Runs the command line, then says which of the heavy libraries it has imported.
WATCHED = """
import sys
from apps.cli import main
code = main(sys.argv[1:])
heavy = [name for name in ("torch", "lightning", "jsonargparse", "core") if name in sys.modules]
print("imported", *heavy)
sys.exit(code)
"""


def watched(folder: Path, *argv: str) -> tuple[int, str, list[str]]:
    """Return the exit code, stderr, and the heavy libraries that were imported for ``moesaic ARGV`` in ``folder``."""
    command = [sys.executable, "-c", WATCHED, *argv]
    done = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr, done.stdout.splitlines()[-1].split()[1:]


DIGITS = ("--config", "configs/vision/digits.yaml")


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("fitt",), 2, "did you mean 'fit'?"),
        (("fit",), 2, "model, data missing: give a configuration"),
        (("fit", "--config", "nope.yaml"), 2, "no configuration nope.yaml"),
        (("fit", "--config", "broken.yaml"), 2, "broken.yaml, line 1: not valid YAML"),
        (("fit", "--config", "modl.yaml"), 2, "modl.yaml: modl does not exist; did you mean 'model'?"),
        (("fit", "configs/x.yaml"), 2, "'configs/x.yaml': a configuration is given as --config configs/x.yaml"),
        (("fit", *DIGITS, "--model.ema_decy", "0.9"), 2, "model.ema_decy does not exist; did you mean 'ema_decay'?"),
        (("fit", *DIGITS, "--trainer.max_epoch", "1"), 2, "did you mean 'trainer.max_epochs'?"),
        (("fit", *DIGITS, "--modle.moe", "null"), 2, "modle.moe does not exist; did you mean 'model'?"),
        (("fit", *DIGITS, "--data", "VisionDat"), 2, "data=VisionDat does not exist; did you mean 'VisionData'?"),
        (("fit", *DIGITS, "--model", "apps.vision.module.Visin"), 2, "apps.vision.module.Visin does not exist"),
        (("fit", *DIGITS, "--data.root", "nowhere"), 1, "root='nowhere' cannot be read: No such file or directory"),
        (("fit", *DIGITS, "--run_dir", "broken.yaml"), 2, "run_dir=broken.yaml must be a folder, not a file"),
        (("fit", *DIGITS, "--run_dir", "broken.yaml/a"), 2, "not below a file, and broken.yaml is one"),
        (("test", *DIGITS), 1, "no checkpoint in runs/digits/checkpoints"),
        (("test", *DIGITS, "--ckpt_path", "nope.ckpt"), 1, "no checkpoint nope.ckpt"),
        (("predict", *DIGITS, "--output", "x.xls"), 2, "output=x.xls must end in one of .jsonl, .csv, .parquet"),
        (("predict", *DIGITS, "--output", "here.csv"), 2, "here.csv exists: --overwrite replaces it"),
        (("fit", *DIGITS, "--output", "here.csv"), 2, "output is an option of predict, not of fit"),
    ],
)
def test_an_error_of_usage_needs_no_heavy_import(tmp_path, argv, code, message):
    (tmp_path / "broken.yaml").write_text("trainer: [")
    (tmp_path / "modl.yaml").write_text("modl: {}")
    (tmp_path / "here.csv").write_text("earlier predictions")
    status, err, heavy = watched(tmp_path, *argv)
    (line,) = err.splitlines()
    assert (status, heavy) == (code, [])
    assert line.startswith("error: ")
    assert message in line
    assert (tmp_path / "here.csv").read_text() == "earlier predictions"


def test_the_first_line_says_what_starts_before_the_heavy_imports(config, capsys, monkeypatch):
    def stops(*_):
        raise RuntimeError("the imports begin")

    monkeypatch.setattr("apps.cli.checkpoint.find_checkpoint", stops)
    Path("small.yaml").write_text("trainer: {max_epochs: 1}")
    assert main(["fit", "--config", config, "--config", "small.yaml"]) == 1
    assert capsys.readouterr().out == "fit tiny.yaml + small.yaml -> runs/tiny-small\n"
    # A configuration that came along is named where it lies; a second process of a run says nothing.
    assert main(["fit", *DIGITS, "--run_dir", "r"]) == 1
    assert capsys.readouterr().out == f"fit {ROOT / DIGITS[1]} -> r\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["fit", "--config", config]) == 1
    assert not capsys.readouterr().out


def test_configurations_are_packages_of_a_wheel():
    discovery = pytest.importorskip("setuptools.discovery")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = discovery.PEP420PackageFinder.find(str(ROOT), include=settings["packages"]["find"]["include"])
    folders = {str(p.parent.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml")}
    assert {"configs", "configs/routing", "configs/vision"} <= folders
    assert {folder.replace("/", ".") for folder in folders} <= set(packages)
    assert "*.yaml" in settings["package-data"]["*"]


def test_python_dash_m_works():
    done = subprocess.run([sys.executable, "-m", "apps.cli"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: moesaic")


# ---- training


def test_fit_leaves_logs_checkpoints_and_its_configuration(trained):
    files = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= files
    assert any(f.startswith("tensorboard/events") for f in files)
    assert not any(f.endswith(".tmp") for f in files)
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert saved["run_dir"] == str(trained)
    assert saved["model"]["init_args"]["moe"]["router"]["init_args"]["top_k"] == 2
    assert saved["seed_everything"] == 0


def content(folder: Path) -> dict[str, bytes]:
    """The files of a run's folder, without those of an earlier run."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    files = {str(p.relative_to(folder)): p.read_bytes() for p in paths}
    return {name: data for name, data in files.items() if not name.startswith("earlier/")}


def test_the_run_is_named_after_its_configurations_and_a_new_one_puts_all_of_it_aside(config, capsys):
    Path("small.yaml").write_text("trainer: {limit_train_batches: 1}")
    argv, run = ["--config", config, "--config", "small.yaml"], Path("runs/tiny-small")
    assert main(["fit", *argv]) == 0
    assert main(["test", *argv]) == 0
    (run / "report").mkdir()
    (run / "report" / "load.png").write_bytes(b"a picture")
    before = content(run)
    assert {"test.json", "checkpoints/last.ckpt", "config.yaml", "metrics.csv"} < set(before)
    assert main(["fit", *argv, "--data.num_classes", "5"]) == 0
    assert "runs/tiny-small held an earlier run: it is in runs/tiny-small/earlier now" in capsys.readouterr().out
    assert content(run / "earlier") == before
    names = {name for name in content(run) if "events" not in name}
    assert names == {name for name in before if "events" not in name} - {"test.json", "report/load.png"}
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    with open(run / "metrics.csv") as file:
        assert {row["step"] for row in csv.DictReader(file)} == {"0"}
    # A resumed run moves nothing, and the earlier run can be tested and gone on with where it is.
    now = content(run)
    assert main(["fit", *argv, "--ckpt_path", "last", "--data.num_classes", "5", "--trainer.max_epochs", "2"]) == 0
    assert content(run / "earlier") == before
    assert content(run).keys() > now.keys()
    assert main(["test", "--ckpt_path", str(run / "earlier" / "checkpoints" / "best.ckpt")]) == 0
    assert json.loads((run / "earlier" / "test.json").read_text())["checkpoint"].startswith("runs/tiny-small/earlier/")
    assert "test.json" not in content(run)


def test_a_fit_that_fails_before_its_first_step_leaves_the_earlier_run_whole(config, capsys, monkeypatch):
    def broken(self):
        raise ValueError("no data today")

    run = Path("runs/tiny")
    assert main(["fit", "--config", config]) == 0
    before = content(run)
    with monkeypatch.context() as patch:
        patch.setattr(TinyData, "train_dataloader", broken)
        assert "no data today" in fails(capsys, 1, "fit", "--config", config, "--data.batch_size", "4")
        assert "no data today" in fails(capsys, 1, "fit", "--config", config, "--run_dir", "runs/new")
    assert content(run) == before
    assert not Path("runs/new").exists()
    # One that fails after it is put aside with nothing, for it left no checkpoint: the run before stays.
    assert "loss is nan" in fails(capsys, 1, "fit", "--config", config, "--model.explode_at", "0")
    assert "loss is nan" in fails(capsys, 1, "fit", "--config", config, "--model.explode_at", "0")
    kept = content(run / "earlier")
    assert {name: kept[name] for name in before} == before
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


def test_what_the_data_decides_reaches_the_model(config):
    cli = build("fit", ["--config", config, "--data.num_classes", "5"])
    assert cli.model.num_classes == 5


def test_later_files_override_earlier_ones_and_flags_both(config):
    Path("over.yaml").write_text("model: {init_args: {moe: {num_experts: 6}, width: 12}}\ntrainer: {max_epochs: 7}")
    cli = build("fit", ["--config", config, "--config=over.yaml", "--model.width", "16"])
    layer = cli.model.net[3]
    assert layer.router.gate.weight.shape == (6, 16)
    assert layer.experts.w_in.shape == (6, 16, 8)  # hidden_dim is still the first file's
    assert cli.trainer.max_epochs == 7


# ---- evaluation


def test_test_prints_a_table_and_writes_it(trained, capsys):
    assert main(["test", "--config", str(trained / "config.yaml")]) == 0
    out = capsys.readouterr().out
    assert "top1" in out
    assert "net.3" in out
    written = json.loads((trained / "test.json").read_text())
    assert written["checkpoint"].endswith("best.ckpt")
    assert 0 <= written["test/top1"] <= 1


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


# ---- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.moe.num_expert", "8"], "model.moe.num_expert does not exist; did you mean 'num_experts'?"),
        (["--model.moe.num_experts", "many"], "model.moe.num_experts=many is not of type int"),
        (["--model.moe.router", "TokenChoic"], "router=TokenChoic does not exist; did you mean 'TokenChoice'?"),
        (["--model.moe.router", "core.TokenChoic"], "core.TokenChoic does not exist; did you mean 'core.TokenChoice'?"),
        (["--model.moe.expert", "core.FNN"], "model.moe.expert=core.FNN does not exist; did you mean 'core.FFN'?"),
        (["--model.moe.router", "coer.Hash"], "router=coer.Hash does not exist: No module named 'coer'; did you mean"),
        (["--trainer.logger", "CSVLoger"], "trainer.logger=CSVLoger does not exist; did you mean 'CSVLogger'?"),
        (["--trainer.callbacks", "ModelChekpoint"], "callbacks=ModelChekpoint does not exist; did you mean 'ModelC"),
        (["--model.moe.router.topk", "1"], "model.moe.router.topk does not exist; did you mean 'top_k'?"),
        (["--model.moe.router", "core.Hash"], "model.moe.router needs vocab_size, which has no default"),
        (["--model.wdth", "8"], "model.wdth does not exist; did you mean 'width'?"),
        (["--trainer.max_epoch", "8"], "trainer.max_epoch does not exist; did you mean 'trainer.max_epochs'?"),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs=x is not of type int"),
        (["--trainer.gradient_clip_val", "x"], "trainer.gradient_clip_val=x is not one of int, float"),
        (["--seed_everything", "abc"], "seed_everything=abc is not one of bool, int"),
        (["--trainer.precision", "half"], "trainer.precision=half is not one of 64, 32, 16, transformer-engine, "),
        (["--model.optimizer.name", "sgd"], "model.optimizer.name=sgd is not one of adamw, muon"),
        (["--trainer.max_epochs"], "trainer.max_epochs"),
        (["--nonsense", "1"], "nonsense does not exist"),
        (["stray"], "unexpected argument 'stray': options are written --key value"),
        (["--config", "tny.yaml"], "no configuration tny.yaml; did you mean tiny.yaml?"),
        (["--config"], "--config needs a value"),
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
        ("modl: {class_path: tiny_app.TinyModule}", "modl"),
        ("trainer: {max_stps: 3}", "trainer.max_stps does not exist; did you mean 'trainer.max_steps'?"),
        ("trainer: {max_epochs: 3", "wrong.yaml, line 1: not valid YAML"),
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
        (["--ckpt_path", "nope.ckpt"], "no checkpoint nope.ckpt"),
        (["--ckpt_path", "tiny.yaml"], "tiny.yaml is not a readable checkpoint"),
    ],
)
def test_what_cannot_run_is_one_line_that_names_the_value(config, capsys, flags, message):
    assert message in fails(capsys, 1, "fit", "--config", config, *flags)


def test_other_wrong_commands(config, capsys, tmp_path):
    assert "did you mean 'fit'?" in fails(capsys, 2, "fitt")
    assert "not available in this version" in fails(capsys, 2, "convert", "upcycle")
    assert "give a configuration" in fails(capsys, 2, "fit")
    assert "no checkpoint in runs/tiny/checkpoints" in fails(capsys, 1, "test", "--config", config)
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


def test_no_disk_space_is_one_line_and_the_old_checkpoint_stays(config, capsys):
    """A limit on the size of a file stands for a full disk: the checkpoint is the largest file of the run."""
    assert main(["fit", "--config", config]) == 0
    folder = Path("runs/tiny/checkpoints")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    limit = before["last.ckpt"].__len__() // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        line = fails(capsys, 1, "fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write the checkpoint" in line
    assert "File too large; the earlier one is intact" in line
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("limit", "what"), [(64, r".*/config\.yaml"), (8192, "runs/tiny/tensorboard")], ids=["first_file", "mid_epoch"]
)
def test_a_full_disk_is_one_line_that_names_what_could_not_be_written(config, capsys, monkeypatch, limit, what):
    """TensorBoard's file grows the fastest. It is written in a thread, whose traceback would be told as well."""
    uncaught: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    Path("runs").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        line = fails(capsys, 1, "fit", "--config", config, "--data.n", "2400")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
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


# ---- the parts


def test_merging_goes_mapping_by_mapping_and_drops_another_class_s_arguments():
    base = {"router": {"class_path": "core.TokenChoice", "init_args": {"top_k": 1, "noise": "fixed"}}, "n": 1}
    assert merge(base, {"router": {"init_args": {"top_k": 2}}})["router"]["init_args"] == {"top_k": 2, "noise": "fixed"}
    assert merge(base, {"router": {"class_path": "TokenChoice"}})["router"]["init_args"]["top_k"] == 1
    other = {"class_path": "ExpertChoice", "init_args": {"capacity_factor": 2.0}}
    assert merge(base, {"router": other}) == {"router": other, "n": 1}
    assert merge(base, {"router": "ExpertChoice"})["router"] == {"class_path": "ExpertChoice"}
    assert merge(base, {"n": None})["n"] is None
    assert merge({"moe": None}, {"moe": {"num_experts": 4}}) == {"moe": {"num_experts": 4}}
    assert base["n"] == 1


def test_null_reaches_any_depth():
    config = {"model": {"class_path": "V", "init_args": {"moe": {"capacity_factor": 1.0, "router": "TokenChoice"}}}}
    argv = ["--trainer.logger", "false", "--model.moe.capacity_factor", "null", "--model.moe=null", "--print_config"]
    merged, rest = with_nulls(config, argv)
    assert merged["model"]["init_args"]["moe"] == {"capacity_factor": None, "router": "TokenChoice"}
    assert rest == ["--trainer.logger", "false", "--model.moe=null", "--print_config"]
    # Where there is nothing to set it in, the flag stays, to be refused by name.
    for flag in ("--model.mo.capacity_factor=null", "--model.init_args.moe.router.mood=~"):
        assert with_nulls(config, [flag]) == (config, [flag])
    deep = with_nulls(config, ["--model.init_args.moe.capacity_factor=~"])
    assert deep == (merged, [])


def test_a_nested_null_is_taken(config):
    flags = ["--model.moe.capacity_factor", "1.5", "--model.moe.eval_capacity_factor", "null"]
    moe = build("fit", ["--config", config, *flags]).model.hparams["moe"]
    assert (moe["capacity_factor"], moe["eval_capacity_factor"]) == (1.5, None)


def test_jsonargparse_s_fifteen_lines_become_one():
    text = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'tiny_app.TinyModule':
        Parser key "moe":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'core.MoEConfig'>, <class 'NoneType'>]
          Errors:
            - Problem with given class_path 'core.MoEConfig':
                Option 'num_expert' is not accepted
            - Expected a <class 'NoneType'>
          Given value type: <class 'dict'>
          Given value: {'num_expert': 8}
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'tiny_app.TinyModule'}"""
    assert reduce_message(text) == "model.moe.num_expert does not exist; did you mean 'num_experts'?"


def test_a_configuration_that_came_along_is_suggested_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "configs/vision/digit.yaml"]) == 2
    assert "did you mean configs/vision/digits.yaml?" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["file", "flag", "flag and option"])
def test_a_class_that_is_named_has_its_own_defaults_and_not_those_of_the_one_before(config, by):
    # TinyModule's expert is FFN(hidden_dim=8), and MoEConfig's own one computes GELU; SwiGLU's default is SiLU.
    flags = ["--model.moe.expert", "core.SwiGLU"]
    if by == "file":
        Path("over.yaml").write_text("model: {init_args: {moe: {expert: {class_path: core.SwiGLU}}}}")
        flags = ["--config", "over.yaml"]
    elif by == "flag and option":
        flags += ["--model.moe.expert.hidden_dim", "16"]
    made = build("fit", ["--config", config, *flags]).model.hparams["moe"]["expert"]
    assert made["class_path"].endswith("SwiGLU")
    assert core.registered_config(made["class_path"])(**made["init_args"]) == core.SwiGLU(
        **({"hidden_dim": 16} if by == "flag and option" else {})
    )
