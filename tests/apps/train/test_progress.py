"""The lines that say how far a training is."""

from __future__ import annotations

import re
import time

from tiny_app import TinyModule
from trainings import fit

from apps.train.progress import EpochLines, end_time, last_step


def test_the_progress_says_what_was_reached(tmp_path, capsys):
    fit(TinyModule(3), tmp_path, EpochLines(), max_epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1/2"], ["epoch", "2/2"]]
    for value in ("train/loss", "val/loss", "val/top1"):
        assert f"  {value} " in lines[0]


def test_the_end_is_at_the_mean_speed_until_now(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    noon = 12 * 3600.0
    # 10 of 30 steps took 600 s: 20 more take 1,200 s.
    assert end_time((noon - 600, 5), (noon, 15), 35.0) == "12:20"
    assert end_time((noon - 600, 0), (noon, 1), 241.0) == "04:00 on 03 January"  # 240 steps of 10 minutes
    for now, last in (((noon, 5), 35.0), ((noon, 15), 15.0), ((noon, 15), float("inf"))):
        assert end_time((noon - 600, 5), now, last) == ""


def test_the_last_step_is_that_of_the_epochs_or_of_the_steps(tmp_path, capsys):
    made = fit(TinyModule(3), tmp_path, EpochLines(), max_epochs=2)
    assert last_step(made) == made.global_step
    first, last = capsys.readouterr().out.splitlines()
    assert re.search(r" s; ends \d\d:\d\d", first)
    assert "ends" not in last
    assert last_step(fit(TinyModule(3), tmp_path / "steps", max_epochs=2, max_steps=3)) == 3
