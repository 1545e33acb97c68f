"""``moesaic audit`` on folders of every family that ``core.adopt`` knows, with the names that are published."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import test_adopt
import torch
from safetensors.torch import load_file, save_file

from apps.cli import main

NAMES = [*test_adopt.FAMILIES, *test_adopt.TWO_SIDED]
EXPERT = re.compile(r".*(experts\.(\d|expert_|\w+_proj$|mlp)|put_linear).*")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that gives a new folder of a family's small model, as transformers starts and saves it."""

    def folder(name):
        path = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:  # the weights stay as they start
            patch.setattr(test_adopt, "nn", SimpleNamespace(init=SimpleNamespace(normal_=lambda p, std: p)))
            made = (test_adopt.model if name in test_adopt.FAMILIES else test_adopt.two_sided)(name)
        made.save_pretrained(path)
        return path

    return folder


def change(folder, function):
    """Replace the tensors of a folder by those that a function returns."""
    file = folder / "model.safetensors"
    save_file({name: t.clone() for name, t in function(load_file(file)).items()}, file)


def trained(tensors):
    """Return tensors that have moved, each by its own scale near 1 and by noise."""
    torch.manual_seed(0)
    scales = {name: float(torch.empty(1).uniform_(0.8, 1.25)) for name in tensors}
    noise = {name: 0.01 * torch.randn(t.shape) for name, t in tensors.items()}
    return {n: t * scales[n] + noise[n] if t.is_floating_point() else t for n, t in tensors.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_model_raises_no_alarm(name, folders, capsys):
    folder = folders(name)
    capsys.readouterr()
    assert main(["audit", str(folder)]) == 0
    assert capsys.readouterr().err.startswith("note: nearly all experts look like their initialization")
    change(folder, trained)
    code = main(["audit", str(folder)])
    assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_a_hole_and_an_expert_of_zeros_are_named(name, folders, capsys):
    folder = folders(name)
    change(folder, trained)
    tensors = load_file(folder / "model.safetensors")
    one, other = [key for key in sorted(tensors) if EXPERT.fullmatch(key) and not key.endswith("bias")][:2]
    is_stacked = re.search(r"\d|expert_", one.partition("experts.")[2]) is None or ".mlp.w" in one
    if is_stacked:
        rows = len(tensors[one]) // 4 if ".mlp." in one else 1
        tensors[one] = tensors[one][:-rows]
        tensors[other][:rows] = 0
    else:
        del tensors[one]
        tensors[other].zero_()
    save_file({key: t.clone() for key, t in tensors.items()}, folder / "model.safetensors")
    capsys.readouterr()
    assert main(["audit", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(one) and ("missing tensor" in line or "wrong shape" in line) for line in lines), lines
    assert any(line.startswith(other) and "constant: its numbers are all 0" in line for line in lines), lines
    assert len(lines) == 3, lines
