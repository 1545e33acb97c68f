from __future__ import annotations

import pytest
import torch
from torch import nn

import core
from apps.train.optim.muon import MuonAdamW, orthogonalized
from apps.train.optim.optimizers import OptimizerConfig, build_optimizer, parameter_groups


def test_orthogonalized_matrices_have_singular_values_near_one_and_the_same_singular_vectors():
    torch.manual_seed(0)
    for shape in ((6, 10), (10, 6), (8, 8)):
        g = torch.randn(3, *shape, dtype=torch.float64)
        o = orthogonalized(g)
        assert o.shape == g.shape
        s = torch.linalg.svdvals(o)
        assert s.min() > 0.5
        assert s.max() < 1.3
        # The iteration is an odd polynomial of the singular values: U and V stay, so U^T O V is diagonal.
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        d = u.mT @ o @ vh.mT
        torch.testing.assert_close(d, torch.diag_embed(d.diagonal(dim1=-2, dim2=-1)), atol=1e-10, rtol=0)


def test_a_stack_is_orthogonalized_matrix_by_matrix_and_zeros_stay():
    torch.manual_seed(0)
    g = torch.randn(4, 5, 7, dtype=torch.float64)
    g[2] = 0
    stacked = orthogonalized(g)
    for i in range(4):
        torch.testing.assert_close(stacked[i], orthogonalized(g[i]))
    assert (stacked[2] == 0).all()


def test_a_step_by_hand():
    # g = diag(3, 0), momentum 0.5 from zero: m = 1.5 at (0, 0), look-ahead (g + m) / 2 = 2.25, scaled to 1. Each of
    # five iterations takes x to 3.4445 x - 4.775 x^3 + 2.0315 x^5; the step is lr * 0.2 * sqrt(2) * x, decay 1 - 0.05.
    x = 1.0
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x**3 + 2.0315 * x**5
    w = nn.Parameter(torch.eye(2, dtype=torch.float64))
    b = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = MuonAdamW(
        [{"params": [w], "muon": True, "weight_decay": 0.5}, {"params": [b]}], momentum=0.5, lr=0.1, weight_decay=0.0
    )
    w.grad = torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    b.grad = torch.tensor([2.0, -5.0], dtype=torch.float64)
    optimizer.step()
    expected = torch.tensor([[0.95 - 0.1 * 0.2 * 2**0.5 * x, 0.0], [0.0, 0.95]], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), expected)
    # AdamW's first step is lr times the sign.
    torch.testing.assert_close(b.detach(), torch.tensor([0.9, 1.1], dtype=torch.float64))


def test_other_groups_step_as_adamw_does_and_the_state_is_restored():
    torch.manual_seed(0)
    config = OptimizerConfig(name="muon", lr=0.01)

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
        return net, build_optimizer(net, config)

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    net, optimizer = made()
    train(net, optimizer, range(6))
    first, first_optimizer = made()
    train(first, first_optimizer, range(3))
    again, again_optimizer = made()
    again.load_state_dict(first.state_dict())
    again_optimizer.load_state_dict(first_optimizer.state_dict())
    train(again, again_optimizer, range(3, 6))
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_matrices_of_experts_and_linear_layers_are_muons_and_the_read_out_is_not():
    class Net(nn.Module):
        readout = ("head",)

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 8)
            self.mix = nn.Linear(8, 8)
            self.moe = core.MoEConfig(4, expert=core.FFN(6, bias=True), num_shared_experts=1).build(8)
            self.head = nn.Linear(8, 3)

    net = Net()
    names = {id(p): n for n, p in net.named_parameters()}
    groups = parameter_groups(net, OptimizerConfig(name="muon"))
    muon = {names[id(p)] for g in groups if g["muon"] for p in g["params"]}
    assert muon == {"mix.weight"} | {
        f"moe.{e}.w_{side}" for e in ("experts", "shared_experts") for side in ("in", "out")
    }
    scaled = parameter_groups(net, OptimizerConfig(lr=1.0, expert_lr_scale=0.5))
    assert {names[id(p)] for g in scaled if g["lr"] == 0.5 for p in g["params"]} == {
        n for n in names.values() if "experts." in n
    }
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert not any("muon" in g for g in parameter_groups(net, OptimizerConfig()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stacked_norms_neither_decay_nor_are_matrices(name):
    net = core.MMoE(4, core.MLP((8, 6), norm="batch")).build(5, num_tasks=2)
    groups = parameter_groups(net, OptimizerConfig(name=name))
    names = {id(p): n for n, p in net.named_parameters()}
    norms = [g for g in groups for p in g["params"] if "norm_" in names[id(p)]]
    assert len(norms) == 4
    assert all(g["weight_decay"] == 0 and not g.get("muon") for g in norms)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) is none"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}])
