"""Networks that share their weights."""

import pytest
import torch

import core
from core.experts.base import COMMON
from core.parallel.shards import _check


def members() -> core.BatchEnsembleExperts:
    experts = core.BatchEnsemble((1,)).build(2, 2)
    with torch.no_grad():
        experts.common["w_0"].copy_(torch.tensor([[[1.0], [2.0]]]))
        experts.r_0.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        experts.s_0.copy_(torch.tensor([[1.0], [10.0]]))
        experts.b_0.copy_(torch.tensor([[0.5], [-4.0]]))
    return experts


def test_a_layer_by_hand():
    # Member 0: 3 * 1 + 1 * 2 + 0.5 = 5.5; member 1: (3 * 1 - 1 * 2) * 10 - 4 = 6.
    y_TnF = members()(torch.tensor([[3.0, 1.0]]), "each")
    assert y_TnF.tolist() == [[[5.5], [6.0]]]


def test_costs_are_the_shared_matrices_once_and_the_scales_of_each():
    config = core.BatchEnsemble((12, 10))
    assert config.num_params(16) == (16 + 2 * 12) + (12 + 2 * 10)
    assert config.layer_params(16) == 16 * 12 + 12 * 10
    assert config.flops_per_row(16) == 2 * (16 * 12 + 12 * 10)
    experts = config.build(4, 16)
    assert core.num_params(experts) == 4 * config.num_params(16) + config.layer_params(16)
    assert not any(name.startswith(COMMON) for name in experts.no_weight_decay())


def test_they_stay_on_one_rank():
    layer = core.MoEConfig(4, core.TokenChoice(2), core.BatchEnsemble((8,))).build(8)
    with pytest.raises(ValueError, match="BatchEnsembleExperts, whose matrices all experts share: they stay on one"):
        _check("the layer", layer, ranks=2, hidden=1)
