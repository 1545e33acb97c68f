"""Which blocks a word or a list of numbers names."""

import pytest

from apps.nets.blocks import resolve_blocks


@pytest.mark.parametrize(
    ("blocks", "depth", "expected"),
    [
        ("every2", 6, (1, 3, 5)),  # V-MoE: every second block, the first of them block 1
        ("last2", 6, (3, 5)),  # the last two of those
        ("last2", 12, (9, 11)),
        ("last1", 5, (3,)),  # an odd depth: block 4 is not one of every2
        ("every1", 3, (0, 1, 2)),
        ("every3", 8, (2, 5)),
        ("all", 3, (0, 1, 2)),
        ([-1, 0], 4, (0, 3)),
        ([2, 0], 3, (0, 2)),
    ],
)
def test_blocks(blocks, depth, expected):
    assert resolve_blocks(blocks, depth) == expected
    assert resolve_blocks(blocks, depth, optional=True) == expected


@pytest.mark.parametrize("nothing", ["none", [], ()])
def test_no_block_where_that_is_allowed(nothing):
    assert resolve_blocks(nothing, 4, optional=True) == ()
    with pytest.raises(ValueError, match="moe_blocks="):
        resolve_blocks(nothing, 4)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], r"layers=\[\] names no block"),
        ([4], "layers index 4 is out of range for depth=4"),
        ([-5], "layers index -5 is out of range for depth=4"),
        ([3, -1], r"layers=\[3, -1\] names a block twice"),
        ("last3", "layers='last3' does not fit depth=4: N is at most 2"),
        ("every5", "layers='every5' does not fit depth=4: N is at most 4"),
        ("last0", "layers='last0' is not lastN or everyN"),
        ("first2", "layers='first2' is not lastN or everyN"),
        ("last²", "layers='last²' is not lastN or everyN"),
        ("none", "layers='none' is not lastN or everyN .N at least 1., 'all', nor a list"),
    ],
)
def test_refused_blocks_name_the_value_and_the_rule(blocks, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve_blocks(blocks, 4, option="layers")
    assert "\n" not in str(error.value)
