"""The order of the runs, what a budget ends, what is not done again and which weights stay; nothing is trained."""

import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from refusals import refused

from apps.runner.runner import Budget, BudgetOver
from apps.verdict import command, training, work
from apps.verdict.schedule import Schedule
from apps.verdict.training import Best, Evaluated
from apps.verdict.work import Finished, Plan, Work, answers, better_half

RATES = (0.1, 0.3, 0.9)
DENSE = "dense_equal_flops"
SILENT = Mock()


class Machine:
    """A machine that trains nothing, and the names of the runs it did: a run takes 10 s, or ``pace`` seconds a step.

    Sparse is about 0.1 better on each of 40 examples in a final run, and 0.1 worse in as many seconds; its step takes
    twice as long.
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
        is_sparse = run.system == "sparse"
        noise = np.random.default_rng((run.seed, run.steps, is_sparse)).normal()
        ahead = {"search": run.rate, "final": 0.1, "timed": -0.1}[run.kind] if is_sparse else 0.0
        values = ahead + 0.01 * noise + 0.1 * np.sin(np.arange(40))
        result = {"quality": float(values.mean()), "higher_is_better": True, "wall_seconds": seconds}
        result |= {"run": {"system": run.system, "steps": run.steps}, "seconds_per_step": 0.02 if is_sparse else 0.01}
        run.folder(output).mkdir(parents=True)
        np.save(run.folder(output) / "values.npy", values)
        (run.folder(output) / "result.json").write_text(json.dumps(result))
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


def test_a_seed_that_does_not_fit_is_not_begun_and_an_unfinished_one_is_dropped(machine, tmp_path):
    # A seed takes 30 s. Of 120 s 3.6 are the reserve: after 3 seeds, which are planned, 26.4 are left.
    made = worked(machine, tmp_path, 120.0, rates=())
    assert (len(made.finished), made.is_over) == (3, False)
    assert made.budget.spent <= 120 - made.budget.reserve
    # Of 80 s 2.4: after two of the three planned seeds 17.6 are left, less than 27.
    made = worked(machine, tmp_path / "short", 80.0, rates=())
    assert (len(made.finished), made.is_over) == (2, True)
    machine.done.clear()
    made = worked(machine, tmp_path / "unfinished", 26.0, rates=())
    assert (made.finished, made.is_over, len(machine.done)) == ([], True, 2)
    assert [(a.outcome, a.gain) for a in answers(made.finished)] == [("undecided", None)] * 2


def test_a_machine_that_turned_slow_trains_three_seeds_for_fewer_steps(machine, tmp_path):
    # The search has 175 steps a system, planned at 0.02 and 0.01 s, 5.25 s in all. A step takes 0.2 s now.
    machine.pace = 0.2
    made = worked(machine, tmp_path, 160.0)
    assert len([name for name in machine.done if "search" in name]) == 10  # 70 s
    # 13.3 times as long as planned: three seeds of 100 steps, planned at 4 s, would take 160 s, and 85.2 are left.
    assert (made.steps, len(made.finished)) == (53, 3)
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


def test_what_is_finished_is_not_done_again_and_half_written_runs_are_named(machine, tmp_path):
    whole, count = worked(machine, tmp_path, 400.0, seeds=2), len(machine.done)
    shutil.rmtree(tmp_path / "runs" / "sparse" / "final-lr0.9-100steps-seed8")  # as if it had been killed there
    again = worked(machine, tmp_path, 400.0, seeds=2)
    assert machine.done[count:] == ["sparse/final-lr0.9-100steps-seed8"]
    assert answers(again.finished) == answers(whole.finished)

    half = tmp_path / "half"

    def rerun():
        worked(machine, half, 200.0, rates=(), seeds=1)

    rerun()
    folder = half / "runs" / "sparse" / "final-100steps-seed7"
    (folder / "values.npy").unlink()
    refused(r"seed7/values\.npy cannot be read \(.*\), though its run is finished", rerun)
    (folder / "result.json").write_text('{"quality": 0.')
    refused(r"result\.json is not a JSON file .*: delete it to have it made again", rerun)


def test_gains_that_rounding_tells_apart_show_no_spread():
    values, results = np.sin(np.arange(40)), [{"higher_is_better": True}]
    finished = [Finished(seed, results, (values + 0.1, values, values - 0.1)) for seed in range(3)]
    at_flops, at_time = answers(finished)
    assert (at_flops.outcome, at_flops.gain.half_width) == ("undecided", 0.0)
    assert at_time.gain.mean == pytest.approx(-0.1, rel=1e-12)


def gains(*means: float, spread: float = 0.0) -> list[np.ndarray]:
    """Return values of 100 examples; those of the rates differ by ``spread`` in turn, so that they do not cancel."""
    signs = [np.where(np.arange(100) % 2, 1.0, -1.0), np.where(np.arange(100) % 4 < 2, 1.0, -1.0), np.zeros(100)]
    return [mean + spread * sign for mean, sign in zip(means, signs, strict=True)]


def test_the_best_rates_go_on_and_equal_ones_by_their_distance():
    assert better_half(RATES, gains(0.7, 0.8, 0.9), 0.3) == [0.9, 0.3]
    assert better_half(RATES[:2], gains(0.7, 0.8, 0.0)[:2], 0.3) == [0.3]
    assert better_half(RATES, gains(0.8, 0.8, 0.8), 0.8) == [0.9, 0.3]
    # A lead within its error leaves the configured rate in front: 0.1 and 0.3 differ by 0, 2 or -2 times the spread, an
    # error of about sqrt(2) * 0.5 / 10 = 0.07.
    assert better_half(RATES[:2], gains(0.85, 0.8, 0, spread=0.5)[:2], 0.3) == [0.3]
    assert better_half(RATES[:2], gains(0.9, 0.8, 0, spread=0.5)[:2], 0.3) == [0.1]
    # Runs that diverged are left out.
    nothing, nan = np.empty(0), np.full(100, np.nan)
    assert better_half(RATES, [nothing, np.zeros(100), nan], 0.3) == [0.3]
    rule = r"training diverged at every learning rate of 0\.1, 0\.3, 0\.9"
    refused(rule, better_half, RATES, [nothing, nothing, nan], 0.3)


@pytest.mark.parametrize(("higher_is_better", "kept"), [(True, 6), (False, 14)])
def test_the_weights_that_validate_best_stay(higher_is_better, kept, monkeypatch):
    qualities = dict(zip(range(2, 18, 2), (0.3, 0.4, 0.9, 0.9, 0.5, 0.4, 0.1, 0.2), strict=True))  # of 16 steps
    model, asked = torch.nn.Linear(1, 1, bias=False), []

    def by_example(model, trainer, batches, budget):
        assert list(batches) == ["batch"]
        asked.append(int(model.weight))
        return Evaluated("q", torch.tensor([qualities[asked[-1]]]).numpy(), higher_is_better)

    monkeypatch.setattr(training, "_by_example", by_example)
    best = Best(model, lambda: ["batch"], 16, Budget())
    for step in range(1, 17):
        torch.nn.init.constant_(model.weight, step)
        best.check(step, None)
        best.check(step, None)  # a step of several batches
    assert asked == list(qualities)
    best.restore()
    assert model.weight.item() == kept
