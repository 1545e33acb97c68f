"""Rows of a board: their order, intervals and words, from figures that are written by hand."""

import json
import shutil

import pytest
from small_suite import small_suite
from torch import nn

import core
from apps.compare.suite.command import kind_of
from apps.compare.suite.file import Suite
from apps.compare.suite.standings import Figures, leaderboard_page, overall, standings
from apps.report.page.writing import markdown

COST = {"num_params": 2000, "active_params": 1000, "flops_per_example": 2.5e6, "unit": "a point"}
FACTS = {"kind": "sparse", "refused": "", "cost": COST, "monitor": "top1", "higher_is_better": True}


def board(folder, runs, seeds=3, **options):
    """Return the standings of a board whose rows have these values of each seed in the metric "top1", by name."""
    models = [{"name": name} for name in runs]
    suite = Suite.read(small_suite(folder, seeds=seeds, models=models, baselines=[], **options))
    shutil.rmtree(folder / "figures", ignore_errors=True)  # of a board before it
    figures = Figures(folder / "figures")
    for entry in suite.boards[0].entries:
        values = runs[entry.name]
        if values is None:
            continue
        figures.add(entry, **FACTS)
        for seed, value in enumerate(values):
            test = dict.fromkeys(suite.boards[0].metrics or ("top1",), value)
            run = {"test": test, "train_seconds": 10.0 * (seed + 1), "machine": "a machine, 2026-01-02"}
            figures.add_run(entry, seed, run)
    return suite, standings(suite.boards[0], suite, figures)


def test_the_best_mean_leads_and_the_others_are_behind_it_seed_by_seed(tmp_path):
    runs = {"A": [0.80, 0.82, 0.84], "none yet": None, "B": [0.90, 0.91, 0.95], "C": [0.70]}
    _, found = board(tmp_path, runs, metrics=["top1"])
    assert [row.title for row in found.rows] == ["B", "A", "C", "none yet"]
    best, second, third, last = found.rows
    assert best.behind is None
    # 0.10, 0.09, 0.11: mean 0.10, deviation 0.01, t(0.975, 2) = 4.3027, / sqrt(3).
    assert second.behind.mean == pytest.approx(0.10)
    assert second.behind.half_width == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-5)
    assert (third.behind.mean, third.behind.half_width) == (pytest.approx(0.20), None)  # seed 0 alone
    assert (last.tests["top1"], last.state, second.costs.train_seconds) == (None, "not run", 20.0)
    lead = "B leads with top1 92.00 ± 6.57 %, +10.00 ± 2.48 points compared with A"
    assert found.sentence() == f"{lead} (significant)."
    line = dict(zip(*found.cells()[:2], strict=True))
    assert (line["model"], line["MFLOPs per point"]) == ("B", "2.50")
    assert (line["parameters"], line["active parameters"], line["seeds"]) == ("2,000", "1,000", "3 of 3")


@pytest.mark.parametrize("runs, words", [
    ({"A": [0.5, 0.9]}, "A leads with top1 70.00 ± 254.12 %."),
    ({"A": [0.5], "B": [0.4]}, "A leads with top1 50.00 %, +10.00 points compared with B (one seed)."),
    ({"A": [0.5, 0.6], "B": [0.4, 0.7]}, "compared with B (not significant)."),
    ({"A": [0.5, 0.5], "B": [0.4, 0.4]}, "+10.00 ± 0.00 points compared with B (no spread over seeds)."),
    ({"A": None}, ""),
])  # fmt: skip
def test_a_lead_is_shown_by_its_interval_alone(tmp_path, runs, words):
    _, found = board(tmp_path, runs, seeds=2, metrics=["top1"])
    assert found.sentence().endswith(words)


