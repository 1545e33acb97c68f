"""The numbers of finished runs: their statistics by hand, and the table, sentences and report made of them."""

import dataclasses
import json
import math

import pytest
import torch
from made_page import Html
from refusals import refused

from apps.compare.page import cells, legend
from apps.compare.summary import ExamplePair, Results, notes, summarize
from apps.compare.systems import System
from apps.equal_cost.comparison import ExampleDifference
from apps.report.intervals import Interval, choose, mean_interval, paired_difference, quality_at, verdict
from apps.train.cost.flops import Cost


def test_intervals_are_students_t_and_pairing_removes_what_both_share():
    # 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.30265, half width 4.30265 / sqrt(3) = 2.48414
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.half_width) == (2, pytest.approx(2.48414, abs=1e-5))
    assert (interval.low, interval.high) == pytest.approx((-0.48414, 4.48414), abs=1e-5)
    assert not interval.excludes_zero
    assert (mean_interval([0.5]), verdict(mean_interval([0.5]))) == (Interval(0.5, None, 1), "no difference shown")
    # An interval of width 0 only says that the seeds agree.
    assert verdict(paired_difference([2.0, 3.0], [1.0, 2.0])) == "no difference shown"
    # Seeds differ by 10 points, the two systems by 1.0, 1.1, 0.9: mean 1, deviation 0.1, half 4.30265 * 0.1 / sqrt(3)
    difference = paired_difference([91.0, 81.1, 70.9], [90.0, 80.0, 70.0])
    assert (difference.mean, difference.half_width) == (pytest.approx(1.0), pytest.approx(0.24841, abs=1e-4))
    assert (verdict(difference), verdict(difference, higher_is_better=False)) == ("wins", "loses")
    refused("got 2 and 1 values", paired_difference, [1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    "ours, theirs", [((43, 39), (40, 36)), ((143, 101, 130), (140, 98, 127)), ((90, 88), (91, 89))]
)
def test_float32_rounding_of_equal_differences_is_no_evidence(ours, theirs):
    # Accuracies on 144 images, each with as many right ones more.
    a, b = (torch.tensor([n / 144 for n in counts]).tolist() for counts in (ours, theirs))
    difference = paired_difference(a, b)
    assert (difference.half_width, difference.mean) == (0, pytest.approx((ours[0] - theirs[0]) / 144))
    assert verdict(difference) == "no difference shown"
    # One image of a million is a difference that float32 tells.
    assert paired_difference(a, [b[0] + 1e-6, *b[1:]]).half_width > 0


def test_quality_is_that_of_the_last_validation_and_the_best_rate_is_taken():
    curve = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.6)]
    assert quality_at(curve, 0.9) is None
    assert (quality_at(curve, 2.0), quality_at(curve, 9.0)) == (0.7, 0.6)
    rates = (0.1, 0.3, 0.9)
    assert choose(rates, [0.5, 0.7, 0.6], 0.3) == 1
    assert choose(rates, [0.5, 0.7, 0.6], 0.3, higher_is_better=False) == 0
    assert choose(rates, [0.7, 0.6, 0.7], 0.2) == 0  # 0.1 is 2 times off, 0.9 is 4.5 times
    assert choose(rates, [None, 0.2, math.nan], 0.3) == 1
    refused(r"diverged at every learning rate of 0\.1, 0\.3, 0\.9", choose, rates, [None, None, None], 0.3)


MEASURED = {"sparse": {"seconds_per_step": 0.3}, "dense_equal_flops": {"seconds_per_step": 0.2}}


def finished(test: float, curve: list[tuple[int, float, float]], **further: float) -> dict:
    logged = {f"test/{name}": value for name, value in {"top1": test, **further}.items()}
    return {"test": logged, "test_quality": test, "train_seconds": curve[-1][1], "steps": curve[-1][0], "curve": curve}


