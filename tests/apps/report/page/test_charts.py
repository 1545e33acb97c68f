"""Charts: their numbers as a table, specifications that Vega-Lite's schema allows, and those of a run's log."""

from __future__ import annotations

import math

import altair as alt
import numpy as np
import pytest
from jsonschema import ValidationError
from PIL import Image

from apps.report.page import Section, Text, html, save_charts
from apps.report.page.charts import BarChart, HeatmapChart, Line, LineChart, Point, ScatterChart, placed, thinned_rows
from apps.report.page.parts import Words
from apps.report.page.training import training_section
from apps.report.page.vega import MOST_POINTS, still, vega_lite
from apps.report.use import load_charts


def rows(spec: dict) -> list[dict]:
    """Return all rows of data of a specification."""
    return [row for data in spec["datasets"].values() for row in data] if "datasets" in spec else spec["data"]["values"]


def test_specifications_are_those_that_the_schema_allows():
    lines = LineChart("t", "s", "x", "y", (Line("a", (1.0, 2.0), (5.0, math.nan)), Line("b", (2.0,), (7.0,), "part")))
    points = ScatterChart("t", "s", "x", "y", (Point("a", 1.0, 2.0), Point("b", 2.0, 3.0, 2.5, 3.5)), log_x=True)
    bars = BarChart("t", "s", "x", "y", ("0", "1"), {"a": (1.0, 2.0), "b": (2.0, 1.0)}, line=1.5)
    maps = HeatmapChart("t", "s", "r", "c", ("a", "b"), ("0", "1"), ((1.0, 0.0), (0.5, 0.5)))
    words = Words("t", ("one", "two"), {"block 1": ("0", "1")}, 2, {"loss": (1.0, 2.0)})
    for chart in (lines, points, bars, maps):
        alt.LayerChart.validate(vega_lite(chart))
    alt.VConcatChart.validate(still([lines, points, bars, maps, words], "t"))
    with pytest.raises(ValidationError, match="'high' is not"):
        alt.LayerChart.validate({**vega_lite(bars), "height": "high"})


def test_the_library_of_charts_is_made_once_for_each_version_where_the_cache_can_be_written(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda code: made.append(code) or "made")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [html.script.__wrapped__() for _ in range(2)] == ["made"] * 2
    assert len(made) == 1
    monkeypatch.setattr(html, "version", lambda _: "0")
    assert html.script.__wrapped__() == "made"
    assert len(made) == 2
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert [html.script.__wrapped__() for _ in range(2)] == ["made"] * 2
    assert len(made) == 4


def test_a_long_line_is_drawn_by_means_of_its_parts_and_a_table_has_a_row_for_each_x():
    line = Line("a", (0.0, 1.0, 2.0, 3.0, 4.0), (0.0, 10.0, 20.0, 30.0, 100.0))
    # 5 points in 2 parts: round(2.5) = 2, so the first two and the other three.
    assert line.thinned(2) == Line("a", (0.5, 3.0), (5.0, 50.0))
    assert line.thinned(5) is line
    assert thinned_rows([(str(i),) for i in range(9)], 5) == [("0",), ("2",), ("4",), ("6",), ("8",)]
    assert thinned_rows([("0",)], 5) == [("0",)]
    long = LineChart("t", "s", "x", "y", (Line("a", tuple(map(float, range(1000))), (1.0,) * 1000),))
    assert len(rows(vega_lite(long))) == MOST_POINTS
    lines = (Line("a", (1.0, 2.0), (5.0, math.nan)), Line("a", (2.0,), (7.5,), "seed 1"))
    chart = LineChart("t", "s", "step", "y", lines)
    assert chart.headings() == ("step", "a", "a, seed 1")
    assert chart.cells() == [("1", "5", "–"), ("2", "–", "7.5")]
    assert {"label": "a", "name": "a", "x": 2.0, "y": None} in rows(vega_lite(chart))


