"""What is drawn from which array."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from apps.nlp.translation import pictures
from apps.nlp.translation.pictures import (
    Curve,
    ExpertMap,
    Routes,
    attention_map,
    drawn,
    expert_maps,
    learning_curves,
    sentence_routes,
)
from apps.report.plots import PALETTE, save_picture

NAN = float("nan")


def texts(axis):
    return [t.get_text() for t in axis.texts]


def shown(fig):
    return [axis for axis in fig.axes if axis.get_visible()]


# ---- maps


def test_a_map_has_a_row_a_name_and_a_column_an_expert():
    fig = expert_maps(
        [[ExpertMap("encoder 1", ("de", "fr"), np.array([[0.75, 0.25], [NAN, NAN]]))]], "title", "share, %"
    )
    axis, bar = shown(fig)
    assert axis.images[0].get_array().tolist()[0] == [75, 25]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["de", "fr"]
    assert texts(axis) == ["75", "25"]  # nothing of the French there is none of
    assert (axis.get_title(), axis.get_xlabel(), bar.get_ylabel()) == ("encoder 1", "expert", "share, %")
    assert axis.images[0].get_clim() == (0, 75)


def test_a_band_has_its_own_rows_and_all_have_one_scale():
    values = np.array([[0.5, 0.5], [0.2, 0.8]])
    encoder = [ExpertMap(f"encoder {i}", ("de", "fr"), values) for i in (1, 3)]
    decoder = [ExpertMap("decoder 1", ("en",), np.array([[0.4, 0.6]]))]
    *axes, _ = shown(expert_maps([encoder, [], decoder], "title", "share"))
    assert [a.get_title() for a in axes] == ["encoder 1", "encoder 3", "decoder 1"]
    assert [[t.get_text() for t in a.get_yticklabels()] for a in axes] == [["de", "fr"], ["", ""], ["en"]]
    assert {a.images[0].get_clim() for a in axes} == {(0, 80)}


def test_maps_without_room_beside_each_other_go_below():
    maps = [ExpertMap(f"encoder {i}", ("de",), np.full((1, 16), 1 / 16)) for i in range(3)]  # 6 inches each
    *axes, _ = shown(expert_maps([maps], "title", "share"))
    places = [a.get_subplotspec().get_topmost_subplotspec() for a in axes]
    assert [(p.rowspan.start, p.colspan.start) for p in places] == [(0, 0), (0, 1), (1, 0)]
    assert [a.get_yticklabels()[0].get_text() for a in axes] == ["de", "", "de"]


def test_colours_may_end_below_the_largest_share():
    one = [ExpertMap("encoder 1", ("tag", "word"), np.array([[1.0, 0.0], [0.4, 0.6]]))]
    axis, bar = shown(expert_maps([one], "title", "share", top=0.6))
    assert axis.images[0].get_clim() == (0, 60)
    assert texts(axis) == ["100", "0", "40", "60"]


def test_numbers_are_left_out_where_there_is_no_room():
    axis, _ = shown(expert_maps([[ExpertMap("encoder 1", ("de",), np.full((1, 64), 1 / 64))]], "title", "share"))
    assert texts(axis) == []
    assert [int(x) for x in axis.get_xticks()] == list(range(0, 64, 4))


@pytest.mark.parametrize(
    "title", ["en-de", "eng_Latn-deu_Latn, sentence 2047: experts of each subword, by falling gate"]
)
def test_a_title_stands_within_the_picture(title):
    route = Routes("encoder layer", ("a", "b"), {"encoder 1": np.array([[0, 1], [1, 0]])})
    for fig in (sentence_routes([route], 2, title), attention_map(np.ones((1, 1)), ["a"], ["b"], title)):
        fig.draw_without_rendering()
        box = fig._suptitle.get_window_extent()
        assert 0 < box.x0 < box.x1 < fig.bbox.width


# ---- one sentence


def test_a_subword_has_the_colour_of_its_first_expert_and_the_numbers_of_all():
    ids = np.array([[1, 0], [3, 3], [2, 3]])  # of 3 experts: none computed the second subword, one the third
    source = Routes("encoder layer", ("▁a", "▁dog", "s"), {"encoder 1": ids})
    target = Routes("decoder layer", ("<s>",), {"decoder 1": np.array([[0]]), "decoder 3": np.array([[1]])})
    left, right = sentence_routes([source, target], 3, "en-de").axes
    assert texts(left) == ["1 0", "\N{MULTIPLICATION SIGN}", "2"]
    image = left.images[0].get_array()
    assert [tuple(c) for c in image[:, 0]] == [to_rgb(PALETTE[1]), (1, 1, 1), to_rgb(PALETTE[2])]
    assert [t.get_text() for t in left.get_yticklabels()] == ["▁a", "▁dog", "s"]
    assert [t.get_text() for t in right.get_xticklabels()] == ["1", "3"]
    assert left.get_ylim() == right.get_ylim() == (2.5, -0.5)  # rows of one height


def test_a_side_without_experts_is_left_out():
    sides = [Routes("encoder layer", ("a",), {}), Routes("decoder layer", ("b",), {"decoder 1": np.array([[0]])})]
    (axis,) = sentence_routes(sides, 2, "en-de").axes
    assert axis.get_xlabel() == "decoder layer"


def test_attention_has_a_row_a_token_said_and_a_column_a_source_token():
    weights = np.array([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    axis, bar = attention_map(weights, ["▁a", "▁dog", "</s>"], ["▁Hund", "</s>"], "en-de").axes
    np.testing.assert_allclose(axis.images[0].get_array(), 100 * weights)
    assert [t.get_text() for t in axis.get_xticklabels()] == ["▁a", "▁dog", "</s>"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["▁Hund", "</s>"]
    assert bar.get_ylabel() == "attention, %"


@pytest.fixture
def further(monkeypatch):
    """Sets the families that are asked for letters which DejaVu Sans lacks."""
    cached = (pictures._families, pictures._characters, pictures._tell_of_boxes)

    def use(*families):
        monkeypatch.setattr(pictures, "_FURTHER", families)
        for function in cached:
            function.cache_clear()

    use()
    yield use
    for function in cached:
        function.cache_clear()


def test_letters_of_other_scripts_are_drawn_and_a_box_for_those_the_font_lacks(further, caplog):
    assert drawn("▁Žluťoučký") == "▁Žluťoučký"
    assert drawn("▁червоному") == "▁червоному"
    assert not caplog.text
    assert drawn("▁漢a字") == drawn("▁字a漢") == "▁\N{WHITE SQUARE}a\N{WHITE SQUARE}"
    assert [r.getMessage() for r in caplog.records] == [
        "pictures have boxes for characters that no font here has: install one, such as Noto Sans CJK"
    ]


@pytest.mark.filterwarnings("error")
def test_letters_of_another_installed_font_are_drawn_in_it(further, tmp_path):
    hooked = "\N{LATIN SMALL LETTER D WITH PALATAL HOOK}"
    assert drawn(f"{hooked}a") == "\N{WHITE SQUARE}a"
    further("No such font", "STIXG")  # of those that matplotlib brings along
    assert drawn(f"{hooked}a漢") == f"{hooked}a\N{WHITE SQUARE}"
    fig = attention_map(np.ones((1, 1)), [hooked], ["a"], hooked)
    (label,) = shown(fig)[0].get_xticklabels()
    assert label.get_fontfamily() == ["DejaVu Sans", "STIXGeneral"]
    save_picture(fig, tmp_path / "a.png", flat=True)


@pytest.mark.filterwarnings("error")
def test_dollars_and_unknown_letters_are_no_trouble_in_a_file(tmp_path):
    pieces = ["▁$", "5", "▁$", "漢", "▁_{", "\\frac"]
    ids = np.zeros((6, 1), int)
    for number, fig in enumerate(
        (
            attention_map(np.full((6, 6), 1 / 6), pieces, pieces, "$ and $"),
            sentence_routes([Routes("encoder layer", tuple(pieces), {"encoder 0": ids})], 2, "$ and $"),
        )
    ):
        assert save_picture(fig, tmp_path / f"{number}.png", flat=True).stat().st_size < 300_000


# ---- curves


def test_curves_are_drawn_by_panel_and_the_best_score_is_marked():
    steps = np.array([10, 20, 30])
    bleu, loss = Curve("BLEU", steps, np.array([5.0, 9.25, 8.0])), Curve("train", steps, np.array([3.0, 2.0, 1.0]))
    left, right = learning_curves({"loss": [loss], "none": [], "score": [bleu]}, "title", best="BLEU").axes
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


# ---- refused


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: ExpertMap("encoder 1", ("de",), np.zeros((2, 3))), r"map of 'encoder 1': values \(2, 3\) for 1 rows"),
        (lambda: expert_maps([[]], "", ""), "needs at least one map"),
        (
            lambda: expert_maps([[ExpertMap(f"encoder {n}", (n,), np.zeros((1, 2))) for n in "ab"]], "", ""),
            "maps of 'encoder a' and its neighbours have different rows",
        ),
        (
            lambda: Routes("encoder layer", ("a",), {"encoder 1": np.zeros((2, 1), int)}),
            r"experts of 'encoder 1' have shape \(2, 1\), not \(1 subwords, K\)",
        ),
        (lambda: sentence_routes([Routes("encoder layer", ("a",), {})], 2, ""), "needs at least one layer"),
        (
            lambda: attention_map(np.zeros((1, 2)), ["a"], ["b"], ""),
            r"weights have shape \(1, 2\), not \(1 target, 1 source\)",
        ),
        (lambda: learning_curves({"loss": []}, ""), "needs at least one curve"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
