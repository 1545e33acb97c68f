"""Faults planted in a short training, each named by the diagnosis; and the same training without one, which is not.

The network has 4 experts and tokens of 32 words at 8 places. A block of another library is diagnosed as well.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from patients import CLASSES, LENGTH, Patient, Training, batches, task_loss, whole_loss
from torch import Tensor, nn

import core

FFN = core.FFN(hidden_dim=16)
TOP2 = core.MoEConfig(4, core.TokenChoice(top_k=2), FFN)
NO_BALANCE = core.Balance(load_balancing_loss=0.0, router_z_loss=0.0)


def names(findings):
    return {finding.name for finding in findings}


def prefer(net: Patient, sign: float) -> None:
    """Give all tokens a common part, and expert 0 a gate along it or against it."""
    with torch.no_grad():
        net.norm.bias += 1.0
        net.moe.router.gate.weight[0] = sign * 0.3


def test_a_collapsed_load():
    # The gate begins with a preference of 16 * 0.3 for expert 0, and nothing balances the loads.
    training = Training(
        replace(TOP2, router=core.TokenChoice(top_k=1), balance=NO_BALANCE), plant=lambda n: prefer(n, 1.0)
    )
    (finding,) = (f for f in training.findings() if f.name == "collapsed_load")
    assert finding.severity == "error"
    assert finding.figures["experts_in_use"] < 1.75  # 1 + a quarter of the 3 others
    assert "balance.load_balancing_loss of 0.01" in finding.remedy


def test_drops():
    # 16 * 8 tokens of 2 choices among 4 experts: 64 pairs each at balance, and room for 32. With room for 64, chance
    # would leave out sqrt(64 * 3/4) / sqrt(2 pi) = 2.8 of 64, the mean excess of a normal load.
    training = Training(replace(TOP2, router=core.TokenChoice(top_k=2), eval_capacity_factor=0.5))
    (finding,) = training.findings()
    assert (finding.name, finding.figures["by_chance"]) == ("drops", pytest.approx(2.764 / 64, rel=1e-3))
    assert finding.figures["drop_rate"] == pytest.approx(0.5, abs=0.1)


def test_a_load_that_follows_the_place():
    def plant(net: Patient) -> None:
        net.place.data.copy_(torch.eye(LENGTH).repeat(1, 2) * 12)

    training = Training(replace(TOP2, router=core.TokenChoice(top_k=1)), plant=plant)
    assert "skew_by_place" in names(training.findings())


def test_a_load_that_follows_the_class():
    def plant(net: Patient) -> None:
        # Words of a class begin alike, and so do the gates of its expert.
        with torch.no_grad():
            ids = torch.arange(net.embed.num_embeddings)
            center = torch.randn(4, net.embed.embedding_dim)
            net.embed.weight.copy_(3 * center[(5 * ids + ids // 3) % CLASSES % 4] + 0.1 * net.embed.weight)
            net.place.zero_()
            net.moe.router.gate.weight.copy_(center)

    def labels(ids: torch.Tensor) -> torch.Tensor:
        return ((5 * ids + ids // 3) % CLASSES % 4).flatten()

    training = Training(replace(TOP2, router=core.TokenChoice(top_k=1)), plant=plant)
    assert "skew_by_class" in names(training.findings(labels=labels))


def given(change: Callable[[Patient, torch.Tensor], torch.Tensor]) -> Callable[[Patient], object]:
    """Return what gives a router ``change`` of its tokens in their place."""
    return lambda net: net.moe.router.register_forward_pre_hook(lambda m, args: (change(net, args[0]), *args[1:]))


def cut_off(net: Patient) -> None:
    """Detach the gates on their way to the experts, as in a router that is written around a custom kernel."""
    net.moe.router.register_forward_hook(lambda m, args, out: replace(out, gates_N=out.gates_N.detach()))


def copied(net: Patient) -> None:
    with torch.no_grad():
        for p in net.moe.experts.parameters():
            p.copy_(p[:1].expand_as(p))


TOP4, FREE = replace(TOP2, router=core.TokenChoice(top_k=4)), replace(TOP2, balance=NO_BALANCE)
PLANTED = {
    "a dead expert": (Training(FREE, plant=lambda n: prefer(n, -1.0)), "dead_experts", lambda f: f["dead"] == 1),
    "no balance loss": (Training(TOP2, steps=20, loss=task_loss), "silent_balance", lambda f: abs(f["times"]) < 1e-3),
    "two of them": (Training(TOP2, steps=20, loss=partial(whole_loss, times=2)), "doubled_balance",
                    lambda f: abs(f["times"] - 2) < 1e-3),
    "logits that overflow": (Training(FREE, router_lr=1.0), "logits_overflow", lambda f: f["largest"] > 64),
    "gates cut off": (Training(TOP2, plant=cut_off), "no_router_gradient", lambda f: f["router_gradient"] < 1e-6),
    "a frozen router, balanced": (Training(TOP2, plant=lambda net: net.moe.router.requires_grad_(False)),
                                  "no_router_gradient", lambda f: True),
    # The mean of the batch, a summary that was pooled over one axis too many; and the place alone.
    "no tokens": (Training(TOP2, plant=given(lambda net, x: x.mean((0, 1), keepdim=True).expand_as(x))), "token_blind",
                  lambda f: True),
    "places": (Training(TOP2, plant=given(lambda net, x: net.place.expand_as(x))), "token_blind", lambda f: True),
    # Copies of one expert that every token takes, tuned with care: their gradients differ by the gate alone, and Adam's
    # step does not depend on a factor. 4 * 3 / 2 pairs.
    "the same experts": (Training(TOP4, plant=copied, lr=3e-4), "same_experts", lambda f: f["pairs"] == 6),
    "a router without an optimizer": (Training(TOP2, router_lr=0.0), "gates_at_start", lambda f: f["router"] == 0),
    "slow experts": (Training(TOP2, expert_lr=3e-5), "slow_experts", lambda f: f["experts"] < 0.1 * f["rest"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named(fault):
    training, name, is_measured = PLANTED[fault]
    (finding,) = (f for f in training.findings() if f.name == name)
    assert is_measured(finding.figures), finding.figures
    if fault == "a dead expert":
        assert "1 of 4 experts got none of 2,048 pairs, 512 each at balance" in finding.evidence
    if fault == "the same experts":
        assert finding.severity == "error"


def test_a_balance_loss_over_padding():
    findings = Training(TOP2, padded=True, heed_padding=False).findings()
    (finding,) = (f for f in findings if f.name == "balance_over_padding")
    assert finding.evidence == "38% of the 1,024 tokens that its loss counts are padding"  # 3 of 8


def test_logits_that_drift():
    net, _ = Training(replace(TOP2, balance=NO_BALANCE), steps=10).run()
    doctor = core.Doctor(net.eval())
    for scale in (1.0, 10.0):
        doctor.begin()
        with torch.no_grad():
            net.norm.bias.fill_(0.3 * scale)
            net.moe.router.gate.weight.fill_(0.5)  # each logit is 16 * 0.3 * 0.5 = 2.4 at first, and 24 then
            with doctor.watching():
                net(batches(1)[0])
    (finding,) = (f for f in doctor.findings() if f.name == "logits_drift")
    assert finding.figures["last"] == pytest.approx(24 + torch.tensor(4.0).log().item(), rel=0.02)


@pytest.mark.parametrize("scale", [0.0, 1e-6])
def test_a_router_whose_logits_do_not_differ(scale):
    # Ties go to the first experts, and logits of 1e-6 to even loads: the fault is the same. 8 sequences of equal logits
    # are one constant router and not 8 decisions.
    layer = core.MoEConfig(8, core.TokenChoice(top_k=2), FFN).build(16).eval()
    with torch.no_grad():
        layer.router.gate.weight.mul_(scale)
    findings = core.diagnose(layer, [torch.randn(8, 32, 16)])
    assert names(findings) == ({"flat_logits", "collapsed_load"} if scale == 0 else {"flat_logits"})
    assert next(f for f in findings if f.name == "flat_logits").figures["spread"] <= 1e-6


def test_a_constant_router_in_few_sequences():
    # The input is constant, as after a norm of weight 0: the variance is that of the experts' preferences.
    layer = core.MoEConfig(8, core.TokenChoice(top_k=2), FFN).build(16).eval()
    findings = core.diagnose(layer, [torch.ones(8, 32, 16)])
    (finding,) = (f for f in findings if f.name == "token_blind")
    assert finding.figures["token_share"] < 1e-9


class Tasks(nn.Module):
    """Two tasks over one MMoE layer."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = core.MMoE(num_experts=4, expert=core.MLP(hidden_dims=(8,))).build(8, num_tasks=2)

    def forward(self, x):
        return self.moe(x)