def summary(speeds=None, others=None, further=(), tasks=(), metric="test/top1"):
    systems = [System("sparse", ""), System("dense_equal_flops", "wide"), System("trees", "", refused="no library")]
    first = finished(0.9, [(5, 2.0, 0.6), (10, 4.0, 0.9)], auc_a=0.95, log_loss_a=0.4)
    second = finished(0.8, [(5, 3.0, 0.5), (10, 6.0, 0.8)], auc_a=0.93, log_loss_a=0.6)
    curves = ([(5, 1.0, 0.5), (10, 2.0, 0.7)], [(5, 2.0, 0.4), (10, 4.0, 0.7)])
    finals = {"sparse": [first, second], "dense_equal_flops": [finished(0.7, c, auc_a=0.92) for c in curves]}
    rates = {"sparse": (0.1, True), "dense_equal_flops": (0.1, False), "forest": (None, False)}
    if others:
        systems.append(System("forest", "no steps"))
        finals |= others
    results = Results(finals, rates, speeds=speeds or {})
    return summarize(systems, results, (0, 1), metric=metric, higher_is_better=True, further=further, tasks=tasks)


def of_one_seed(*systems, metric="test/top1", speeds=None, further=(), **quality):
    """Return the summary of systems with one seed each, the second 0.1 behind the first."""
    finals = {s.name: [finished(q, [(5, 2.0, q)], **quality)] for s, q in zip(systems, (0.4, 0.3), strict=False)}
    results = Results(finals, {s.name: (0.1, False) for s in systems}, speeds=speeds or {})
    return summarize(systems, results, (0,), metric=metric, higher_is_better=True, further=further)


def test_equal_time_ends_when_the_fastest_ends_by_the_clock_or_measured_steps():
    s = summary()
    # Dense ends after 2 s and 4 s; by then sparse had reached 0.6 and 0.5.
    assert (s.clock, s.equal_seconds) == ("recorded", (2.0, 4.0))
    sparse, dense = s.rows
    assert (sparse.equal_time.mean, dense.equal_time.mean) == (pytest.approx(0.55), pytest.approx(0.7))
    assert dense.equal_time_difference.mean == pytest.approx(-0.15)
    assert (dense.difference.mean, [left.name for left in s.left_out]) == (pytest.approx(0.15), ["trees"])
    s = summary(MEASURED)
    # 10 steps of 0.2 s; sparse has done 6 of its own by then, its last validation was after 5.
    assert (s.clock, s.equal_seconds, s.rows[0].equal_time.mean) == ("steps", (2.0, 2.0), pytest.approx(0.55))


def test_a_poor_bleu_is_no_share_and_a_heading_of_its_own_is_taken():
    # In 0..1, as a share would be: it is in points already.
    further = {"chrf": 0.9, "token_accuracy": 0.1}
    s = of_one_seed(System("sparse", ""), metric="test/bleu", further=tuple(further), **further)
    assert (s.percent, s.shares) == (False, ("token_accuracy",))
    s = of_one_seed(System("sparse", "", heading="MMoE, dense gates"), System("dense_equal_flops", ""))
    rows = {line[0]: line[1:] for line in cells(s)}
    assert rows[""] == ["MMoE, dense gates", "dense, equal FLOPs"]
    assert rows["  MMoE, dense gates minus it, points"] == ["–", "+10.00"]


def test_an_estimator_takes_no_part_in_equal_time_and_further_metrics_have_a_line():
    forest = [finished(0.6, [(None, 0.5, 0.6)]), finished(0.6, [(None, 0.5, 0.6)])]
    for speeds, seconds in (({}, (2.0, 4.0)), (MEASURED, (2.0, 2.0))):
        s = summary(speeds, {"forest": forest})
        assert s.equal_seconds == seconds  # not the 0.5 s of the forest
        assert s.clock == ("steps" if speeds else "recorded")
        row = s.rows[2]
        assert (row.equal_time, row.equal_time_difference) == (None, None)
        assert (row.difference.mean, row.train_seconds) == (pytest.approx(0.25), 0.5)
    assert "Models without steps take no part." in " ".join(legend(s))
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


