"""Units are done once and in order; what cannot be done yet is left, and a budget ends the work."""

from __future__ import annotations

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
