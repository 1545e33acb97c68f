"""How important hidden units are to a loss, and experts that share the most important ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core import DenseFFN, MoEConfig, TokenChoice, sparsify
from core.convert import SplitStart, unit_importances

ALL = MoEConfig(4, TokenChoice(4, normalize="unit"))


def network(gated: bool = False, bias: bool = True) -> nn.Module:
    return DenseFFN(24, "silu" if gated else "relu", gated=gated, bias=bias).build(8)


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize("gated", [False, True])
def test_it_is_what_the_weights_of_a_unit_do_to_the_loss(gated):
    model, batches = nn.Sequential(network(gated), nn.Linear(8, 3)), torch.randn(2, 5, 8)
    importance_F = unit_importances(model, "0", batches, loss)["0"]
    assert all(p.grad is None for p in model.parameters())
    expected_F = torch.zeros(24)
    for x in batches:
        model.zero_grad()
        loss(model, x).backward()
        dense = model[0]
        read_by = [m.weight for m in (dense.w_in, dense.w_gate) if m is not None]
        for unit in range(24):
            total = sum((w[unit] * w.grad[unit]).sum().item() for w in read_by)
            total += (dense.w_out.weight[:, unit] * dense.w_out.weight.grad[:, unit]).sum().item()
            expected_F[unit] += abs(total)
    torch.testing.assert_close(importance_F, expected_F)


def test_a_network_in_a_block_is_measured_by_its_name():
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)).train()
    model[1].self_attn.requires_grad_(False)
    x = torch.randn(2, 4, 3)
    importances = unit_importances(model, "1", [x], loss)
    assert {name: values.shape for name, values in importances.items()} == {"1": (12,)}
    assert model[1].dropout.training
    moe = MoEConfig(4, TokenChoice(4, normalize="unit"))
    sparse = sparsify(model, moe, "1", SplitStart("importance", shared=4), importances=importances)
    torch.testing.assert_close(sparse.eval()(x), model.eval()(x))


@pytest.mark.parametrize(("gated", "bias"), [(False, True), (False, False), (True, True), (True, False)])
def test_every_expert_has_the_most_important_units_and_its_share_of_the_others(gated, bias):
    """Units count down in importance from 23: 0 to 7 are shared, 8, 12, 16 and 20 are expert 0's own, and so on."""
    dense, x = network(gated, bias), torch.randn(3, 7, 8)
    start, importances = SplitStart("importance", shared=8), torch.arange(24.0).flip(0)
    sparse = sparsify(dense, ALL, "", start, importances=importances)
    experts = sparse.moe.experts
    assert sparse.config.expert.hidden_dim == 8 + 16 // 4
    for e in range(4):
        units = [*range(8), *range(8 + e, 24, 4)]
        assert torch.equal(experts.w_in[e], dense.w_in.weight.t()[:, units])
        scale = torch.tensor([1 / 4] * 8 + [1.0] * 4)  # a shared unit counts once among the four experts of a token
        torch.testing.assert_close(experts.w_out[e], dense.w_out.weight.t()[units] * scale[:, None])
    # The network begins as it was where a token takes all experts.
    with torch.no_grad():
        assert (sparse(x) - dense(x)).norm() <= 1e-6 * dense(x).norm()


@pytest.mark.parametrize(
    ("start", "importances", "message"),
    [
        (SplitStart("importance"), None, r"SplitStart\(by='importance', shared=0\) needs importances of the model"),
        ("split", torch.ones(24), r"SplitStart\(by='clusters', shared=0\) does not read importances"),
        (SplitStart("importance"), {"0": torch.ones(24)}, r"importances have no layer ''; they have '0'"),
        (SplitStart("importance"), torch.ones(23), r"have shape \(23,\): they are 24 finite numbers"),
        (SplitStart("importance"), torch.full((24,), torch.nan), r"they are 24 finite numbers"),
        (SplitStart("importance"), {"": [1.0] * 24}, r"importances of module '' is a list, not a tensor"),
        (SplitStart("importance", 6), torch.ones(24), r"does not divide the network's 24 hidden units less shared=6"),
        (SplitStart("importance", 24), torch.ones(24), r"does not divide the network's 24 hidden units less shared=24"),
    ],
)
def test_bad_importances(start, importances, message):
    with pytest.raises(ValueError, match=message):
        sparsify(network(), ALL, "", start, importances=importances)


def test_what_cannot_be_measured():
    two, x = nn.Sequential(network(), network()), torch.randn(2, 8)
    stack = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU())
    for args, message in (
        ((two, "*", [x], lambda model, x: model[0](x).sum()), r"module '1': the loss of no batch depends on it"),
        ((two, "*", [], loss), r"module '0': the loss of no batch depends on it"),
        ((two, "*", [x], lambda model, x: model(x)), r"loss of a batch has shape \(2, 8\), and is not one number"),
        ((two, "*", [x], lambda model, x: model(x).sum().item()), r"the loss of a batch is a float, not a tensor"),
        ((two, "*", [x], lambda model, x: model(x).sum().detach()), r"the loss of a batch has no gradient"),
        ((stack, "", [x], loss), r"module '': a MLP is a stack of layers, which has no one hidden width"),
    ):
        with pytest.raises(ValueError, match=message):
            unit_importances(*args)
    with pytest.raises(ValueError, match=r"shared=2 is the number of the most important units: by='importance' alone"):
        SplitStart("random", shared=2)
