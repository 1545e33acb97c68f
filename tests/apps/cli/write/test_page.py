"""The page of a test: which figures come first."""

from __future__ import annotations

from apps.cli.write import page


def test_the_monitored_metric_and_those_that_the_model_shows_come_first(tmp_path):
    metrics = {"test/loss": 1.0, "test/zero_shot_colour": 0.5, "test/recall_1": 0.25, "test/recall_10": 0.75}
    made = page.test_page(metrics, "test/recall_10", ("recall_1",), tmp_path, None, "moesaic test", "", (), ())
    assert made.figures.rows == (
        ("test recall_10, %", "75.0000"),
        ("test recall_1, %", "25.0000"),
        ("test loss", "1.0000"),
        ("test zero_shot_colour, %", "50.0000"),
    )
