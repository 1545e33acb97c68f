"""A word or a list of numbers names blocks, and each block has its FFN."""

import pytest
import torch

import core
from apps.nets.blocks import feed, ffn_configs, ffns_of, moe_configs, one_ffn, resolve_blocks
from apps.nets.packing import Packing


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


def test_each_block_has_the_dense_ffn_or_the_layer_that_is_listed_for_it():
    dense, moe = core.DenseFFN(8), core.MoEConfig(4)
    assert ffn_configs(dense, 3, moe, (1,)) == [dense, moe, dense]
    assert ffn_configs(dense, 2, core.DenseFFN(16), (0, 1)) == [core.DenseFFN(16)] * 2
    assert ffn_configs(dense, 2, None, (0, 1)) == [dense] * 2
    dense = core.DenseFFN()
    assert ffn_configs(dense, 4, [FEW, MANY], (1, 3)) == [dense, FEW, dense, MANY]
    # Of two stacks the first one's blocks come first.
    assert ffns_of([FEW, FEW, MANY], (0, 1), (1,)) == [[FEW, FEW], [MANY]]
    assert ffns_of(MANY, (0, 1), (1,)) == [[MANY, MANY], [MANY]]
    assert ffns_of(None, (), ()) == [[], []]
    assert (moe_configs(None), moe_configs(FEW), moe_configs([FEW, MANY])) == ((), (FEW,), (FEW, MANY))
    assert (one_ffn(None, None), one_ffn(None, dense), one_ffn([FEW, MANY], None)) == (None, dense, [FEW, MANY])


def test_an_moe_layer_gets_packed_tokens_by_sequence():
    # Items 5 and 6 of the first row, 5 of the second: hash routing goes by the ids of the padded layout.
    torch.manual_seed(0)
    layer = core.MoEConfig(4, core.Hash(8), core.FFN(8)).build(4)
    ids_BL = torch.tensor([[5, 6], [5, 0]])
    packing, index_T = Packing.of(ids_BL > 0)
    x_TD, context = torch.randn(3, 4), core.RoutingContext(ids_BL > 0, ids_BL)
    with torch.no_grad():
        padded = layer(packing.pad(x_TD), context)
        assert torch.equal(feed(layer, x_TD, context, packing), padded.flatten(0, 1)[index_T])
        dense = core.DenseFFN(8).build(4)
        assert torch.equal(feed(dense, x_TD, context, packing), dense(x_TD))


FEW, MANY = core.MoEConfig(2), core.MoEConfig(8)


DENSE_ALONE = r"dense_ffn=DenseFFN\(hidden_dim=8, .* is for a dense model: with moe, set moe\.expert$"


@pytest.mark.parametrize(
    ("build", "args", "message"),
    [
        (ffn_configs, (core.DenseFFN(), 4, [FEW, MANY], (1, 2, 3)), r"moe lists 2 layers for 3 .*, \[1, 2, 3\]: it"),
        (ffns_of, ([FEW], (1,), (0, 1)), r"moe lists 1 layers for 3 .*, \[1\] and \[0, 1\]: it needs one each$"),
        (one_ffn, ([], None), r"^moe=\[\] is neither one MoEConfig nor a list of one for each sparse block$"),
        (one_ffn, ([FEW, 3], None), r"^moe=\[.*, 3\] is neither one MoEConfig nor a list"),
        (one_ffn, ([FEW], core.DenseFFN(8)), DENSE_ALONE),
        (one_ffn, (FEW, core.DenseFFN(8)), DENSE_ALONE),
    ],
)
def test_a_list_of_another_length_or_of_other_things_is_one_line(build, args, message):
    with pytest.raises(ValueError, match=message):
        build(*args)
