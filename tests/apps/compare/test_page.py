"""The report of a comparison."""

from __future__ import annotations

import json

import pytest
from made_page import Html


def test_the_report_says_everything_and_begins_with_the_verdict(whole):
    results = json.loads((whole / "results.json").read_text())
    page = Html((whole / "report.html").read_text())
    headings = ["Verdict", "Quality against cost", "Learning curves", "Test examples", "Training of the first seed",
                "Every figure", "How to repeat it"]  # fmt: skip
    start = page.text.index("\nVerdict\n")  # the links to the sections come before it
    places = [page.text.index(f"\n{title}\n", start) for title in headings]
    assert places == sorted(places)
    verdict = page.text[places[0] : places[1]]
    assert "Against dense, equal FLOPs: " in verdict
    assert "95 % interval over 2 seeds" in verdict
    assert "test top1, %" in verdict
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
    assert {row["name"] for row in curves} == {
        f"{name}, seed {seed}" for name in ("sparse", "dense, equal FLOPs") for seed in (0, 1)
    }
