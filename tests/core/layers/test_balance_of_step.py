"""Balance losses over all micro-batches of a step: the gradient of one large batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import core

BALANCES = [
    core.Balance(load_balancing_loss=0.5, router_z_loss=0.1),
    core.Balance(load_balancing_loss=0, router_z_loss=0, importance=0.5, load=0.0, mutual_information=0.2),
]


def net(balance):
    torch.manual_seed(0)
    config = core.MoEConfig(4, core.TokenChoice(2), core.FFN(12), balance=balance)
    return nn.Sequential(config.build(8), config.build(8))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("balance", BALANCES, ids=["load", "importance"])
def test_micro_batches_add_up_to_one_batch(balance):
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
    whole = net(balance)
    with core.record(whole) as tape:
        task = whole(x).square().mean()
    (task + core.aux_loss(tape)).backward()

    parts, alone = copy.deepcopy(whole), copy.deepcopy(whole)
    parts.zero_grad(), alone.zero_grad()
    micro, tapes = x.split(2), []
    for part in micro:
        with torch.no_grad(), core.record(parts) as tape:
            parts(part)
        tapes.append(tape)
    for model, step in ((parts, tapes), (alone, ())):
        for part in micro:
            with core.record(model) as tape:
                task = model(part).square().mean() / len(micro)
            (task + core.aux_loss(tape, step=step) / (1 if step else len(micro))).backward()
    expected = gradients(whole)
    assert float((gradients(parts) - expected).norm() / expected.norm()) < 1e-6
    assert float((gradients(alone) - expected).norm() / expected.norm()) > 1e-4


def test_a_step_without_a_pass_is_rejected():
    model = net(BALANCES[0])
    with core.record(model) as tape:
        model(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="a micro-batch of the step has no pass 1 of layer '0'"):
        core.aux_loss(tape, step=[tape, core.Tape()])
