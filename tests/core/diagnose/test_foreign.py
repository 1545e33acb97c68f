"""A block of another library: a gate, a list of experts beside it, and no word of ours."""

import pytest
import torch
from torch import Tensor, nn

import core

D, E, T = 8, 4, 64


class Block(nn.Module):
    """Two of four experts a token, weighted by the softmax of the gate's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(index == e)
            y = y.index_add(0, token, expert(x[token]) * weight[token, place, None])
        return y


def net_and_tokens() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), Block()), [torch.randn(T, D) for _ in range(4)]


def loss(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x).square().mean()


def test_a_healthy_block_and_one_without_an_expert():
    net, tokens = net_and_tokens()
    assert core.diagnose(net, tokens, loss=loss) == []
    net, tokens = net_and_tokens()
    scores = core.ablate_experts(net, lambda: loss(net, tokens[0]).item())
    net[1].experts[2].weight.data.zero_()
    net[1].experts[2].bias.data.zero_()
    assert scores["1"][2] == loss(net, tokens[0]).item()


def test_a_dead_expert_and_equal_ones():
    net, tokens = net_and_tokens()
    with torch.no_grad():
        net[0].bias.fill_(1.0)
        net[1].gate.weight[3] = -3.0  # a logit of about -3 * 8
        net[1].experts[1].load_state_dict(net[1].experts[0].state_dict())
    dead, same = core.diagnose(net, tokens)
    assert (dead.name, dead.layer, dead.figures["dead"]) == ("dead_experts", "1", 1)
    assert same.figures == {"pairs": 1, "nearest": pytest.approx(0, abs=1e-12)}


def test_a_gate_that_is_cut_off_and_one_that_stood_still():
    net, tokens = net_and_tokens()
    start = core.TrainingStart(net)
    trained = [p for name, p in net.named_parameters() if "gate" not in name]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for x in tokens:
        optimizer.zero_grad()
        loss(net, x).backward()
        optimizer.step()
    net[1].gate.register_forward_hook(lambda m, args, out: out.detach() + 0 * out.detach())
    names = [f.name for f in core.diagnose(net, tokens, loss=loss, start=start)]
    assert names == ["no_router_gradient", "gates_at_start"]
