"""Answers and experts as HTML: texts are escaped, numbers stand beside colours, and colours can be read."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from apps.demonstrate.drawing import draw_parts, problem
from apps.report.exhibit import Bars, Gates, Images, Patches, Pieces, Said
from apps.report.page import Table, Text

EVIL = "<script>alert('1')</script>"


class Checked(HTMLParser):
    """Reads HTML, and fails where a tag is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass  # <rect/> is closed at once

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize(
    "part",
    [
        Bars(EVIL, ((EVIL, 0.25),)),
        Said(EVIL, EVIL, EVIL),
        Images(EVIL, ((EVIL, np.zeros((2, 2, 3), np.uint8)),)),
        Text.of(EVIL),
        Table(EVIL, (EVIL, EVIL), ((EVIL, EVIL),)),
        Pieces(EVIL, ((EVIL,),), np.array([[0, 1]]), (EVIL, EVIL)),
        Patches(np.zeros((2, 2), np.uint8), np.zeros((1, 1, 1), int), (EVIL,)),
        Gates(EVIL, (EVIL,), (EVIL,), np.array([[1.0]])),
    ],
    ids=lambda part: type(part).__name__,
)
def test_every_part_is_whole_and_runs_nothing(part):
    html = draw_parts([part])
    assert "<script" not in html
    assert EVIL in "".join(Checked(html).texts)


def test_words_have_their_experts_and_a_count():
    # 4 pieces of 2 words; the third is computed by expert 1 alone, the fourth by none of the 3.
    words = Pieces("A text", (("ab", "c"), ("d", "e")), np.array([[0, 1], [1, 0], [1, 3], [3, 3]]), ("0", "1", "2"))
    html = draw_parts([words])
    pieces = re.findall(r'title="([^"]*)"[^>]*>([^<]*)<small>([^<]*)</small>', html)
    none = ("no expert", "e", "\N{MULTIPLICATION SIGN}")
    assert pieces == [("expert 0, 1", "ab", "0 1"), ("expert 1, 0", "c", "1 0"), ("expert 1", "d", "1"), none]
    assert html.count('class="word"') == 2
    legend = [text.strip() for text in Checked(html[html.index('class="legend"') - 4 :]).texts if text.strip()]
    assert legend == ["1", "3", "0", "2", "\N{MULTIPLICATION SIGN} no expert: 1", "1 of the 3 experts took none."]


def test_patches_carry_the_image_and_say_their_experts_row_by_row():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    experts = np.array([[[0, 1], [1, 2]], [[1, 0], [2, 2]]])  # of 2 experts: the last patch has none
    html = draw_parts([Patches(image, experts, ("0", "1"))])
    encoded = re.search(r'href="data:image/png;base64,([^"]*)"', html)[1]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), image)
    cross = "\N{MULTIPLICATION SIGN}"
    assert f"row by row: 0 and 1 1; 1 and 0 {cross}" in html
    cells = re.findall(r'<rect x="(\d+)" y="(\d+)" width="40" height="40" fill="([^"]*)"/><text[^>]*>([^<]*)<', html)
    places = [(x, y, text) for x, y, _, text in cells]
    assert places == [("0", "0", "0 1"), ("40", "0", "1"), ("0", "40", "1 0"), ("40", "40", cross)]
    assert [fill == "none" for *_, fill, _ in cells] == [False, False, False, True]


def test_gates_show_the_heaviest_experts_and_count_the_others():
    # 20 experts: the first 16 of 5.5 %, 3 of 3 % and one of 3 %; a gate that does not reach expert 0.
    weights = np.array([[0.055] * 16 + [0.03] * 4, [np.nan] + [0.05] * 19])
    html = draw_parts([Gates("Gates", ("a", "b"), tuple(map(str, range(20))), weights)])
    assert html.count("<td>") == 32
    assert "expert 16" not in html.replace("expert 15", "")
    assert "4 further experts have at most 5.0 % of a gate's weight." in html
    assert html.count("\N{EN DASH}") == 1


@pytest.mark.parametrize("count", [8, 16, 300])
def test_an_experts_number_can_be_read_on_its_colour(count):
    ids = np.arange(count)[:, None]
    html = draw_parts([Pieces("", tuple((str(i),) for i in range(count)), ids, tuple(map(str, range(count))))])
    styles = set(re.findall(r"background:#(\w{6});color:#(000|fff)", html))
    assert len({background for background, _ in styles}) >= min(count, 200)  # few of very many are equal

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for background, color in styles:
        light, dark = sorted((luminance(background), 1.0 if color == "fff" else 0.0), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, background  # WCAG 2.1, level AA


def test_a_bar_is_as_long_as_its_share_and_a_problem_is_read_aloud_and_escaped():
    assert problem("a < b") == '<p class="problem" role="alert">a &lt; b</p>'
    html = draw_parts([Bars("Classes", (("cat", 0.75), ("dog", 0.005)))])
    assert re.findall(r"width:([\d.]+)%", html) == ["75.00", "0.50"]
    texts = [text for text in Checked(html).texts if text.strip()]
    assert texts == ["Classes", "cat", "75.0 %", "dog", "0.5 %"]
