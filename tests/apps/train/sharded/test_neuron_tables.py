"""PEER's tables in TorchRec compute as the plain layer; ``tests/apps/recsys/tables`` runs them on two processes."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("torchrec", reason="torchrec with fbgemm-gpu-cpu is an optional part")

import torch
from sharded_neurons import D, E, batch, layer
from torch import Tensor, nn

import core
from apps.train.sharded.neuron_tables import NeuronTables, shard_tables, use_tables


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_one_process_computes_as_whole_tables(activation):
    plain = layer(activation=activation)
    tables = copy.deepcopy(plain)
    assert use_tables(tables) == [""]
    valid = torch.ones(4, 5, dtype=torch.bool)
    valid[1:, 2:] = False  # padding picks no expert
    context, gradients = core.RoutingContext(valid_BS=valid), []
    for made in (plain, tables):
        x = batch(0).requires_grad_()
        y = made(x, context)
        y.square().sum().backward()
        gradients.append([y, x.grad, *(p.grad for p in made.parameters())])
    assert len(gradients[0]) == len(gradients[1]) == 2 + len(list(plain.parameters()))
    for expected, actual in zip(*gradients, strict=True):
        assert relative(actual, expected) < 1e-6
    assert core.active_params(tables) == core.active_params(plain)


def test_no_token_and_sorted_rows():
    plain = layer()
    tables = NeuronTables(plain.experts)
    assert tables(torch.zeros(3, D), "picked", torch.full((3, 2), E), torch.ones(3, 2)).tolist() == [[0.0] * D] * 3
    rows = [plain.experts, tables]
    made = [core.MoE(plain.router, experts, pairs_per_token=4.0, dim=D)(batch(0)) for experts in rows]
    torch.testing.assert_close(made[1], made[0])


def test_what_cannot_be_sharded_is_refused():
    with pytest.raises(ValueError, match="Linear has no layer of PEER experts"):
        shard_tables(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="optimizer='muon'"):
        shard_tables(layer(), optimizer="muon")
    with pytest.raises(ValueError, match="PEER's rows are 6 wide"):
        shard_tables(core.MoEConfig(4, core.ProductKeys(1), core.PEER()).build(6))
    with pytest.raises(ValueError, match="u is 8 wide and v 4"):
        NeuronTables(core.PEER().build(4, 8, 4))
