"""Each picture draws its arrays."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from apps.nlp.translation import pictures
from apps.nlp.translation.pictures import Routes, attention_map, drawn, sentence_routes
from apps.report.plots import PALETTE, save_picture


def texts(axis):
    return [t.get_text() for t in axis.texts]


def shown(fig):
    return [axis for axis in fig.axes if axis.get_visible()]


@pytest.mark.parametrize(
    "title", ["en-de", "eng_Latn-deu_Latn, sentence 2047: experts of each subword, by falling gate"]
)
def test_a_title_stands_within_the_picture(title):
    route = Routes("encoder layer", ("a", "b"), {"encoder 1": np.array([[0, 1], [1, 0]])})
    for fig in (sentence_routes([route], 2, title), attention_map(np.ones((1, 1)), ["a"], ["b"], title)):
        fig.draw_without_rendering()
        box = fig._suptitle.get_window_extent()
        assert 0 < box.x0 < box.x1 < fig.bbox.width


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
    save_picture(fig, tmp_path / "a.png")


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
        assert save_picture(fig, tmp_path / f"{number}.png").stat().st_size < 300_000


# ---- refused


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda: Routes("encoder layer", ("a",), {"encoder 1": np.zeros((2, 1), int)}),
            r"experts of 'encoder 1' have shape \(2, 1\), not \(1 subwords, K\)",
        ),
        (lambda: sentence_routes([Routes("encoder layer", ("a",), {})], 2, ""), "needs at least one layer"),
        (
            lambda: attention_map(np.zeros((1, 2)), ["a"], ["b"], ""),
            r"weights have shape \(1, 2\), not \(1 target, 1 source\)",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
