"""A new model is a room of six files and two lines of the registry; every command then works.

CONTRIBUTING.md, "Adding a model", describes these files.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shown_runs import answered, shown

from apps import registry
from apps.cli import main
from apps.serve.service.command import service_of

ROOM = Path(__file__).parents[1] / "support/linear"
LINES = """from apps import registry
registry.MODELS["LinearClassifier"] = "linear"
registry.DATA["LinearData"] = "linear.data"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the room and its configuration; the registry has its lines."""
    folder = tmp_path_factory.mktemp("ninth")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "linear"]:
            patch.delitem(sys.modules, name)
        shutil.copytree(ROOM, folder / "linear")
        patch.syspath_prepend(folder)
        for table in ("MODELS", "DATA"):
            patch.setattr(registry, table, dict(getattr(registry, table)))
        exec(LINES)
        (folder / "sitecustomize.py").write_text(LINES)  # for the processes that a comparison starts
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOM.parents[2]}")
        patch.chdir(folder)
        assert main(["fit", "--config", "linear/linear.yaml", "--trainer.max_epochs", "3"]) == 0
        yield folder


def test_it_is_tested_and_predicts(folder, capsys):
    assert main(["test", "--ckpt_path", "runs/linear"]) == 0
    assert json.loads(Path("runs/linear/test.json").read_text())["test/top1"] > 0.8
    assert "Confusion" in Path("runs/linear/report.html").read_text()
    assert main(["predict", "--ckpt_path", "runs/linear", "--output", "own.csv"]) == 0
    rows = Path("own.csv").read_text().splitlines()
    assert (rows[0], len(rows)) == ("label,probability", 1 + 359)  # one of five images of 1,797


def test_an_export_predicts_the_same(folder):
    assert main(["export", "--ckpt_path", "runs/linear", "--output", "linear.onnx"]) == 0
    outputs = []
    for source in ("--ckpt_path", "runs/linear"), ("--onnx", "linear.onnx"):
        assert main(["predict", *source, "--output", "of.jsonl", "--overwrite"]) == 0
        outputs.append([json.loads(line) for line in Path("of.jsonl").read_text().splitlines()])
    first, second = ([row["label"] for row in rows] for rows in outputs)
    assert first == second


def test_service_and_page_give_the_same_answer(folder):
    model, page = shown(Path("runs/linear"))
    assert type(model).__name__ == "LinearClassifier"
    service = service_of(model)(model)
    (item,) = service.item["examples"]
    (answer,) = service.predict([service.read(item)])
    Path("of.png").write_bytes(base64.b64decode(item["image"]))
    (bars,) = answered(page, "of.png").parts
    assert tuple(answer["top"].items()) == bars.rows
    assert answer["class_name"] == bars.rows[0][0]


def test_it_is_planned(folder, capsys):
    sizes = ("--gpus", "8", "--gpu", "h100", "--batch", "64")
    assert main(["plan", "--config", "linear/linear.yaml", *sizes]) == 0
    assert "memory fits everywhere" in capsys.readouterr().out


@pytest.mark.slow
def test_it_is_compared_with_dense_networks(folder):
    # In a process of its own: those that measure are started by one that knows the two lines.
    options = ("--seeds", "1", "--rounds", "1", "--learning_rates", "0.01", "--trainer.max_epochs", "1")
    command = [sys.executable, "-m", "apps.cli", "compare", "linear/linear.yaml", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "equal FLOPs" in done.stdout
