"""Learning curves: read from a run's metrics.csv, and drawn."""

from __future__ import annotations

import numpy as np

from apps.report.curves import Curve, learning_curves, read_curves

METRICS = """step,train/loss,val/loss,val/bleu,routing/load_imbalance,val/routing/load_imbalance
0,,,,,
10,3.5,,,2.0,
20,3.0,,,1.5,
20,,3.25,12.5,,1.75
2"""

PANELS = {
    "loss": {"train": "train/loss", "validation": "val/loss"},
    "score": {"BLEU": "val/bleu", "chrF++": "val/chrf"},
    "time": {"seconds": "seconds"},
}


def test_curves_are_read_from_the_rows_that_have_them(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    curves = {
        panel: {c.label: list(zip(c.steps.tolist(), c.values.tolist(), strict=True)) for c in own}
        for panel, own in read_curves(tmp_path / "metrics.csv", PANELS).items()
    }
    assert curves == {
        "loss": {"train": [(10, 3.5), (20, 3.0)], "validation": [(20, 3.25)]},
        "score": {"BLEU": [(20, 12.5)]},
    }


def test_without_metrics_there_are_no_curves(tmp_path):
    assert read_curves(tmp_path / "metrics.csv", PANELS) == {}
    (tmp_path / "metrics.csv").write_text("step,epoch\n1,0\n")
    assert read_curves(tmp_path / "metrics.csv", PANELS) == {}


def test_curves_are_drawn_by_panel_and_the_best_score_is_marked():
    steps = np.array([10, 20, 30])
    bleu, loss = Curve("BLEU", steps, np.array([5.0, 9.25, 8.0])), Curve("train", steps, np.array([3.0, 2.0, 1.0]))
    left, right = learning_curves({"loss": [loss], "score": [bleu]}, "title", best="BLEU").axes
    assert [left.get_title(), right.get_title()] == ["loss", "score"]
    assert left.lines[0].get_ydata().tolist() == [3.0, 2.0, 1.0]
    assert (right.lines[0].get_xdata(), right.lines[0].get_ydata()) == ([20], [9.25])
    legends = [[t.get_text() for t in axis.get_legend().get_texts()] for axis in (left, right)]
    assert legends == [["train"], ["BLEU, best 9.2"]]


def test_a_long_curve_has_its_means_drawn_over_it():
    # 400 steps: 100 parts of 4, whose means are 2.5, 6.5, ...
    steps = np.arange(1, 401)
    (axis,) = learning_curves({"loss": [Curve("train", steps, steps.astype(float))]}, "title").axes
    pale, mean = axis.lines
    assert len(pale.get_ydata()) == 400
    assert list(mean.get_ydata())[:2] == [2.5, 6.5]
    assert len(mean.get_ydata()) == 100
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["train"]
