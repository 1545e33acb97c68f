"""What stands in a field, and the one line on what a model cannot take."""

from __future__ import annotations

import re

import pytest

from apps.report.exhibit import ChoiceField, ImageField, ItemsField, NumberField, TextField

ITEMS = ItemsField("History", ("Alien", "Brazil"), ("7", "9"), most=2)


@pytest.mark.parametrize(
    "field, raw, value",
    [
        (ImageField("Image"), "a.png", "a.png"),
        (TextField("Text"), "  two\n lines ", "two lines"),
        (TextField("Text", may_be_empty=True), None, ""),
        (TextField("Texts", by_line=True), "  two\n\n more   lines ", "two\nmore lines"),
        (ImageField("Image", may_be_empty=True), None, None),
        (NumberField("age"), " 1.5 ", 1.5),
        (NumberField("age", may_be_empty=True), "", None),
        (NumberField("count", whole=True, least=1, most=3), "3", 3),
        (ChoiceField("city", ("Rome", "Oslo")), "Oslo", "Oslo"),
        (ChoiceField("city", ("Rome",), may_be_empty=True), " ", None),
        (ITEMS, ["Brazil", "Alien"], ["9", "7"]),
        (ITEMS, "Alien\n\n9\n", ["7", "9"]),  # typed, by name or by value
    ],
)
def test_a_field_takes(field, raw, value):
    read = field.read(raw)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "field, raw, line",
    [
        (ImageField("Image"), None, "Image: there is none yet; drop one here, or take an example"),
        (TextField("Text"), " \n", "Text is empty: type something first"),
        (TextField("Text", longest=3), "four", "Text has 4 characters: at most 3 are read"),
        (NumberField("age"), "old", "age='old' is not a number"),
        (NumberField("age"), "", "age='' is not a number"),
        (NumberField("age"), "nan", "age=nan is not a finite number"),
        (NumberField("count", whole=True), "1.5", "count='1.5' is not an integer"),
        (NumberField("count", least=1), "0", "count=0 must be at least 1"),
        (NumberField("count", most=3), "4", "count=4 must be at most 3"),
        (
            ChoiceField("city", ("Rome", "Oslo")),
            "Rom",
            "none of the 2 values that the model knows; did you mean 'Rome'?",
        ),
        (ChoiceField("city", ("Rome",)), "", "city='' is none of the 1 values that the model knows"),
        (ITEMS, [], "History is empty: choose an item first"),
        (ITEMS, ["Alien"] * 3, "History has 3 items: at most 2 are read"),
        (ITEMS, ["Dune"], "History: 'Dune' is none of the 2 items that the model knows"),
    ],
)
def test_a_field_refuses(field, raw, line):
    with pytest.raises(ValueError, match=re.escape(line) + "$"):
        field.read(raw)
