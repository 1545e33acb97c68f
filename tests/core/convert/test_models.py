"""Several models as one: by hand, and equal to them where they are equal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import core
from core import average_models, average_states


def net(value: float, counted: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    model[1].num_batches_tracked.fill_(counted)
    return model


@pytest.mark.parametrize(("weights", "mean"), [(None, 4.0), ([1, 0, 3], 6.25), ([2.0, 2.0, 0.0], 2.0)])
def test_parameters_are_means_by_weight(weights, mean):
    models = [net(1.0, 5), net(3.0, 9), net(8.0, 7)]
    # (1 + 3 + 8) / 3, then 1/4 * 1 + 3/4 * 8, then (1 + 3) / 2.
    merged = average_models([m.eval() for m in models], weights)
    assert all(p.detach().eq(mean).all() for p in merged.parameters())
    assert merged[1].num_batches_tracked == 9
    assert not merged.training
    assert models[0][0].weight[0, 0] == 1.0  # a copy


def test_equal_models_are_their_mean_and_half_precision_is_summed_in_float32():
    moe = core.MoEConfig(4).build(8)
    assert_close(average_models([moe, copy.deepcopy(moe), moe]).state_dict(), moe.state_dict(), rtol=1e-6, atol=1e-7)
    # 256 + 1 is 256 in bfloat16, so that the mean would be 64: it is 64.75, rounded once.
    states = [{"w": torch.tensor([value]).bfloat16()} for value in (256.0, 1.0, 1.0, 1.0)]
    assert average_states(states)["w"].item() == torch.tensor(64.75).bfloat16().item()


def test_tables_have_to_be_the_same():
    models = [core.MoEConfig(4, core.Hash(20, seed=seed)).build(8) for seed in (0, 0, 1)]
    table = models[0].router.table.clone()
    assert torch.equal(average_models(models[:2]).router.table, table)
    with pytest.raises(ValueError, match=r"router\.table holds whole numbers that differ: they have no mean"):
        average_models(models)


@pytest.mark.parametrize(
    ("models", "weights", "message"),
    [
        ([], None, "there are no models to average"),
        ([net(1.0), nn.Linear(2, 3)], None, "model 1 lacks 0.bias, 0.weight, 1.bias, ..., which model 0 has"),
        ([nn.Linear(2, 3, bias=False), nn.Linear(2, 3)], None, "model 0 lacks bias, which model 1 has"),
        ([nn.Linear(2, 3), nn.Linear(2, 4)], None, r"weight has shape \(3, 2\) in model 0 and \(4, 2\) in model 1"),
        ([net(1.0), net(2.0)], [1.0], "weights has 1 numbers for 2 models"),
        ([net(1.0), net(2.0)], [1.0, -1.0], r"weights=\[1.0, -1.0\] are not finite, not negative and not all 0"),
        ([net(1.0), net(2.0)], [0.0, 0.0], "not all 0"),
    ],
)
def test_refused_in_one_line(models, weights, message):
    with pytest.raises(ValueError, match=message):
        average_models(models, weights)
