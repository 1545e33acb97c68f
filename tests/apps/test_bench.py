"""``moesaic bench``."""

from __future__ import annotations

from apps import bench
from apps.cli import main as moesaic

_SCRIPT = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Row:
    x: int

def main(argv):
    print("ran", argv)
"""


def test_bench_runs_the_file_with_its_options(tmp_path, monkeypatch, capsys):
    (tmp_path / "layer.py").write_text(_SCRIPT)
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert moesaic(["bench", "layer", "--rounds", "1"]) == 0
    assert capsys.readouterr().out == "ran ['--rounds', '1']\n"
    assert moesaic(["bench", "larye"]) == 2
    assert "'larye' is no benchmark; there is layer" in capsys.readouterr().err
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "none")
    assert moesaic(["bench", "layer"]) == 2
    assert "they are in the source tree" in capsys.readouterr().err
