"""A command says what it starts, imports nothing heavy before a usage error is known, and leaves a clean terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from places import ROOT, environment
from tiny_app import CONFIG

from apps.cli import main


def test_help_needs_no_torch_and_lists_what_there_is():
    script = "import sys; from apps.cli import main; main(sys.argv[1:]); exit('torch' in sys.modules)"
    for argv in (["--help"], ["fit", "--help"], ["data", "list"], []):
        done = subprocess.run([sys.executable, "-c", script, *argv], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for command in ("fit", "validate", "test", "predict", "convert", "data"):
        assert f"  {command} " in done.stdout


# Our packages are found last, as in an editable install: a folder without an __init__.py goes before them too.
LAST = f"""
import importlib.machinery, runpy, sys
class Ours:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(name, ["/".join([{str(ROOT)!r}, *name.split(".")[:-1]])])
sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder) + 1, Ours())
"""


@pytest.mark.parametrize(("name", "file"), [("core", "__init__.py"), ("apps", "notes.txt")])
def test_a_package_that_hides_one_of_ours_is_named_beside_ours(name, file, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).touch()
    here = f"the package {name} must be {ROOT / name}, and Python finds {tmp_path / name}: "
    scripts = ["import moesaic; moesaic.fit", "import moesaic; moesaic.TokenChoice"]
    scripts += ["import apps; apps.load"] if name == "core" else []  # else it is the user's
    scripts += ["from apps.cli import main; sys.exit(main(['fit']))"]
    for script in scripts:
        argv, env = [sys.executable, "-c", LAST + script], {**environment(), "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(argv, env=env, cwd="/", capture_output=True, text=True)
        *before, line = done.stderr.splitlines()
        is_command = "main" in script
        assert line.startswith(f"{'error' if is_command else 'ImportError'}: {here}"), done.stderr
        assert (before == []) == is_command
        assert done.returncode == 1 + is_command


DIGITS = ("--config", "configs/vision/digits.yaml")
WRONG = [
    (("fitt",), 2, "did you mean 'fit'?"),
    (("fit",), 2, "model, data missing: give a configuration"),
    (("fit", "--config", "nope.yaml"), 2, "no configuration nope.yaml"),
    (("fit", "--config", "broken.yaml"), 2, "broken.yaml, line 1: not valid YAML"),
    (("fit", "--config", "modl.yaml"), 2, "modl.yaml: modl does not exist; did you mean 'model'?"),
    (("fit", "configs/x.yaml"), 2, "'configs/x.yaml': a configuration is given as --config configs/x.yaml"),
    (("fit", *DIGITS, "--modle.moe", "null"), 2, "modle.moe does not exist; did you mean 'model'?"),
    (("fit", *DIGITS, "--run_dir", "broken.yaml"), 2, "broken.yaml is a file, not a folder"),
    (("fit", *DIGITS, "--run_dir", "broken.yaml/a"), 2, "broken.yaml is a file, not a folder, below which broken"),
    (("fit", *DIGITS, "--trainer.max_epoch", "3"), 2, "--trainer.max_epoch does not exist; did you mean 'max_epochs'?"),
    (("fit", *DIGITS, "--trainer.max_epochs=three"), 2, "--trainer.max_epochs=three is not of type int"),
    (("fit", *DIGITS, "--config", "key.yaml"), 2, "key.yaml: data.subsets does not exist; did you mean 'subset'?"),
    (("fit", *DIGITS, "--config", "type.yaml"), 2, "type.yaml: model.ema_decay=half is not of type float"),
    (("test", *DIGITS), 1, "no checkpoint in runs/digits/checkpoints"),
    (("test", *DIGITS, "--ckpt_path", "nope.ckpt"), 1, "no checkpoint nope.ckpt"),
    (("predict", *DIGITS, "--output", "x.xls"), 2, "output=x.xls must end in one of .jsonl, .csv, .parquet"),
    (("predict", *DIGITS, "--output", "here.csv"), 2, "here.csv exists: --overwrite replaces it"),
    (("fit", *DIGITS, "--output", "here.csv"), 2, "output is an option of predict, not of fit"),
]

# Runs each command line of its argument, and says which of the heavy libraries have been imported after it.
WATCHED = """
import contextlib, io, json, sys
from apps.cli import main
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(argv)
    heavy = [name for name in ("torch", "lightning", "jsonargparse", "core") if name in sys.modules]
    print(json.dumps([code, said.getvalue(), heavy]))
