"""Units are done once and in order; what cannot be done yet is left, and a budget of seconds ends the work."""

from __future__ import annotations

import json

import pytest

from apps.base.progress import bar
from apps.runner.runner import Budget, BudgetOver, Runner


class Squares(Runner[int, int]):
    """Squares numbers, each a second; there is no square of 0 yet."""

    def __init__(self, whole, known, seconds=100.0):
        self.now, self.known, self.done = 0.0, dict(known), []
        super().__init__(whole, None, Budget(seconds, clock=lambda: self.now))

    def work(self, unit, progress):
        progress(1, 2, {})
        self.now += 1
        self.done.append(unit)
        return self.known.setdefault(unit, unit * unit) if unit else None

    def line(self, unit, result):
        return f"{result}" if unit != 3 else ""

    def read(self, unit):
        return self.known.get(unit)

    def title(self, unit):
        return f"square of {unit}"

    def weight(self, unit):
        return 2.0


def test_what_is_not_finished_is_done_in_order_and_counted(capsys):
    with bar("squares", 10.0) as whole:
        runner = Squares(whole, {2: 4})
        assert runner.finish([5, 2, 0, 3]) == {5: 25, 2: 4, 3: 9}
        assert runner.done == [5, 0, 3]
        assert runner.num_done == 2
        # 2 of the square that was there, and 2 of each new one; that of 0 is half done.
        assert whole.done == 2 + 2 + 2 + 1
        assert runner.finish([5, 2]) == {5: 25, 2: 4}
        assert runner.done == [5, 0, 3]
    assert capsys.readouterr().out == "square of 5: 25\n"


def test_the_end_of_the_time_keeps_what_is_finished():
    with bar("squares") as whole:
        runner = Squares(whole, {}, seconds=2.0)
        with pytest.raises(BudgetOver):
            runner.finish([7, 8, 9])
        assert runner.known == {7: 49, 8: 64}


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