def test_errors_are_ranked_from_below_and_without_metrics_the_monitored_one_ranks(tmp_path):
    _, found = board(tmp_path, {"A": [0.9, 0.8], "B": [0.7, 0.6]}, seeds=2, metrics=["rmse"], lower_is_better=True)
    assert ([row.title for row in found.rows], found.cells()[0][2:4]) == (["B", "A"], ["rmse", "best minus it, rmse"])
    assert found.rows[1].behind.mean == pytest.approx(-0.2)
    assert ", -0.2 ± 0 compared with A (" in found.sentence()
    _, found = board(tmp_path, {"A": [0.9]}, metrics=[])
    assert found.metrics == ("top1",)
    _, found = board(tmp_path, {"A": [0.5, 0.5, 0.9]}, seeds=2, metrics=["top1"])
    assert (found.rows[0].tests["top1"].mean, found.rows[0].num_seeds) == (0.5, 2)
    suite, _ = board(tmp_path, {"A": [1 / 3]})
    (row,) = json.loads((tmp_path / "figures" / "points.json").read_text())["rows"].values()
    assert (row["runs"]["0"]["test"]["top1"], row["cost"]["num_params"]) == (0.3333333, 2000)


def test_the_page_has_every_board_and_the_leaders(tmp_path):
    suite, found = board(tmp_path, {"A": [0.80, 0.82], "B": [0.90, 0.91], "C": None}, seeds=2, about="Points.")
    page = leaderboard_page(suite, [found], "2026-01-02T03:04:05")
    assert page.verdict == (f"Points: {found.sentence()}",)
    first = page.sections[1]
    assert [type(part).__name__ for part in first.parts] == ["Text", "ScatterChart", "ScatterChart", "Table", "Text"]
    flops, points = first.parts[1], [("B", 2.5, pytest.approx(90.5)), ("A", 2.5, pytest.approx(81))]
    assert [(p.label, p.x, p.y) for p in flops.points] == points
    assert flops.points[0].low == pytest.approx(90.5 - 6.3531, abs=1e-3)
    assert [entry.name for entry in page.entries] == ["Points: B", "Points: A"]
    text = markdown(page)
    assert "sparse: an example leaves experts out" in text.lower()
    assert "\nNot run: C." in text
    assert "- Runs: a machine, 2026-01-02." in text


def test_ranks_and_gaps_over_the_boards_by_hand(tmp_path):
    scores = [
        {"A": [0.9], "B": [0.7], "C": [0.5]},
        {"A": [0.8], "B": [0.8], "C": [0.4]},
        {"A": [0.1], "B": [0.2], "C": [0.3]},
    ]
    boards = [board(tmp_path, runs, seeds=1)[1] for runs in scores]
    assert overall(boards[:2]) == []  # two boards are no draw of boards
    table = overall(boards)[0].parts[0]
    # A's ranks are 1, 1.5 (equal to B) and 3; its gaps 0, 0 and 1, as the last of the third. B's are 2, 1.5 and 2.
    means = {name: [own.split(" ±")[0] for own in more] for name, *more in table.rows}
    assert means == {"A": ["1.8", "2", "0.3"], "B": ["1.83", "1", "0.33"], "C": ["2.3", "1", "0.7"]}
    others = board(tmp_path, {"A": [0.9], "B": [0.7], "D": [0.5]}, seeds=1)[1]
    assert overall([*boards, others]) == []


def test_a_brief_table_is_short_and_all_rows_without_a_seed_are_one_note(tmp_path):
    _, found = board(tmp_path, {"A": [0.5, 0.6], "B": [0.4, 0.7]}, seeds=2, metrics=["top1"])
    headings, line, _ = found.cells(brief=True)
    assert headings[-3:] == ["MFLOPs per point", "parameters (active)", "training time, s"]
    assert line[-3:] == ["2.50", "2,000 (1,000)", "15.0"]
    suite, found = board(tmp_path, {"A": [0.5], "B": [0.4]}, seeds=2, metrics=["top1"])
    text = markdown(leaderboard_page(suite, [found], "", brief=True))
    assert "\nNot all seeds: all rows have 1 of 2. " in text
    assert text.count("Runs: ") == 1


def test_what_a_model_is_comes_from_its_layers():
    class Holder:
        def __init__(self, config):
            self.module = nn.Sequential(config.build(8)) if config else nn.Linear(2, 2)

    def moe(router, **options):
        return Holder(core.MoEConfig(num_experts=4, router=router, expert=core.FFN(hidden_dim=8), **options))

    assert kind_of(moe(core.TokenChoice(top_k=2))) == "sparse"
    assert kind_of(moe(core.TokenChoice(top_k=4))) == "dense-gated"
    assert (kind_of(moe(core.Dense())), kind_of(Holder(None))) == ("dense-gated", "dense")
