"""Modules of the user's own in the working folder; a checkpoint makes their classes once the user names them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from own_net import CONFIG, SPARSIFY

import apps
import core
from apps.cli import main
from apps.registry import subclasses

NET = """
import torch
import own_net

class Net(own_net.Net):
    def __init__(self, width: int = 8):
        super().__init__()
        self.example_input_array = torch.zeros(2, 2)

    def predict_step(self, batch):
        return self(batch[0])

class Points(own_net.Points):
    def predict_dataloader(self):
        return torch.utils.data.DataLoader(self.points(2), batch_size=24)
"""
NAMED = ["--model", "nets_in_folder.Net", "--data", "nets_in_folder.Points"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a module of the user's, which is not on ``sys.path``, as with the installed command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    Path("nets_in_folder.py").write_text(NET)
    Path("net.yaml").write_text((CONFIG + SPARSIFY).replace("own_net.", "nets_in_folder."))
    yield tmp_path
    forget()


def forget() -> None:
    """Make this process one that has not imported the user's module."""
    sys.modules.pop("nets_in_folder", None)
    sys.path[:] = [path for path in sys.path if path != str(Path.cwd())]


@pytest.fixture
def run(folder, monkeypatch):
    assert main(["fit", "--config", "net.yaml", "--run_dir", "run"]) == 0
    forget()
    # The classes of the run above stay alive; a new process has none of them.
    monkeypatch.setattr("apps.registry.subclasses", lambda kind: [*filter(is_alive, subclasses(kind))])
    return Path("run")


def is_alive(kind: type) -> bool:
    module = sys.modules.get("nets_in_folder")
    return kind.__module__ != "nets_in_folder" or getattr(module, kind.__qualname__, None) is kind


def error_of(words: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(words) != 0
    return capsys.readouterr().err.splitlines()[-1]


def test_a_module_that_is_nowhere_is_named_and_the_folder_is_not_looked_in_for_what_nobody_names(folder, capsys):
    Path("digits.yaml").write_text("data: {class_path: VisionData}\n# nets_in_folder.Net\n")
    assert main(["fit", "--config", "digits.yaml", "--data.root", "nets_in_folder.Net"]) == 2
    assert str(folder) not in sys.path
    line = error_of(["fit", "--config", "net.yaml", "--model", "no_such_net.Net"], capsys)
    assert line.startswith("error: --model=no_such_net.Net does not exist: No module named 'no_such_net'")
    assert "in the working folder" in line


def test_a_checkpoint_alone_imports_nothing(run, capsys):
    for words in (["test"], ["doctor"], ["export", "--output", "net.onnx"]):
        line = error_of([*words, "--ckpt_path", "run"], capsys)
        assert "nets_in_folder.Net" in line
        assert "--config" in line
    with pytest.raises(ValueError, match="a checkpoint imports nothing"):
        apps.load(run)
    assert "nets_in_folder" not in sys.modules


def test_a_run_is_used_by_naming_its_classes_again(run, capsys):
    assert main(["test", "--ckpt_path", "run", *NAMED]) == 0
    assert main(["predict", "--ckpt_path", "run", *NAMED]) == 0
    forget()
    assert main(["doctor", "--ckpt_path", "run", "--config", "run/config.yaml"]) in (0, 1)
    assert "error" not in capsys.readouterr().err


def test_an_imported_class_is_loaded_and_exported(run, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["export", "--ckpt_path", "run", "--config", "run/config.yaml", "--output", "net.onnx"]) == 0
    model = apps.load(run)  # the command has imported the class
    assert isinstance(model.blocks[0].moe, core.MoE)
    assert not model.training
    x = torch.randn(5, 2)
    (y,) = onnxruntime.InferenceSession("net.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_module_without_an_example_is_not_exported(run, capsys):
    Path("nets_in_folder.py").write_text(NET.replace("torch.zeros(2, 2)", "None"))
    line = error_of(["export", "--ckpt_path", "run", "--config", "net.yaml", "--output", "net.onnx"], capsys)
    assert "nets_in_folder.Net.example_input_array is no tensor" in line


def test_a_router_of_the_folder_is_named_in_an_overlay(folder, capsys):
    Path("routers_in_folder.py").write_text(
        "from dataclasses import dataclass\nimport core\n\n@dataclass(frozen=True)\nclass Mine(core.TokenChoice): ...\n"
    )
    overlay = {"model": {"init_args": {"moe": {"router": {"class_path": "routers_in_folder.Mine", "init_args": {}}}}}}
    Path("mine.yaml").write_text(yaml.safe_dump(overlay))
    digits = ["--config", "configs/vision/digits.yaml"]
    assert main(["plan", *digits, "--config", "mine.yaml", "--gpus", "2", "--gpu", "h100"]) == 0
    assert main(["fit", *digits, "--model.moe.router", "routers_in_folder.Mine", "--print_config"]) == 0
    sys.modules.pop("routers_in_folder", None)
