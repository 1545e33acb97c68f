"""The seconds of a piece of work, by a clock of one's own."""

from __future__ import annotations

import json

import pytest

from apps.runner.runner import Budget, BudgetOver


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_the_reserve_is_kept_and_the_rest_may_be_spent(tmp_path):
    clock = Clock(100.0)
    budget = Budget(200.0, tmp_path / "spent.json", clock, began=90.0, reserve=6.0)  # 10 s of imports
    assert (budget.spent, budget.reserve, budget.left) == (10.0, 6.0, 184.0)
    budget.hold_back(12.0)
    assert budget.left == 178.0
    budget.hold_back(90.0)  # a tenth at most
    assert (budget.reserve, budget.left) == (20.0, 170.0)
    clock.now = 269.0
    budget.check()
    clock.now = 270.0
    with pytest.raises(BudgetOver):
        budget.check()


def test_another_process_goes_on_with_what_is_left(tmp_path):
    path = tmp_path / "spent.json"
    clock = Clock()
    killed = Budget(100.0, path, clock, reserve=3.0)
    clock.now = 4.0
    killed.check()
    assert not path.exists()
    clock.now = 30.0
    killed.check()  # written every five seconds
    assert json.loads(path.read_text()) == {"seconds": 30.0}
    clock.now = 1000.0  # the next morning
    successor = Budget(100.0, path, clock, reserve=3.0)
    assert successor.spent == 30.0
    clock.now = 1010.0
    assert successor.left == 57.0
    successor.keep()
    assert json.loads(path.read_text()) == {"seconds": 40.0}
