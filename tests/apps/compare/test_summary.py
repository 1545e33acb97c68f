"""The numbers of finished runs, and the table and sentences made of them."""

from __future__ import annotations

import dataclasses

import pytest

from apps.compare.page import cells, legend
from apps.compare.summary import ExamplePair, Results, notes, summarize
from apps.compare.systems import System
from apps.equal_cost.comparable import ExampleDifference
from apps.train.cost.flops import Cost

MEASURED = {"sparse": {"seconds_per_step": 0.3}, "dense_equal_flops": {"seconds_per_step": 0.2}}


def finished(test: float, curve: list[tuple[int, float, float]], **further: float) -> dict:
    logged = {f"test/{name}": value for name, value in {"top1": test, **further}.items()}
    return {
        "test": logged,
        "test_quality": test,
        "train_seconds": curve[-1][1],
        "steps": curve[-1][0],
        "curve": curve,
    }


def summary(
    speeds: dict | None = None,
    others: dict | None = None,
    further: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    metric: str = "test/top1",
):
    systems = [System("sparse", ""), System("dense_equal_flops", "wide"), System("trees", "", refused="no library")]
    finals = {
        "sparse": [
            finished(0.9, [(5, 2.0, 0.6), (10, 4.0, 0.9)], auc_a=0.95, log_loss_a=0.4),
            finished(0.8, [(5, 3.0, 0.5), (10, 6.0, 0.8)], auc_a=0.93, log_loss_a=0.6),
        ],
        "dense_equal_flops": [
            finished(0.7, [(5, 1.0, 0.5), (10, 2.0, 0.7)], auc_a=0.92),
            finished(0.7, [(5, 2.0, 0.4), (10, 4.0, 0.7)], auc_a=0.92),
        ],
    }
    rates = {"sparse": (0.1, True), "dense_equal_flops": (0.1, False), "forest": (None, False)}
    if others:
        systems.append(System("forest", "no steps"))
        finals |= others
    results = Results(finals, rates, speeds=speeds or {})
    return summarize(systems, results, (0, 1), metric=metric, higher_is_better=True, further=further, tasks=tasks)


def test_equal_time_ends_when_the_fastest_ends():
    s = summary()
    # Dense ends after 2 s and 4 s; by then sparse had reached 0.6 and 0.5.
    assert s.clock == "recorded"
    assert s.equal_seconds == (2.0, 4.0)
    sparse, dense = s.rows
    assert sparse.equal_time.mean == pytest.approx(0.55)
    assert dense.equal_time.mean == pytest.approx(0.7)
    assert dense.equal_time_difference.mean == pytest.approx(-0.15)
    assert dense.difference.mean == pytest.approx(0.15)
    assert [left.name for left in s.left_out] == ["trees"]


def test_equal_time_takes_the_measured_step_where_there_is_one():
    s = summary(MEASURED)
    # 10 steps of 0.2 s; sparse has done 6 of its own by then, its last validation was after 5.
    assert s.clock == "steps"
    assert s.equal_seconds == (2.0, 2.0)
    assert s.rows[0].equal_time.mean == pytest.approx(0.55)


def test_a_poor_bleu_is_no_share():
    # In 0..1, as a share would be: it is in points already.
    systems = [System("sparse", "")]
    finals = {"sparse": [finished(0.4, [(5, 2.0, 0.4)], chrf=0.9, token_accuracy=0.1)]}
    further = ("chrf", "token_accuracy")
    results = Results(finals, {"sparse": (0.1, False)})
    s = summarize(systems, results, (0,), metric="test/bleu", higher_is_better=True, further=further)
    assert not s.percent
    assert s.shares == ("token_accuracy",)


def test_an_estimator_takes_no_part_in_equal_time():
    forest = [finished(0.6, [(None, 0.5, 0.6)]), finished(0.6, [(None, 0.5, 0.6)])]
    for speeds, seconds in (({}, (2.0, 4.0)), (MEASURED, (2.0, 2.0))):
        s = summary(speeds, {"forest": forest})
        assert s.equal_seconds == seconds  # not the 0.5 s of the forest
        assert s.clock == ("steps" if speeds else "recorded")
        row = s.rows[2]
        assert (row.equal_time, row.equal_time_difference) == (None, None)
        assert row.difference.mean == pytest.approx(0.25)
        assert row.train_seconds == 0.5
    assert "Models without steps take no part." in " ".join(legend(s))


def test_further_metrics_have_a_line_each_with_the_paired_difference():
    forest = [finished(0.6, [(None, 0.5, 0.6)], auc_a=0.9), finished(0.6, [(None, 0.5, 0.6)], auc_a=0.9)]
    s = summary(others={"forest": forest}, further=("auc_a", "log_loss_a", "auc_b"))
    assert "auc_a" in s.shares
    assert "log_loss_a" not in s.shares
    table = cells(s)
    titles = [line[0] for line in table]
    place = titles.index("test auc_a, %")
    # Differences to the dense model 0.03, 0.01: mean 0.02, half 12.706 * 0.01; to the forest 0.05, 0.03.
    assert table[place][1:] == ["94.00 ± 12.71", "92.00 ± 0.00", "90.00 ± 0.00"]
    assert table[place + 1] == ["  sparse minus it, points", "–", "+2.00 ± 12.71", "+4.00 ± 12.71"]
    # A loss is shown as it is; only the sparse model reports it here.
    assert table[titles.index("test log_loss_a")][1:] == ["0.5 ± 1.3", "–", "–"]
    assert not any("auc_b" in title for title in titles)  # nobody reports it


