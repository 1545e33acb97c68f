"""The search of a baseline's settings: what it tries while there is time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import apps.equal_cost.comparable
from apps.equal_cost.comparable import Search


def test_a_setting_is_begun_while_there_is_time_and_then_finished(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(apps.equal_cost.comparable, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    kept, ran = [], []

    def lasts(seconds, quality):
        def run():
            ran.append(quality)
            now[0] += seconds
            return quality

        return run

    search = Search(minutes=1, keep=lambda tried: kept.append(dict(tried)))
    assert search.quality("a", lasts(20, 0.1), until=0.5) == 0.1  # 0 s of 30
    assert search.quality("b", lasts(50, 0.2), until=0.5) == 0.2  # 20 s of 30, ends at 70
    assert search.quality("c", lasts(1, 0.3), until=1.0) is None  # 70 s of 60
    assert search.quality("c", lasts(1, 0.3)) == 0.3  # whatever the time
    assert search.seconds == 71
    assert ran == [0.1, 0.2, 0.3]
    # Broken off after two, it goes on with the third, and what is known costs nothing.
    again = Search(minutes=2, tried=kept[1])
    assert again.seconds == 70
    assert again.quality("a", lambda: pytest.fail("tried again"), until=0.0) == 0.1
    assert again.quality("c", lasts(1, 0.3), until=1.0) == 0.3
    assert again.tried["b"] == {"quality": 0.2, "seconds": 50}
