"""``moesaic audit`` on folders of every family that ``core.adopt`` knows, with the names that are published."""

from __future__ import annotations

import re

import pytest
import torch
from families import EVERY, made
from safetensors.torch import load_file, save_file

from apps.cli import main

EXPERT = re.compile(r".*(experts\.(\d|expert_|\w+_proj$|mlp)|put_linear).*")


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


@pytest.mark.parametrize("name", EVERY)
def test_a_sound_model_raises_no_alarm_and_a_hole_and_an_expert_of_zeros_are_named(name, tmp_path, capsys):
    made(name, std=0).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["audit", str(tmp_path)]) == 0
    assert capsys.readouterr().err.startswith("note: nearly all experts look like their initialization")
    change(tmp_path, trained)
    code = main(["audit", str(tmp_path)])
    assert code == 0, capsys.readouterr().out
    tensors = load_file(tmp_path / "model.safetensors")
    one, other = [key for key in sorted(tensors) if EXPERT.fullmatch(key) and not key.endswith("bias")][:2]
    is_stacked = re.search(r"\d|expert_", one.partition("experts.")[2]) is None or ".mlp.w" in one
    if is_stacked:
        rows = len(tensors[one]) // 4 if ".mlp." in one else 1
        tensors[one] = tensors[one][:-rows]
        tensors[other][:rows] = 0
    else:
        del tensors[one]
        tensors[other].zero_()
    change(tmp_path, lambda _: tensors)
    capsys.readouterr()
    assert main(["audit", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(one) and ("missing tensor" in line or "wrong shape" in line) for line in lines), lines
    assert any(line.startswith(other) and "constant: its numbers are all 0" in line for line in lines), lines
    assert len(lines) == 3, lines