def test_sentences_say_what_the_interval_allows_task_by_task():
    # Differences 0.2 and 0.1: mean 0.15, half t(0.975, 1) * 0.0707 / sqrt(2) = 12.706 * 0.05 = 0.635
    first, second = summary().sentences()
    assert first == (
        "Against dense, equal FLOPs: no difference shown at this budget (sparse minus dense +15.00 points; "
        "95 % interval over 2 seeds -48.53 to +78.53 points, which holds 0)."
    )
    assert second.startswith(
        "Against dense, equal FLOPs: no difference shown at equal training time, on validation data"
    )
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


def test_the_table_shows_intervals_and_flops_before_training_and_once_trained():
    cost = {"num_params": 1, "active_params": 1}
    system = System("sparse", "", Cost(**cost, flops_per_example=2e6, unit="an image"))

    def rows(trained: float) -> dict:
        speeds = {"sparse": {"cost": {**cost, "flops_per_example": trained, "replaced_flops_per_example": 1.0}}}
        return {line[0].strip(): line[1:] for line in cells(of_one_seed(system, speeds=speeds))}

    assert rows(2e6)["MFLOPs an image"] == ["2.00"]
    assert "computed once trained" not in rows(2e6)
    assert (rows(1.5e6)["MFLOPs an image"], rows(1.5e6)["computed once trained"]) == (["2.00"], ["1.50"])
    s = summary()
    shown = {line[0].strip(): line[1:] for line in cells(s)}
    assert (shown[""], shown["test top1, %"][1]) == (["sparse", "dense, equal FLOPs"], "70.00 ± 0.00")
    assert shown["learning rate"] == ["0.1 (edge)", "0.1"]
    assert "training, examples/s" not in shown  # not measured
    assert "trees: left out: no library." in notes(s)
    assert any(line.startswith("Best at the edge of the learning rates tried: sparse (0.1)") for line in notes(s))


def test_the_report_says_everything_and_begins_with_the_verdict(whole):
    results = json.loads((whole / "results.json").read_text())
    page = Html((whole / "report.html").read_text())
    headings = ["Verdict", "Quality against cost", "Learning curves", "Test examples", "Training of the first seed",
                "Every figure", "How to repeat it"]  # fmt: skip
    start = page.text.index("\nVerdict\n")  # the links to the sections come before it
    places = [page.text.index(f"\n{title}\n", start) for title in headings]
    assert places == sorted(places)
    verdict = page.text[places[0] : places[1]]
    for part in ("Against dense, equal FLOPs: ", "95 % interval over 2 seeds", "test top1, %"):
        assert part in verdict
    assert results["command"] in page.text
    assert "class_path: compare_app.TinyModel" in page.text
    assert results["machine"]["torch"] in page.text
    assert results["machine"]["commit"] in page.text
    # The log of the first seed has the layer's load, in 6 steps that of its validation alone.
    assert "Load imbalance in validation" in page.text
    about = json.loads((whole / "report.json").read_text())
    assert [entry["name"] for entry in about["entries"]] == ["sparse", "dense, equal FLOPs", "centroids"]
    test = results["summary"]["rows"][0]["test"]["mean"]
    assert about["entries"][0]["figures"]["test top1, %"] == pytest.approx(100 * test)
    assert "MFLOPs" not in about["entries"][2]["figures"]


def test_quality_is_drawn_against_each_cost_that_is_known(whole):
    source = (whole / "report.html").read_text()
    specs = json.loads(source.partition('id="charts">')[2].partition("</script>")[0])
    costs = [name for name in specs if name.startswith("chart-quality-against")]
    assert costs == [f"chart-quality-against-{cost}" for cost in
                     ("active-flops", "parameters", "active-parameters", "training-time")]  # fmt: skip
    points = specs[costs[0]]["data"]["values"]
    assert [point["label"] for point in points] == ["sparse", "dense, equal FLOPs"]
    assert all(point["low"] <= point["y"] <= point["high"] for point in points)
    curves = specs["chart-over-steps"]["data"]["values"]
    names = {f"{name}, seed {seed}" for name in ("sparse", "dense, equal FLOPs") for seed in (0, 1)}
    assert {row["name"] for row in curves} == names
