"""Heat maps: what is drawn from which array, and which rows of counts have a place."""

from __future__ import annotations

import numpy as np
import pytest

from apps.report.heatmaps import Heatmap, heatmaps, maps_by_label, numbers, row_names, shares

NAN = float("nan")


def texts(axis):
    return [t.get_text() for t in axis.texts]


def names(ticks):
    return [t.get_text() for t in ticks]


def shown(fig):
    return [axis for axis in fig.axes if axis.get_visible()]


def test_a_map_has_a_row_a_name_and_a_column_an_expert():
    one = Heatmap("encoder 1", ("de", "fr"), numbers(2), np.array([[0.75, 0.25], [NAN, NAN]]))
    axis, bar = shown(heatmaps([[one]], "title", "share, %"))
    assert axis.images[0].get_array().tolist()[0] == [75, 25]
    assert names(axis.get_yticklabels()) == ["de", "fr"]
    assert names(axis.get_xticklabels()) == ["0", "1"]
    assert texts(axis) == ["75", "25"]  # nothing of the French there is none of
    assert (axis.get_title(), axis.get_xlabel(), bar.get_ylabel()) == ("encoder 1", "expert", "share, %")
    assert axis.images[0].get_clim() == (0, 75)


def test_columns_with_names_need_no_word_below():
    axis = heatmaps([[Heatmap("", ("a",), ("shared 0", "own"), np.ones((1, 2)))]], "title", "share").axes[0]
    assert (names(axis.get_xticklabels()), axis.get_xlabel()) == (["shared 0", "own"], "")


def test_a_band_has_its_own_rows_and_all_have_one_scale():
    values = np.array([[0.5, 0.5], [0.2, 0.8]])
    encoder = [Heatmap(f"encoder {i}", ("de", "fr"), numbers(2), values) for i in (1, 3)]
    decoder = [Heatmap("decoder 1", ("en",), numbers(2), np.array([[0.4, 0.6]]))]
    *axes, _ = shown(heatmaps([encoder, [], decoder], "title", "share"))
    assert [a.get_title() for a in axes] == ["encoder 1", "encoder 3", "decoder 1"]
    assert [names(a.get_yticklabels()) for a in axes] == [["de", "fr"], ["", ""], ["en"]]
    assert {a.images[0].get_clim() for a in axes} == {(0, 80)}


def test_maps_without_room_beside_each_other_go_below():
    # 6.4 inches each.
    maps = [Heatmap(f"encoder {i}", ("de",), numbers(16), np.full((1, 16), 1 / 16)) for i in range(3)]
    *axes, _ = shown(heatmaps([maps], "title", "share"))
    places = [a.get_subplotspec().get_topmost_subplotspec() for a in axes]
    assert [(p.rowspan.start, p.colspan.start) for p in places] == [(0, 0), (1, 0), (2, 0)]
    assert [names(a.get_yticklabels()) for a in axes] == [["de"]] * 3


def test_colours_may_end_below_the_largest_share():
    one = [Heatmap("encoder 1", ("tag", "word"), numbers(2), np.array([[1.0, 0.0], [0.4, 0.6]]))]
    axis, _ = shown(heatmaps([one], "title", "share", top=0.6))
    assert axis.images[0].get_clim() == (0, 60)
    assert texts(axis) == ["100", "0", "40", "60"]


def test_numbers_are_left_out_where_there_is_no_room():
    axis, _ = shown(heatmaps([[Heatmap("", ("de",), numbers(64), np.full((1, 64), 1 / 64))]], "title", "share"))
    assert texts(axis) == []
    assert [int(x) for x in axis.get_xticks()] == list(range(0, 64, 4))


@pytest.mark.parametrize("title", ["t", "Which expert takes the tokens of a class (its share of all) in every layer"])
def test_names_and_title_stand_within_the_picture(title):
    fig = heatmaps([[Heatmap("", ("a rather long name of a row",), ("shared 0", "own"), np.ones((1, 2)))]], title, "s")
    fig.draw_without_rendering()
    for text in (fig._suptitle, *fig.axes[0].get_yticklabels(), *fig.axes[0].get_xticklabels()):
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= fig.bbox.width
        assert 0 <= box.y0 < box.y1 <= fig.bbox.height


def test_counts_become_shares_of_their_row():
    np.testing.assert_array_equal(shares(np.array([[1, 3], [0, 0]])), [[0.25, 0.75], [NAN, NAN]])


def test_a_row_says_its_share():
    assert row_names(("a", "b"), (0.996, 0.004)) == ("a (100 %)", "b (<1 %)", "all")


def test_maps_have_a_row_for_each_label_with_a_token_and_one_for_all():
    # Of 8 tokens 4 are cats, none a dog, 4 owls.
    (one,), too_many = maps_by_label({"block 1": np.array([[3, 1], [0, 0], [0, 4]])}, ("cat", "dog", "owl"))
    assert not too_many
    assert (one.title, one.rows, one.columns) == ("block 1", ("cat (50 %)", "owl (50 %)", "all"), ("0", "1"))
    assert one.values.tolist() == [[0.75, 0.25], [0, 1], [3 / 8, 5 / 8]]


def test_of_many_labels_the_most_specialised_are_kept():
    counts = np.full((50, 2), 5)
    counts[[7, 30]] = [[10, 0], [0, 10]]
    (one,), too_many = maps_by_label({"block 1": counts}, [f"class {i}" for i in range(50)], most_rows=2)
    assert too_many
    assert one.rows == ("class 7 (2 %)", "class 30 (2 %)", "all")
    assert one.values[-1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: Heatmap("m", ("a", "b"), ("x",), np.zeros((1, 1))), r"values \(1, 1\) for 2 rows and 1 columns"),
        (
            lambda: heatmaps([[Heatmap(f"encoder {n}", (n,), ("0",), np.zeros((1, 1))) for n in "ab"]], "", ""),
            "heat map 'encoder a' and its neighbours have different rows",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