def test_a_gate_of_a_task_that_one_expert_has_taken():
    torch.manual_seed(0)
    net, x = Tasks(), torch.randn(256, 8)
    x[:, 7] = 1.0
    target = torch.stack((x[:, 0], x[:, 1]))
    assert core.diagnose(net, [x]) == []
    with torch.no_grad():
        net.moe.router.weight[0, 2, 7] += 7.0  # task 0 begins with a preference of e^7 for expert 2
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        ((net(x).mean(-1) - target) ** 2).mean().backward()
        optimizer.step()
    (finding,) = core.diagnose(net, [x])
    assert (finding.name, finding.layer) == ("polarized_gates", "moe.task0")
    assert finding.evidence.startswith("the gate gives expert 2 ")


@pytest.mark.parametrize("padded", [False, True])
def test_a_healthy_training_has_no_finding(padded):
    assert Training(TOP2, padded=padded).findings() == []


def test_few_tokens_are_no_evidence_of_loads_nor_has_a_router_of_one_expert_a_fault():
    # 8 tokens of one choice: some of the experts get none by chance.
    net, _ = Training(replace(TOP2, router=core.TokenChoice(top_k=1)), steps=5).run()
    assert names(core.diagnose(net, [batches(1)[0][:1]])) == set()
    assert core.diagnose(core.MoEConfig(1, core.TokenChoice(top_k=1), FFN).build(16), [torch.randn(8, 32, 16)]) == []


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
