"""Charts: their numbers as a table, and specifications that Vega-Lite's schema allows."""

from __future__ import annotations

import math

import altair as alt
import numpy as np
import pytest
from jsonschema import ValidationError
from PIL import Image

from apps.report.page import html, save_charts
from apps.report.page.charts import BarChart, HeatmapChart, Line, LineChart, Point, ScatterChart, placed, thinned_rows
from apps.report.page.parts import Words
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


def test_a_long_line_is_drawn_by_means_of_its_parts():
    line = Line("a", (0.0, 1.0, 2.0, 3.0, 4.0), (0.0, 10.0, 20.0, 30.0, 100.0))
    # 5 points in 2 parts: round(2.5) = 2, so the first two and the other three.
    assert line.thinned(2) == Line("a", (0.5, 3.0), (5.0, 50.0))
    assert line.thinned(5) is line
    long = LineChart("t", "s", "x", "y", (Line("a", tuple(map(float, range(1000))), (1.0,) * 1000),))
    assert len(rows(vega_lite(long))) == MOST_POINTS


def test_the_table_of_lines_has_a_row_for_each_x():
    chart = LineChart(
        "t", "s", "step", "y", (Line("a", (1.0, 2.0), (5.0, math.nan)), Line("a", (2.0,), (7.5,), "seed 1"))
    )
    assert chart.headings() == ("step", "a", "a, seed 1")
    assert chart.cells() == [("1", "5", "–"), ("2", "–", "7.5")]
    assert {"label": "a", "name": "a", "x": 2.0, "y": None} in rows(vega_lite(chart))


def test_points_without_an_interval_have_no_bar():
    chart = ScatterChart("t", "s", "x", "y", (Point("a", 1.0, 2.0), Point("b", 2.0, 3.0, 2.5, 3.5)), log_x=True)
    assert chart.cells() == [("a", "1", "2", "–"), ("b", "2", "3", "2.5 to 3.5")]
    spec = vega_lite(chart)
    assert spec["layer"][0]["transform"] == [{"filter": "isValid(datum.low)"}]
    assert spec["layer"][1]["encoding"]["x"]["scale"]["type"] == "log"
    assert spec["description"] == "t. s"


def test_models_of_equal_cost_stand_at_the_same_x_and_both_are_seen():
    chart = ScatterChart("t", "s", "x", "y", (Point("a", 2.0, 3.0, 2.5, 3.5), Point("b", 2.0, 3.0, 2.5, 3.5)))
    spec = vega_lite(chart)
    bars, points = (layer["mark"] for layer in spec["layer"])
    assert not {"xOffset", "x2Offset"} & (bars.keys() | points.keys() | spec["layer"][0]["encoding"].keys())
    assert [(own["x"], own["bar"], own["size"]) for own in rows(spec)] == [(2.0, 6, 110), (2.0, 4, 70)]
    assert (bars["strokeWidth"], points["size"]) == ({"expr": "datum.bar"}, {"expr": "datum.size"})


def test_a_map_names_its_largest_share_and_leaves_gaps():
    values = np.array([[0.25, 0.75], [math.nan, 0.5]])
    chart = HeatmapChart.of(values, ("cat", "dog"), title="Which", row_title="class")
    assert chart.summary == "share, % by class (2) and expert (2); the largest is 75 %, class cat and expert 1."
    assert chart.cells() == [("cat", "25.0", "75.0"), ("dog", "–", "50.0")]
    assert len({(r["row"], r["column"]) for r in rows(vega_lite(chart))}) == 3


def test_loads_are_shares_beside_the_even_one():
    (chart,) = load_charts({"block 1": np.array([10, 30, 0, 40])}, {"block 1": 0.05})
    assert chart.series == {"block 1": (12.5, 37.5, 0.0, 50.0)}
    assert chart.line == 25
    assert chart.summary == ("Expert 3 has most, 50.0 %, 2.00 times the even 25 %; 5 % of the pairs were dropped.")
    assert len(vega_lite(chart)["layer"]) == 2


@pytest.mark.parametrize(
    "names, angle, overlap", [(("0", "1"), 0, True), (("a long name of a class",) * 3, -45, False)]
)
def test_long_names_of_bars_are_slanted_and_all_there(names, angle, overlap):
    names = tuple(f"{name}{i}" for i, name in enumerate(names))
    chart = BarChart("t", "s", "class", "y", names, {"a": (1.0,) * len(names)})
    axis = vega_lite(chart)["layer"][0]["encoding"]["x"]["axis"]
    assert (axis["labelAngle"], axis["labelOverlap"]) == (angle, overlap)


def test_rows_are_thinned_from_the_first_to_the_last():
    assert thinned_rows([(str(i),) for i in range(9)], 5) == [("0",), ("2",), ("4",), ("6",), ("8",)]
    assert thinned_rows([("0",)], 5) == [("0",)]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Line("a", (1.0,), ()), "line 'a' has 1 x for 0 y"),
        (lambda: BarChart("t", "s", "x", "y", ("0",), {"a": (1.0, 2.0)}), "bars 'a': 2 values for 1 names"),
        (lambda: HeatmapChart("t", "s", "r", "c", ("a",), ("0", "1"), ((1.0,),)), "heat map 't': 1 rows of values"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_many_points_have_a_colour_or_a_shape_of_their_own():
    points = tuple(Point(f"m{i}", float(i), 1.0) for i in range(20))
    encoding = vega_lite(ScatterChart("t", "s", "x", "y", points))["layer"][1]["encoding"]
    looks = zip(encoding["color"]["scale"]["range"], encoding["shape"]["scale"]["range"], strict=True)
    assert len(set(looks)) == 20


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


def test_colors_may_end_below_the_largest_share():
    chart = HeatmapChart("t", "s", "r", "c", ("tag", "word"), ("0", "1"), ((100, 0), (40, 60)), top=60)
    assert chart.shown_top == 60
    assert HeatmapChart("t", "s", "r", "c", ("a",), ("0",), ((40,),)).shown_top == 40


def test_charts_without_room_beside_each_other_go_below():
    maps = [heatmap(f"encoder {i}", ("de",), [[1 / 16] * 16]) for i in range(3)]  # 480 of 1,300 pixels each
    assert [len(line["hconcat"]) for line in still(maps, "title")["vconcat"]] == [2, 1]


def test_rows_of_one_name_are_rows_of_their_own():
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
