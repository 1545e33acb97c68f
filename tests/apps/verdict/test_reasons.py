"""Why sparse lost, and what would change the answer, on made figures."""

from __future__ import annotations

import pytest

from apps.report.intervals import CrossedInterval
from apps.verdict.result import Facts, causes, changes, seeds_to_decide
from apps.verdict.schedule import Answer


def gain(mean: float, half_width: float | None = 0.01, count: int = 4, **variances: float) -> CrossedInterval:
    parts = {"seed_variance": 0.0, "example_variance": 0.0, "rest_variance": 0.0, **variances}
    return CrossedInterval(mean, half_width, count, 100, **parts)


def both(at_flops: str, at_time: str, flops_gain: CrossedInterval | None = None) -> tuple[Answer, Answer]:
    flops_gain = flops_gain or gain(-0.02)
    return Answer("equal FLOPs", at_flops, flops_gain), Answer("equal time", at_time, gain(-0.02))


def facts(test=0.8, train=0.82, step=0.01, **routing: float) -> Facts:
    return Facts(test, train, step, routing)


LOST = both("does not pay", "does not pay")


def named(lines: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in lines]


def test_who_does_not_lose_needs_no_cause():
    assert causes(both("pays", "undecided"), facts(), facts(), 8, 30) == []


@pytest.mark.parametrize(
    "sparse, epochs, names",
    [
        # The gap of sparse is 0.1, that of dense 0.02: 0.08 more, where sparse lost 0.02.
        (facts(0.8, 0.90), 30, ["Overfitting", "Too little data"]),
        (facts(0.8, 0.90), 3, ["Overfitting"]),
        (facts(0.8, 0.81), 3, ["Slower learning"]),
        (facts(0.8, 0.82, dead_experts=1.5), 3, ["Idle experts"]),
        (facts(0.8, 0.82, load_imbalance=3.0, drop_rate=0.2), 3, ["Skewed load", "Drops"]),
        (facts(0.8, 0.82, load_imbalance=1.2, drop_rate=0.01), 3, ["None of the usual causes stands out"]),
    ],
)
def test_causes_at_equal_steps(sparse, epochs, names):
    assert named(causes(LOST, sparse, facts(), 8, epochs)) == names


def test_a_slower_step_is_a_cause_at_equal_time_alone():
    slow = facts(step=0.015)
    (line,) = causes(both("undecided", "does not pay"), slow, facts(), 8, 3)
    # 0.015 is half as much again as 0.01, so two thirds of the steps.
    assert line == "Slower: a sparse step takes 50% longer here, so sparse makes 67% of the steps in the same time."
    assert causes(both("undecided", "undecided"), slow, facts(), 8, 3) == []


def test_more_seeds_decide_what_seeds_leave_open():
    # Standard deviation of a seed's effect 0.02: 9 seeds give 2.306 * 0.02 / 3 = 0.01537 and 10 give 2.262 * 0.02 /
    # sqrt(10) = 0.01431, so 0.015 takes 10.
    spread = gain(0.015, 0.03, seed_variance=4e-4)
    assert seeds_to_decide(spread) == 10
    lines = changes(both("undecided", "pays", spread), [], minutes=10, trained=1.0)
    assert len(lines) == 1
    assert "about 10 seeds would decide it, in about 25 minutes" in lines[0]  # 10 of 4 seeds' minutes


def test_more_seeds_do_not_decide_what_the_examples_leave_open():
    # 1.98 sqrt(0.01 / 100) = 0.0198 remains: twice 0.0099, so 4 times the examples.
    spread = gain(0.0099, 0.02, example_variance=0.01)
    assert seeds_to_decide(spread) is None
    (line,) = changes(both("undecided", "pays", spread), [], minutes=10, trained=1.0)
    assert "more minutes alone would not decide it: the 100 test examples" in line
    assert "about 4.0 times as many" in line


def test_what_is_nearly_zero_is_called_so():
    (line,) = changes(both("undecided", "pays", gain(1e-5, 0.02, example_variance=0.01)), [], 10, 1.0)
    assert "the difference is small compared to its spread" in line


def test_causes_have_their_remedies_and_a_short_training_is_named():
    reasons = ["Overfitting: ...", "Slower: ...", "Idle experts: ..."]
    lines = changes(both("does not pay", "does not pay"), reasons, minutes=3, trained=0.1)
    assert len(lines) == 4
    assert "a run has 10% of the configured steps" in lines[0]
    assert "about 30 minutes" in lines[0]
