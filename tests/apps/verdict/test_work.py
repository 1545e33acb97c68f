"""The order of the runs, what a budget ends, and what is not done again; nothing is trained here."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from apps.runner.runner import Budget, BudgetOver
from apps.verdict import command, work
from apps.verdict.schedule import Schedule
from apps.verdict.work import Finished, Plan, Work, answers, better_half

RATES = (0.1, 0.3, 0.9)
DENSE = "dense_equal_flops"
SILENT = Mock()


class Machine:
    """A machine that trains nothing: a run takes 10 s, a step of sparse twice as long as one of dense.

    Sparse is about 0.1 better on each of 40 examples in a final run, and 0.1 worse in as many seconds.

    Attributes:
        now: its clock.
        done: names of the runs.
        pace: seconds of a step, of which a run then has that many; None: 10 s a run.
    """

    def __init__(self) -> None:
        self.now, self.done, self.pace = 0.0, [], None

    def __call__(self) -> float:
        return self.now

    def do(self, experiment, run, output, budget, most_batches, progress):
        seconds = 10.0 if self.pace is None else self.pace * run.steps
        if budget.left <= seconds:
            self.now += max(budget.left, 0)
            raise BudgetOver
        self.now += seconds
        self.done.append(run.name)
        rng = np.random.default_rng((run.seed, run.steps, run.system == "sparse"))
        ahead = {"search": run.rate, "final": 0.1, "timed": -0.1}[run.kind] if run.system == "sparse" else 0.0
        values = ahead + 0.01 * rng.normal() + 0.1 * np.sin(np.arange(40))
        seconds = 0.02 if run.system == "sparse" else 0.01
        result = {"quality": float(values.mean()), "higher_is_better": True, "seconds_per_step": seconds}
        result["run"] = {"system": run.system, "steps": run.steps}
        result["wall_seconds"] = 10.0 if self.pace is None else self.pace * run.steps
        folder = run.folder(output)
        folder.mkdir(parents=True)
        np.save(folder / "values.npy", values)
        (folder / "result.json").write_text(json.dumps(result))
        return result


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(work, "do", machine.do)
    monkeypatch.setattr(work, "MOST_SEEDS", 4)
    monkeypatch.setattr(Budget, "keep", lambda budget: None)  # a file for each run is work for a disk
    return machine


def worked(machine, output, seconds, rates=RATES, seeds=3) -> Work:
    budget = Budget(seconds, output / "spent.json", machine, reserve=command.reserve(seconds))
    plan = Plan(Schedule(seeds, 100, rates), DENSE, 8, None, {"sparse": 0.02, DENSE: 0.01}, 0.0, 10, 100)
    made = Work(SimpleNamespace(rate=0.3), plan, 7, output, budget, SILENT)
    made.do()
    return made


def test_systems_take_turns_and_both_have_the_same_search(machine, tmp_path):
    made = worked(machine, tmp_path, 1e6)
    first = [f"{name}/search-lr{rate:g}-25steps-seed1007" for rate in RATES for name in ("sparse", DENSE)]
    assert machine.done[:6] == first
    # Of sparse the larger rates are better; all of dense are equal, so the two nearest to 0.3 go on.
    second = ["sparse/search-lr0.9", f"{DENSE}/search-lr0.3", "sparse/search-lr0.3"]
    assert [name.rpartition("-50steps")[0] for name in machine.done[6:9]] == second
    assert made.rates == {"sparse": 0.9, DENSE: 0.3}
    # A sparse step takes twice as long, so 50 of them take dense's time.
    assert machine.done[10:13] == [
        "sparse/final-lr0.9-100steps-seed7",
        f"{DENSE}/final-lr0.3-100steps-seed7",
        "sparse/timed-lr0.9-50steps-seed7",
    ]
    assert [f.seed for f in made.finished] == [7, 8, 9, 10]  # time is left for the most seeds
    at_flops, at_time = answers(made.finished)
    assert (at_flops.outcome, at_time.outcome) == ("pays", "does not pay")
    assert at_flops.gain.mean == pytest.approx(0.1, abs=0.02)
    assert (at_flops.gain.count, at_flops.gain.num_examples) == (4, 40)


def test_a_seed_that_does_not_fit_is_not_begun(machine, tmp_path):
    # A seed takes 30 s. Of 120 s 3.6 are the reserve: after 3 seeds, which are planned, 26.4 are left.
    made = worked(machine, tmp_path, 120.0, rates=())
    assert len(made.finished) == 3
    assert not made.is_over
    assert made.budget.spent <= 120 - made.budget.reserve
    # Of 80 s 2.4: after two of the three planned seeds 17.6 are left, less than 27.
    made = worked(machine, tmp_path / "short", 80.0, rates=())
    assert len(made.finished) == 2
    assert made.is_over


def test_the_end_of_the_budget_drops_an_unfinished_seed(machine, tmp_path):
    made = worked(machine, tmp_path, 26.0, rates=())
    assert made.is_over
    assert made.finished == []
    assert len(machine.done) == 2
    assert [a.outcome for a in answers(made.finished)] == ["undecided", "undecided"]
    assert answers(made.finished)[0].gain is None


def test_a_machine_that_turned_slow_trains_three_seeds_for_fewer_steps(machine, tmp_path):
    # The search has 175 steps a system, planned at 0.02 and 0.01 s, 5.25 s in all. A step takes 0.2 s now.
    machine.pace = 0.2
    made = worked(machine, tmp_path, 160.0)
    assert len([name for name in machine.done if "search" in name]) == 10  # 70 s
    # 13.3 times as long as planned: three seeds of 100 steps, planned at 4 s, would take 160 s, and 85.2 are left.
    assert made.steps == 53
    assert len(made.finished) == 3
    again = worked(machine, tmp_path, 1.0)  # with no time left, the same again
    assert (again.steps, again.rates, answers(again.finished)) == (made.steps, made.rates, answers(made.finished))


def test_a_search_that_takes_too_long_leaves_time_for_a_pair(machine, tmp_path):
    machine.pace = 0.5  # the first rung takes 75 s, the second 100
    made = worked(machine, tmp_path, 200.0)
    assert [name for name in machine.done if "search" in name][6:] == []
    assert made.rates == {"sparse": 0.9, DENSE: 0.3}  # those of the first rung
    assert len(made.finished) >= 1
    first = worked(machine, tmp_path / "first", 100.0)
    assert first.rates == {"sparse": 0.3, DENSE: 0.3}  # not even the first rung: the configured one
    assert len(first.finished) >= 1


def test_what_is_finished_is_not_done_again(machine, tmp_path):
    whole = worked(machine, tmp_path, 400.0, seeds=2)
    count = len(machine.done)
    shutil.rmtree(tmp_path / "runs" / "sparse" / "final-lr0.9-100steps-seed8")  # as if it had been killed there
    again = worked(machine, tmp_path, 400.0, seeds=2)
    assert machine.done[count:] == ["sparse/final-lr0.9-100steps-seed8"]
    assert answers(again.finished) == answers(whole.finished)


def test_half_written_runs_are_named(machine, tmp_path):
    worked(machine, tmp_path, 200.0, rates=(), seeds=1)
    folder = tmp_path / "runs" / "sparse" / "final-100steps-seed7"
    (folder / "values.npy").unlink()
    with pytest.raises(ValueError, match=r"seed7/values\.npy cannot be read \(.*\), though its run is finished"):
        worked(machine, tmp_path, 200.0, rates=(), seeds=1)
    (folder / "result.json").write_text('{"quality": 0.')
    with pytest.raises(ValueError, match=r"result\.json is not a JSON file .*: delete it to have it made again"):
        worked(machine, tmp_path, 200.0, rates=(), seeds=1)


def test_gains_that_rounding_tells_apart_show_no_spread():
    values = np.sin(np.arange(40))
    results = [{"higher_is_better": True}]
    finished = [Finished(seed, results, (values + 0.1, values, values - 0.1)) for seed in range(3)]
    at_flops, at_time = answers(finished)
    assert (at_flops.outcome, at_flops.gain.half_width) == ("undecided", 0.0)
    assert at_time.gain.mean == pytest.approx(-0.1, rel=1e-12)


def gains(*means: float, spread: float = 0.0) -> list[np.ndarray]:
    """Return values of 100 examples; those of the rates differ by ``spread`` in turn, so that they do not cancel."""
    signs = [np.where(np.arange(100) % 2, 1.0, -1.0), np.where(np.arange(100) % 4 < 2, 1.0, -1.0), np.zeros(100)]
    return [mean + spread * sign for mean, sign in zip(means, signs, strict=True)]


def test_the_best_rates_go_on():
    assert better_half(RATES, gains(0.7, 0.8, 0.9), 0.3) == [0.9, 0.3]
    assert better_half(RATES[:2], gains(0.7, 0.8, 0.0)[:2], 0.3) == [0.3]


def test_a_lead_within_its_error_leaves_the_configured_rate_in_front():
    # 0.1 and 0.3 differ by 0, 2 or -2 times the spread: an error of about sqrt(2) * 0.5 / 10 = 0.07.
    assert better_half(RATES[:2], gains(0.85, 0.8, 0, spread=0.5)[:2], 0.3) == [0.3]
    assert better_half(RATES[:2], gains(0.9, 0.8, 0, spread=0.5)[:2], 0.3) == [0.1]


def test_equal_rates_are_taken_by_their_distance():
    assert better_half(RATES, gains(0.8, 0.8, 0.8), 0.8) == [0.9, 0.3]


def test_runs_that_diverged_are_left_out():
    nothing, nan = np.empty(0), np.full(100, np.nan)
    assert better_half(RATES, [nothing, np.zeros(100), nan], 0.3) == [0.3]
    with pytest.raises(ValueError, match=r"training diverged at every learning rate of 0\.1, 0\.3, 0\.9"):
        better_half(RATES, [nothing, nothing, nan], 0.3)