"""


def test_an_error_of_usage_needs_no_heavy_import(tmp_path):
    (tmp_path / "broken.yaml").write_text("trainer: [")
    (tmp_path / "modl.yaml").write_text("modl: {}")
    (tmp_path / "key.yaml").write_text("data: {init_args: {subsets: 3}}")
    (tmp_path / "type.yaml").write_text("model: {init_args: {ema_decay: half}}")
    (tmp_path / "here.csv").write_text("earlier predictions")
    command = [sys.executable, "-c", WATCHED, json.dumps([argv for argv, *_ in WRONG])]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for (argv, code, message), (status, err, heavy) in zip(WRONG, results, strict=True):
        assert (status, heavy) == (code, []), argv
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
    assert (tmp_path / "here.csv").read_text() == "earlier predictions"


def test_a_folder_whose_name_the_locale_cannot_encode_is_rejected_at_once(tmp_path):
    """Python reads the bytes of UTF-8 as surrogates there, which TensorBoard would reject after the heavy imports."""
    env = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    name = "l\u00e4uft".encode()  # l, two bytes, u, f, t
    (tmp_path / "l\u00e4uft.yaml").write_text("{}")
    argv = [["fit", *DIGITS, "--run_dir", name], ["fit", "--config", name + b".yaml"]]
    script = WATCHED.replace("json.loads(sys.argv[1])", "[sys.argv[1:]]")
    for words, value in zip(argv, (r"l\udcc3\udca4uft", r"runs/l\udcc3\udca4uft"), strict=True):
        done = subprocess.run([sys.executable, "-c", script, *words], env=env, cwd=tmp_path, capture_output=True)
        code, said, heavy = json.loads(done.stdout)
        assert (code, heavy) == (2, [])
        assert said == (
            f"error: '{value}' is no name in ascii, the encoding of this locale: give another, or set LC_ALL=C.UTF-8\n"
        )


def test_the_first_line_says_what_starts_before_the_heavy_imports(config, capsys, monkeypatch):
    def stops(*_):
        raise RuntimeError("the imports begin")

    monkeypatch.setattr("apps.cli.defaults.with_stand_ins", stops)
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


def test_the_version_with_all_that_a_report_of_a_fault_should_name(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moesaic {version('moesaic')}\n"
    assert main(["--version", "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch: {torch.__version__}" in lines
    assert "backend: cpu" in lines or torch.cuda.is_available()
    assert main(["--version", "--all"]) == 2
    assert "--version takes --verbose or nothing, and got --all" in capsys.readouterr().err


def screen(data: bytes) -> list[str]:
    """Return the lines that a wide terminal shows in the end, without colours.

    Carriage return, line feed, cursor up and erasing a line are all that a progress bar moves by.
    """
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", data.decode()):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.startswith("\x1b["):
            if token.endswith("A"):
                row -= int(token[2:-1] or 1)
            elif token == "\x1b[2K":
                lines[row] = ""
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + token + line[column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def terminal(config: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Run a command with a terminal as stdout and stderr; returns what it shows."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: str) -> list[str]:
        leader, follower = pty.openpty()
        seen = io.BytesIO()

        def read() -> None:
            try:
                while data := os.read(leader, 65536):
                    seen.write(data)
            except OSError:  # the other end is closed
                pass

        reader = threading.Thread(target=read)
        reader.start()
        with open(follower, "w", buffering=1) as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", out)
            assert main(list(argv)) == 0
        reader.join()
        os.close(leader)
        return screen(seen.getvalue())

    return run


LOUD = """
import logging
from tiny_app import TinyModule

logging.basicConfig(level=logging.INFO)  # as FBGEMM has it: the root logger then repeats every note


class Loud(TinyModule):
    pass
"""


def test_a_note_is_printed_once_where_a_library_logs_as_well(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(logging.root, "handlers", [])  # without those of pytest, as in a process of its own
    (tmp_path / "loud.py").write_text(LOUD)
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("tiny_app.TinyModule", "loud.Loud"))
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Loud: ")


def test_a_training_leaves_no_bar_and_no_line_glued_to_one(terminal):
    shown = terminal("fit", "--config", "tiny.yaml", "--trainer.max_epochs", "2")
    expected = [
        "fit tiny.yaml -> runs/tiny",
        "device cpu .*: precision 32-true, threads [0-9]+, experts by cpu",
        "TinyModule: [0-9,]+ parameters, [0-9,]+ active, [0-9.]+ MFLOPs an example .forward.",
        "epoch 1/2  train/loss .*",
        "epoch 2/2  train/loss .*",
        "trained 2 epochs, 6 steps, in [0-9.]+ s",
        "checkpoints: runs/tiny/checkpoints; best val/loss .*",
    ]
    assert len(shown) == len(expected), shown
    for line, pattern in zip(shown, expected, strict=True):
        assert re.fullmatch(pattern, line)
    verdict = (
        "test loss [0-9.]+ in the test of runs/tiny/checkpoints/best.ckpt; "
        "a single run gives no estimate of the spread over seeds."
    )
    for command, title in (("test", verdict), ("validate", "validate of .*")):
        shown = terminal(command, "--config", "tiny.yaml")
        assert shown[0] == f"{command} tiny.yaml -> runs/tiny"
        assert re.fullmatch(title, shown[2])
    _, checkpoint, device, first, *_ = terminal("predict", "--config", "tiny.yaml")
    assert checkpoint == "checkpoint: runs/tiny/checkpoints/best.ckpt"
    assert device.startswith("device cpu")
    assert first.startswith('{"output": [')