def test_points_without_an_interval_have_no_bar_and_those_of_equal_cost_are_both_seen():
    chart = ScatterChart("t", "s", "x", "y", (Point("a", 1.0, 2.0), Point("b", 2.0, 3.0, 2.5, 3.5)), log_x=True)
    assert chart.cells() == [("a", "1", "2", "–"), ("b", "2", "3", "2.5 to 3.5")]
    spec = vega_lite(chart)
    assert spec["layer"][0]["transform"] == [{"filter": "isValid(datum.low)"}]
    assert spec["layer"][1]["encoding"]["x"]["scale"]["type"] == "log"
    assert spec["description"] == "t. s"
    spec = vega_lite(ScatterChart("t", "s", "x", "y", tuple(Point(name, 2.0, 3.0, 2.5, 3.5) for name in "ab")))
    bars, points = (layer["mark"] for layer in spec["layer"])
    assert not {"xOffset", "x2Offset"} & (bars.keys() | points.keys() | spec["layer"][0]["encoding"].keys())
    assert [(own["x"], own["bar"], own["size"]) for own in rows(spec)] == [(2.0, 6, 110), (2.0, 4, 70)]
    assert (bars["strokeWidth"], points["size"]) == ({"expr": "datum.bar"}, {"expr": "datum.size"})
    many = vega_lite(ScatterChart("t", "s", "x", "y", tuple(Point(f"m{i}", float(i), 1.0) for i in range(20))))
    color, shape = (many["layer"][1]["encoding"][name]["scale"]["range"] for name in ("color", "shape"))
    assert len(set(zip(color, shape, strict=True))) == 20  # each has a colour or a shape of its own


def test_a_map_names_its_largest_share_and_leaves_gaps_and_loads_are_shares_beside_the_even_one():
    values = np.array([[0.25, 0.75], [math.nan, 0.5]])
    chart = HeatmapChart.of(values, ("cat", "dog"), title="Which", row_title="class")
    assert chart.summary == "share, % by class (2) and expert (2); the largest is 75 %, class cat and expert 1."
    assert chart.cells() == [("cat", "25.0", "75.0"), ("dog", "–", "50.0")]
    assert len({(r["row"], r["column"]) for r in rows(vega_lite(chart))}) == 3
    (chart,) = load_charts({"block 1": np.array([10, 30, 0, 40])}, {"block 1": 0.05})
    assert chart.series == {"block 1": (12.5, 37.5, 0.0, 50.0)}
    assert chart.line == 25
    assert chart.summary == ("Expert 3 has most, 50.0 %, 2.00 times the even 25 %; 5 % of the pairs were dropped.")
    assert len(vega_lite(chart)["layer"]) == 2


def test_long_names_of_bars_are_slanted_and_all_there():
    for names, looks in ((["00", "11"], (0, True)), ([f"a long name of a class{i}" for i in range(3)], (-45, False))):
        chart = BarChart("t", "s", "class", "y", tuple(names), {"a": (1.0,) * len(names)})
        axis = vega_lite(chart)["layer"][0]["encoding"]["x"]["axis"]
        assert (axis["labelAngle"], axis["labelOverlap"]) == looks


