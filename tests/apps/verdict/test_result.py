"""What a verdict says of its figures: which model is best, why sparse lost, and what would change the answer."""

import numpy as np
import pytest

from apps.report.intervals import CrossedInterval
from apps.verdict.references import OfTask, best_model, by_task
from apps.verdict.result import Facts, causes, changes, seeds_to_decide
from apps.verdict.schedule import Answer
from apps.verdict.work import Finished


def gain(mean: float, half_width: float | None = 0.01, count: int = 4, **variances: float) -> CrossedInterval:
    parts = {"seed_variance": 0.0, "example_variance": 0.0, "rest_variance": 0.0, **variances}
    return CrossedInterval(mean, half_width, count, 100, **parts)


def both(at_flops: str, at_time: str, flops_gain: CrossedInterval | None = None) -> tuple[Answer, Answer]:
    flops_gain = flops_gain or gain(-0.02)
    return Answer("equal FLOPs", at_flops, flops_gain), Answer("equal time", at_time, gain(-0.02))


def facts(test=0.8, train=0.82, step=0.01, **routing: float) -> Facts:
    return Facts(test, train, step, routing)


def test_who_does_not_lose_needs_no_cause_and_a_slower_step_is_one_at_equal_time_alone():
    assert causes(both("pays", "undecided"), facts(), facts(), 8, 30) == []
    slow = facts(step=0.015)
    (line,) = causes(both("undecided", "does not pay"), slow, facts(), 8, 3)
    # 0.015 is half as much again as 0.01, so two thirds of the steps.
    assert line == "Slower: a sparse step takes 50% longer here, so sparse makes 67% of the steps in the same time."
    assert causes(both("undecided", "undecided"), slow, facts(), 8, 3) == []


@pytest.mark.parametrize("sparse, epochs, names", [
    # The gap of sparse is 0.1, that of dense 0.02: 0.08 more, where sparse lost 0.02.
    (facts(0.8, 0.90), 30, ["Overfitting", "Too little data"]),
    (facts(0.8, 0.90), 3, ["Overfitting"]),
    (facts(0.8, 0.81), 3, ["Slower learning"]),
    (facts(0.8, 0.82, dead_experts=1.5), 3, ["Idle experts"]),
    (facts(0.8, 0.82, load_imbalance=3.0, drop_rate=0.2), 3, ["Skewed load", "Drops"]),
    (facts(0.8, 0.82, load_imbalance=1.2, drop_rate=0.01), 3, ["None of the usual causes stands out"]),
])  # fmt: skip
def test_causes_at_equal_steps(sparse, epochs, names):
    lost = both("does not pay", "does not pay")
    assert [line.partition(":")[0] for line in causes(lost, sparse, facts(), 8, epochs)] == names


def test_more_seeds_decide_what_seeds_leave_open():
    # Standard deviation of a seed's effect 0.02: 9 seeds give 2.306 * 0.02 / 3 = 0.01537 and 10 give 2.262 * 0.02 /
    # sqrt(10) = 0.01431, so 0.015 takes 10.
    spread = gain(0.015, 0.03, seed_variance=4e-4)
    assert seeds_to_decide(spread) == 10
    (line,) = changes(both("undecided", "pays", spread), [], minutes=10, trained=1.0)
    assert "about 10 seeds would decide it, in about 25 minutes" in line  # 10 of 4 seeds' minutes
    # 1.98 sqrt(0.01 / 100) = 0.0198 of the examples remains: twice 0.0099, so 4 times the examples.
    spread = gain(0.0099, 0.02, example_variance=0.01)
    assert seeds_to_decide(spread) is None
    (line,) = changes(both("undecided", "pays", spread), [], minutes=10, trained=1.0)
    assert "more minutes alone would not decide it: the 100 test examples" in line
    assert "about 4.0 times as many" in line
    (line,) = changes(both("undecided", "pays", gain(1e-5, 0.02, example_variance=0.01)), [], 10, 1.0)
    assert "the difference is small compared to its spread" in line


def test_causes_have_their_remedies_and_a_short_training_is_named():
    reasons = ["Overfitting: ...", "Slower: ...", "Idle experts: ..."]
    lines = changes(both("does not pay", "does not pay"), reasons, minutes=3, trained=0.1)
    assert len(lines) == 4
    assert "a run has 10% of the configured steps" in lines[0]
    assert "about 30 minutes" in lines[0]


DENSE = "dense_equal_flops"


def of_task(model, *means, task="spend"):
    """Return values of 40 rows that are ``means`` by seed, each row at 0.1 from its mean."""
    scatter = 0.1 * np.where(np.arange(40) % 2, 1, -1)
    return OfTask(task, model, "r2", np.array(means)[:, None] + scatter)


BEST = "spend: {} is best (r2: {}; over the second 95 % interval {})."
NONE = "spend: no model is shown to be best (r2: {}; the first over the second 95 % interval {}). "
FEW = "Fewer than 3 seeds decide nothing."


# The intervals of one seed and of two exclude 0 in the last rows, as three seeds' would.
@pytest.mark.parametrize("sparse, dense, trees, sentence", [
    ((0.3, 0.31, 0.29), (0.29, 0.28, 0.30), 0.5,
     BEST.format("lightgbm", "lightgbm 0.5, sparse 0.3, dense, equal FLOPs 0.29", "+0.173 to +0.227")
     + " Of the networks, sparse adds nothing that is shown."),
    ((0.6, 0.61, 0.59), (0.3, 0.31, 0.29), 0.5,
     BEST.format("sparse", "sparse 0.6, lightgbm 0.5, dense, equal FLOPs 0.3", "+0.0734 to +0.127")),
    ((0.5, 0.7), (0.3, 0.5), 0.55,
     NONE.format("sparse 0.6, lightgbm 0.55, dense, equal FLOPs 0.4", "-1.22 to +1.32") + FEW),
    ((0.6,), (0.3,), 0.5, NONE.format("sparse 0.6, lightgbm 0.5, dense, equal FLOPs 0.3", "+0.1 to +0.1") + FEW),
    ((0.6, 0.6), (0.3, 0.3), 0.7,
     NONE.format("lightgbm 0.7, sparse 0.6, dense, equal FLOPs 0.3", "+0.1 to +0.1") + FEW),
])  # fmt: skip
def test_the_best_model_is_named_where_an_interval_of_three_seeds_shows_it(sparse, dense, trees, sentence):
    models = (of_task("sparse", *sparse), of_task(DENSE, *dense), of_task("lightgbm", trees))
    assert best_model("spend", {own.model: own for own in models}, DENSE) == sentence


def test_values_are_gathered_by_task_and_model():
    tasks = [{"a": ("auc", np.full(4, value)), "b": ("r2", np.full(4, value + 1))} for value in (0.1, 0.2, 0.3)]
    finished = [Finished(seed, [{}] * 3, [np.zeros(4)] * 3, tasks) for seed in (0, 1)]
    models = by_task(finished, [OfTask("b", "lightgbm", "r2", np.full((1, 4), 0.9))], DENSE)
    assert (list(models), list(models["b"])) == (["a", "b"], ["sparse", DENSE, "lightgbm"])
    assert models["a"][DENSE].values_SN.tolist() == [[0.2] * 4] * 2
    assert models["b"]["sparse"].quality == pytest.approx(1.1)
