"""The first training losses are those of the file in docs/runs."""

from __future__ import annotations

import json
import sys

import pytest
from places import ROOT

from benchmarks import first_losses

KEPT = json.loads(first_losses.KEPT.read_text())


def test_a_run_of_each_configuration_has_ten_losses():
    runs = first_losses.runs()
    assert all((ROOT / path).is_file() for configs in runs.values() for path in configs)
    assert KEPT.keys() <= runs.keys()
    assert {len(values) for values in KEPT.values()} == {10}


@pytest.mark.parametrize(
    "before, code",
    [([1.0, 2.0001], 0), ([1.0, 2.001], 1), ([1.0], 1)],  # 2e-4 is 1e-4 of 2, and 1e-3 is more
    ids=["same", "differs", "shorter"],
)
def test_a_relative_difference_above_1e_4_fails(before, code, tmp_path, monkeypatch, capsys):
    (tmp_path / "kept.json").write_text(json.dumps({"vision/digits": before}))
    monkeypatch.setattr(sys, "argv", ["first_losses.py", "--check", str(tmp_path / "kept.json")])
    monkeypatch.setattr(first_losses, "losses", lambda *_: [1.0, 2.0])
    assert first_losses.main() == code
    assert capsys.readouterr().out.endswith(f"1 runs, {code} differ\n")


def test_data_that_are_not_here_are_no_difference(tmp_path, monkeypatch):
    (tmp_path / "kept.json").write_text(json.dumps({"vision/cifar10": [1.0]}))
    argv = ["first_losses.py", "--check", str(tmp_path / "kept.json")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", argv)
    assert first_losses.main() == 0


QUICK = ("vision/digits_vmoe", "vision/generation/digits")
"""The others are slow together."""


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KEPT],
)
def test_a_configuration_trains_as_it_did(name):
    configs = first_losses.runs()[name]
    now = first_losses.losses(name, configs, {})
    assert first_losses.fault(name, now, KEPT[name]) == ""
    if isinstance(now, str):
        pytest.skip(now)
