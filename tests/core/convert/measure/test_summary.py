"""What a summary says: which networks were replaced, parameters, and FLOPs a token and of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import core


def net() -> nn.Sequential:
    def ffn():
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

    return nn.Sequential(ffn(), ffn(), nn.Linear(4, 3))


def test_numbers_by_hand():
    dense = net()
    result = core.summary(core.sparsify(dense, core.MoEConfig(3, core.TokenChoice(2)), "0"), torch.randn(5, 4))
    assert (len(result.replaced), result.recognized) == (1, 2)
    # An FFN has 4 * 6 + 6 + 6 * 4 + 4 = 58 parameters and 2 * (24 + 24) = 96 FLOPs a token; the head 15 and 24.
    assert (result.params_before, result.params_after) == (2 * 58 + 15, 4 * 58 + 3 * 4 + 15)
    assert result.active_params == 3 * 58 + 3 * 4 + 15
    (layer,) = result.replaced
    assert (layer.flops_before, layer.flops_after) == (96, 2 * 96 + 2 * 3 * 4)
    assert (result.flops_before, result.flops_after) == (5 * (96 + 96 + 24), 5 * (216 + 96 + 24))
    assert result.flops_before == core.count_flops(dense, torch.randn(5, 4))
    experts = "3 FFN(hidden_dim=6, activation='relu', bias=True)"
    assert str(result).splitlines() == [
        "1 of 2 feed-forward networks are sparse",
        f"  0: {experts} for a Sequential, start='copy'; FLOPs a token 96 -> 216",
        "parameters 131 -> 259, of which a token touches 201",
        "bytes of the experts 696",  # 3 * 58 numbers of 4 bytes
        "FLOPs of these inputs 1,080 -> 1,680",
    ]


@pytest.mark.parametrize("training", [True, False])
def test_the_whole_of_an_encoder_with_its_attention(training):
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, enable_nested_tensor=False)
    sparse = core.sparsify(dense, core.MoEConfig(3, core.TokenChoice(2)), "layers.0").train(training)
    x = torch.randn(2, 5, 8)
    result = core.summary(sparse, x)
    # In training torch calls no fused block, which counts no FLOPs.
    assert result.flops_before == core.count_flops(dense.train(), x)
    assert result.flops_after - result.flops_before == 10 * (2 * 8 * 3 + 2 * 2 * 8 * 12)
    assert sparse.training is training
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_map_counts_its_positions():
    dense = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    result = core.summary(core.sparsify(dense, core.MoEConfig(3, core.TokenChoice(2)), ""), torch.randn(2, 4, 3, 5))
    assert (result.flops_before, result.flops_after) == (30 * 96, 30 * 216)
    assert str(result).splitlines()[1].startswith("  the model: 3 FFN(")


def test_costs_by_the_sequence_are_said_to_be_such():
    (layer,) = core.summary(core.sparsify(net(), core.MoEConfig(3, core.Merge()), "0")).replaced
    assert layer.flops_after is None


def test_a_model_in_which_nothing_was_replaced_is_refused():
    with pytest.raises(
        ValueError, match=r"no network of the model was made sparse; its feed-forward networks are 0, 1"
    ):
        core.summary(net())
    with pytest.raises(ValueError, match=r"its feed-forward networks are none"):
        core.summary(nn.Linear(3, 3))


def test_a_layer_that_lost_experts_and_one_that_is_dense_again():
    """A token's FFN is 4 D F = 1,024 FLOPs; 2 of 4 experts and the gate's 2 D E are 2,112, of 2 experts 2,080."""
    dense = nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)))
    sparse = core.sparsify(dense, core.MoEConfig(4, core.TokenChoice(2)), "1")
    assert "1: 4 FFN(hidden_dim=32, bias=True) for a Sequential" in str(core.summary(sparse))
    core.prune_experts(sparse, core.expert_statistics(sparse, [torch.randn(2, 6, 8)]), 2)
    (pruned,) = core.summary(sparse).replaced
    assert (pruned.experts, pruned.flops_after) == ("2 FFN(hidden_dim=32, bias=True)", 2080)
    core.densify(sparse)
    after = core.summary(sparse)
    assert str(after).startswith("0 of 1 feed-forward networks are sparse")
    assert (after.replaced[0].flops_after, after.params_after) == (1024, after.params_before)


def test_a_granularity_counts_once():
    """8 experts of 3 hidden units, half the width: 4 of them are 4 * 48 = 192 FLOPs, the gate 2 * 4 * 8 = 64."""
    sparse = core.sparsify(net(), core.MoEConfig(4, core.TokenChoice(2), granularity=2), "0", "random")
    (layer,) = core.summary(sparse).replaced
    assert layer.experts.startswith("8 FFN(hidden_dim=3, ")
    assert layer.flops_after == 192 + 64 == core.count_flops(sparse[0].moe, torch.randn(1, 16, 4)) / 16


def test_constants_in_the_place_of_experts_cost_nothing():
    """At balance a token takes 2 of 4 experts, half of which are FFNs of 96 FLOPs; the gate has 2 * 4 * 4 = 32."""
    sparse = core.sparsify(net(), core.MoEConfig(4, core.TokenChoice(2)), "0")
    core.prune_experts(sparse, core.expert_statistics(sparse, [torch.randn(2, 6, 4)]), 2, constants=True)
    (layer,) = core.summary(sparse).replaced
    assert layer.experts.startswith("4 Mixed(experts=(FFN(hidden_dim=6, ")
    assert layer.flops_after == 96 + 32
