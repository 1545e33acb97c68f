"""The lines that say how far a training is."""

from __future__ import annotations

from tiny_app import TinyModule
from trainings import fit

from apps.train.progress import EpochLines


def test_the_progress_says_what_was_reached(tmp_path, capsys):
    fit(TinyModule(3), tmp_path, EpochLines(), max_epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1/2"], ["epoch", "2/2"]]
    for value in ("train/loss", "val/loss", "val/top1"):
        assert f"  {value} " in lines[0]