def test_sentences_say_what_the_interval_allows():
    # Differences 0.2 and 0.1: mean 0.15, half t(0.975, 1) * 0.0707 / sqrt(2) = 12.706 * 0.05 = 0.635
    first, second = summary().sentences()
    assert first == (
        "Against dense, equal FLOPs: no difference shown at this budget (sparse minus dense +15.00 points; "
        "95 % interval over 2 seeds -48.53 to +78.53 points, which holds 0)."
    )
    assert second.startswith(
        "Against dense, equal FLOPs: no difference shown at equal training time, on validation data"
    )


def test_sentences_go_task_by_task():
    # Tasks auc_a, differences 0.03 and 0.01, and top1, the monitored one: 0.2 and 0.1; see above.
    *by_task, at_time = summary(further=("auc_a", "log_loss_a"), tasks=("top1", "auc_a")).sentences()
    assert [line.partition("; ")[0] for line in by_task] == [
        "Against dense, equal FLOPs: no difference shown in top1 at this budget (sparse minus dense +15.00 points",
        "Against dense, equal FLOPs: no difference shown in auc_a at this budget (sparse minus dense +2.00 points",
    ]
    assert "no difference shown in top1 at equal training time, on validation data" in at_time
    # What is no task's own metric is a mean over the tasks, and is called one.
    mean = summary(further=("auc_a",), tasks=("auc_a",), metric="test/auc")
    assert "in mean auc at equal training time" in mean.sentences()[-1]
    assert cells(mean)[1][0] == "test mean auc, %"


def test_intervals_over_seeds_and_over_examples_are_told_apart():
    s = summary()
    assert s.two_intervals() == ""
    bleu = ExampleDifference("BLEU", 0.4, 0.1, 0.7, 0.002, "paired bootstrap", over="test sentences")
    s = dataclasses.replace(s, examples=(ExamplePair("dense_equal_flops", 1, (bleu,)),))
    assert s.two_intervals() == (
        "Two kinds of interval. Above, over training seeds: would both models, trained again, differ so? Below, over "
        "the test sentences of one seed: would these two trained models differ on other test sentences? A difference "
        "may be significant below and not shown above."
    )
    assert (
        "Against dense, equal FLOPs, seed 1: BLEU difference +0.40, 95 % interval over the test sentences +0.10 to "
        "+0.70, p = 0.002: significant over these test sentences (paired bootstrap)."
    ) in s.example_lines()
    top1 = dataclasses.replace(bleu, name="top1", over="test images")
    s = dataclasses.replace(s, examples=(ExamplePair("dense_equal_flops", 1, (top1,)),))
    assert "top1 difference +40.00 points, 95 % interval over the test images +10.00 to +70.00" in s.example_lines()[0]


def test_flops_are_those_before_training_and_once_trained_where_these_differ():
    cost = {"num_params": 1, "active_params": 1}
    systems = [System("sparse", "", Cost(**cost, flops_per_example=2e6, unit="an image"))]
    finals = {"sparse": [finished(0.4, [(5, 2.0, 0.4)])]}

    def rows(trained: float) -> dict:
        speeds = {"sparse": {"cost": {**cost, "flops_per_example": trained, "replaced_flops_per_example": 1.0}}}
        results = Results(finals, {"sparse": (0.1, False)}, speeds=speeds)
        s = summarize(systems, results, (0,), metric="test/top1", higher_is_better=True)
        return {line[0].strip(): line[1:] for line in cells(s)}

    assert rows(2e6)["MFLOPs an image"] == ["2.00"]
    assert "computed once trained" not in rows(2e6)
    assert rows(1.5e6)["MFLOPs an image"] == ["2.00"]
    assert rows(1.5e6)["computed once trained"] == ["1.50"]


def test_table_shows_intervals_edges_and_what_was_left_out():
    s = summary()
    rows = {line[0].strip(): line[1:] for line in cells(s)}
    assert rows[""] == ["sparse", "dense, equal FLOPs"]
    assert rows["test top1, %"][1] == "70.00 ± 0.00"
    assert rows["learning rate"] == ["0.1 (edge)", "0.1"]
    assert "training, examples/s" not in rows  # not measured
    assert "trees: left out: no library." in notes(s)
    assert any(line.startswith("Best at the edge of the learning rates tried: sparse (0.1)") for line in notes(s))


def test_a_model_with_a_heading_of_its_own_is_called_by_it():
    systems = [System("sparse", "", heading="MMoE, dense gates"), System("dense_equal_flops", "")]
    finals = {"sparse": [finished(0.4, [(5, 2.0, 0.4)])], "dense_equal_flops": [finished(0.3, [(5, 2.0, 0.3)])]}
    rates = {"sparse": (0.1, False), "dense_equal_flops": (0.1, False)}
    summary = summarize(systems, Results(finals, rates), (0,), metric="test/top1", higher_is_better=True)
    rows = {line[0]: line[1:] for line in cells(summary)}
    assert rows[""] == ["MMoE, dense gates", "dense, equal FLOPs"]
    assert rows["  MMoE, dense gates minus it, points"] == ["–", "+10.00"]
