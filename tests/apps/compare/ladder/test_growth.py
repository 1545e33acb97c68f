"""The section ``ladder`` of a configuration, by hand-computed values."""

from __future__ import annotations

import pytest

from apps.cli.errors import UsageError
from apps.compare.ladder.growth import Growth, Rule, flags

PLAIN = {
    "model": {"class_path": "M", "init_args": {"vit": {"embed_dim": 128, "depth": 6}, "dims": [64, 16], "drop": 0.1}}
}


@pytest.mark.parametrize(
    ("given", "base", "rung", "expected"),
    [
        ("linear", 8, 3.0, 24),
        ("square_root", 8, 4.0, 16),
        ("cube_root", 64, 8.0, 128),
        ({"power": "fourth_root", "multiple": 32}, 128, 16.0, 256),
        ({"power": "cube_root", "multiple": 32}, 128, 2.0, 160),  # 161.3
        ({"power": "linear", "multiple": 32}, 128, 0.01, 32),  # no less than the multiple
        (-0.5, 0.1, 100.0, 0.01),
        (0.5, [64, 16], 4.0, [128, 32]),
        ([1, 1.5], 64, 10.0, 96),
    ],
)
def test_an_option_grows_by_its_rule(given, base, rung, expected):
    assert Rule.of("x", given).value(base, rung, 1) == expected


def test_options_and_the_learning_rate_of_a_rung():
    section = {"model.vit.embed_dim": "square_root", "model.dims": [1, 2], "learning_rate": -0.5}
    growth = Growth.of(section, (1.0, 4.0), "x.yaml")
    values = growth.options(PLAIN, 4.0, 1)
    assert values == {"model.vit.embed_dim": 256, "model.dims": [128, 32]}
    assert flags(values) == ["--model.vit.embed_dim", "256", "--model.dims", "[128, 32]"]
    assert growth.rate(0.01, 4.0, 1) == 0.005
    assert growth.rate(None, 4.0, 1) is None
    assert Growth.of({"model.dims": 1}, (1.0,), "x").rate(0.01, 4.0, 0) == 0.01


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, "x.yaml has no section ladder"),
        ({"model.vit.embed_dim": "sixth_root"}, "is no rule"),
        ({"model.vit.embed_dim": {"power": 1, "multiple": 0}}, "is no rule"),
        ({"model.vit.embed_dim": {"powr": 1}}, "is no rule"),
        ({"model.vit.embed_dim": [1, 0]}, "is no rule"),
        ({"model.vit.embed_dim": [1, 2, 3]}, "has 3 multiples for 2 rungs"),
        ({"trainer.max_steps": 1}, "follow from its budget"),
        ({"model.vit.width": 1}, "has no number there (null)"),
        ({"model.vit": 1}, "has no number there"),
    ],
)
def test_a_section_that_says_nothing_is_one_line(section, message):
    with pytest.raises(UsageError) as raised:
        Growth.of(section, (1.0, 2.0), "x.yaml").options(PLAIN, 2.0, 1)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