def test_parts_that_do_not_fit_are_refused():
    for make, message in (
        (lambda: Line("a", (1.0,), ()), "line 'a' has 1 x for 0 y"),
        (lambda: BarChart("t", "s", "x", "y", ("0",), {"a": (1.0, 2.0)}), "bars 'a': 2 values for 1 names"),
        (lambda: HeatmapChart("t", "s", "r", "c", ("a",), ("0", "1"), ((1.0,),)), "heat map 't': 1 rows of values"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def drawn(spec: dict) -> list[dict]:
    """Return the charts of a file, line by line."""
    return [chart for line in spec["vconcat"] for chart in line["hconcat"]]


def heatmap(name: str, rows: tuple[str, ...], values: list[list[float]]) -> HeatmapChart:
    return HeatmapChart.of(np.array(values), rows, title=f"Which, {name}", row_title="class")


def test_maps_of_a_file_have_one_scale_and_neighbors_name_their_rows_once():
    maps = [heatmap(f"encoder {i}", ("de", "fr"), [[0.5, 0.5], [0.2, 0.8]]) for i in (1, 3)]
    maps.append(heatmap("decoder 1", ("en",), [[0.4, 0.6]]))
    charts = drawn(still(maps, "title"))
    assert [chart["title"]["text"] for chart in charts] == ["encoder 1", "encoder 3", "decoder 1"]
    encodings = [chart["layer"][0]["encoding"] for chart in charts]
    assert [encoding["color"]["scale"]["domain"] for encoding in encodings] == [[0, 80]] * 3
    assert [encoding["y"].get("axis", {}) is None for encoding in encodings] == [False, True, False]
    assert [encoding["color"].get("legend", {}) is None for encoding in encodings] == [True, True, False]
    wide = [heatmap(f"encoder {i}", ("de",), [[1 / 16] * 16]) for i in range(3)]  # 480 of 1,300 pixels each
    assert [len(line["hconcat"]) for line in still(wide, "title")["vconcat"]] == [2, 1]


def test_colors_of_a_map_may_end_below_the_largest_share_and_rows_of_one_name_are_rows_of_their_own():
    chart = HeatmapChart("t", "s", "r", "c", ("tag", "word"), ("0", "1"), ((100, 0), (40, 60)), top=60)
    assert chart.shown_top == 60
    assert HeatmapChart("t", "s", "r", "c", ("a",), ("0",), ((40,),)).shown_top == 40
    chart = HeatmapChart("t", "s", "r", "c", ("the", "the"), ("0",), ((1,), (2,)))
    assert len({row["row"] for row in rows(vega_lite(chart))}) == 2


def test_notes_of_points_do_not_cover_each_other():
    points = ((10.0, 90.0, ""), (9.9, 90.0, "K=2"), (9.8, 89.9, "K=1"), (9.9, 89.8, "c=1"))
    chart = ScatterChart("t", "s", "x", "y", tuple(Point("a", x, y, note=note) for x, y, note in points))
    xs = [24 + 252 * (x - 9.8) / 0.2 for x, *_ in points]
    ys = [260 - 16 - 228 * (y - 89.8) / 0.2 for _, y, _ in points]
    boxes = [
        (x + dx - 2.6 * len(note), y + dy - 5, x + dx + 2.6 * len(note), y + dy + 5)
        for x, y, (dx, dy), (*_, note) in zip(xs, ys, placed(chart, 300, 260), points, strict=True)
        if note
    ]
    for i, a in enumerate(boxes):
        assert not [b for b in boxes[i + 1 :] if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]


@pytest.mark.parametrize(
    "chart",
    [
        ScatterChart(
            "t", "s", "x", "y", (Point("a", 1, 2, 1, 3, 0.5, 2, "K=1"), Point("b", 5, 3)), True, True, ((1, 2),)
        ),
        LineChart("t", "s", "x", "y", (Line("a", (1, 2), (0, 1), notes=("4", "8")),), True, True, True),
        BarChart("t", "s", "x", "y", ("a", "b"), {"one": (1.0, 2.0), "two": (2.0, math.nan)}, line=1.5),
        HeatmapChart("t", "s", "r", "c", ("a",), ("0", "1"), ((1.0, math.nan),)),
        Words("t", ("a", "b", "a"), {"block 1": ("0", "1 0", "")}, 2),
    ],
    ids=lambda chart: type(chart).__name__,
)
def test_every_kind_is_drawn_in_a_file(chart, tmp_path):
    path = save_charts([chart], tmp_path / "new" / "a.png", "A title")
    with Image.open(path) as image:
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


METRICS = """\
step,train/loss,val/loss,val/top1,val/bleu,routing/model.blocks.1.mlp/load_imbalance,\
routing/model.blocks.1.mlp/drop_rate,routing/load_imbalance
9,2.0,,,,1.5,0.0,1.5
19,1.0,1.5,0.5,31.5,1.25,0.0,1.25
29,,,0.75,33.5,,,
"""


def test_losses_validation_and_layers(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    *charts, never = training_section(tmp_path / "metrics.csv").parts
    assert all(isinstance(chart, LineChart) for chart in charts)
    assert {chart.title: chart.lines for chart in charts} == {
        "Loss": (Line("train", (9.0, 19.0), (2.0, 1.0)), Line("val", (19.0,), (1.5,))),
        "Validation: top1": (Line("top1", (19.0, 29.0), (0.5, 0.75)),),
        "Validation: bleu": (Line("bleu", (19.0, 29.0), (31.5, 33.5)),),
        "Load imbalance in training": (Line("block 1", (9.0, 19.0), (1.5, 1.25)),),
    }
    assert charts[0].summary == "Over optimizer steps: train from 2 to 1; val from 1.5 to 1.5."
    assert never == Text(("No routed pair was dropped.",))


def test_each_layer_of_a_block_has_its_line_and_a_run_without_a_log_no_section(tmp_path):
    assert training_section(tmp_path / "metrics.csv") == Section("Training")
    names = ",".join(f"routing/model.blocks.0.{layer}/load_imbalance" for layer in ("mixing", "ffn", "depth_gate"))
    (tmp_path / "metrics.csv").write_text(f"step,{names}\n9,1.5,2.0,1.0\n")
    (chart,) = training_section(tmp_path / "metrics.csv").parts
    lines = {line.label: line.y for line in chart.lines}
    assert lines == {"block 0 mixing": (1.5,), "block 0 ffn": (2.0,), "block 0 depth gate": (1.0,)}
