"""Patterns of module names: a star is one name without dots."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from torch import nn

from core.convert.read.names import matches, matching_names


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("blocks.*.mlp", ["blocks.0.mlp", "blocks.11.mlp"]),
        ("*", ["mlp", "blocks"]),
        ("blocks.[0-9].mlp", ["blocks.0.mlp"]),
        ("*.*.mlp", ["blocks.0.mlp", "blocks.11.mlp"]),
        ("", [""]),
        ("mlp", ["mlp"]),
    ],
)
def test_a_star_is_one_name(pattern, named):
    names = ["", "mlp", "blocks", "blocks.0.mlp", "blocks.11.mlp", "blocks.0.attn.mlp", "teacher.blocks.0.mlp"]
    assert [name for name in names if matches(name, pattern)] == named


def test_names_come_in_the_model_s_order_and_once_for_each_place():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"b": nn.ModuleList([shared, nn.ReLU()]), "a": nn.ModuleList([shared])})
    assert matching_names(model, ["a.*", "b.0"], [], "linear layers") == ["b.0", "a.0"]
    assert matching_names(model, "*0", [], "linear layers", fnmatchcase) == ["b.0", "a.0"]


def test_a_pattern_that_names_none_is_refused_with_what_there_is():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    with pytest.raises(ValueError, match=r"modules='\*\.mlp' names no module; the model's FFNs are 0, 1, 2, 3, \.\.\."):
        matching_names(model, ["0", "*.mlp"], list("01234"), "FFNs")
    with pytest.raises(ValueError, match=r"modules='x' names no module; the model's FFNs are none"):
        matching_names(model, "x", [], "FFNs")
    for bad in ([], [3]):
        with pytest.raises(ValueError, match=r"modules=\[3?\] is neither a pattern of module names nor a list"):
            matching_names(model, bad, [], "FFNs")
