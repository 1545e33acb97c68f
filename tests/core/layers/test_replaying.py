"""Replayed choices: the recorded experts, with gates of the layer's own, in memory and from a file."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import core

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
VALID = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
ROUTERS = [
    core.TokenChoice(2),
    core.TokenChoice(3, score_func="sigmoid", expert_bias=True),
    core.TokenChoice(1),
]


class Net(nn.Module):
    def __init__(self, router, seed, **options):
        super().__init__()
        torch.manual_seed(seed)
        config = core.MoEConfig(4, router, core.FFN(12), **options)
        self.first, self.second = config.build(8), config.build(8)

    def forward(self, x, context=None):
        return self.second(self.first(x, context), context)


def recorded(net, context=None):
    with core.record(net) as tape:
        net(X, context)
    return tape


def ids(entry):
    routing = entry.routing
    return routing.expert_ids_N.view(routing.num_tokens, routing.top_k)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_another_model_takes_the_recorded_experts_with_its_own_gates(router, tmp_path):
    server, net = Net(router, 1), Net(router, 2)
    context = core.RoutingContext(valid_BS=VALID)
    tape = recorded(server, context)
    core.Choices.of(tape).save(tmp_path / "choices.safetensors")
    choices = core.Choices.load(tmp_path / "choices.safetensors")
    assert not torch.equal(ids(recorded(net, context).entries[0]), ids(tape.entries[0]))
    with core.replay(net, choices), core.record(net) as again:
        y = net(X, context)
    for entry, other in zip(again.entries, tape.entries, strict=True):
        assert torch.equal(ids(entry), ids(other))
    y.sum().backward()
    gate = net.first.router.gate.weight
    assert float(gate.grad.abs().max()) > 0
    first = again.entries[0].routing
    logits_TE = first.evidence.logits_TE
    chosen = logits_TE.gather(1, ids(again.entries[0]).clamp_max(3))
    scores = chosen.sigmoid() if router.score_func == "sigmoid" else chosen.exp() / logits_TE.exp().sum(1, keepdim=True)
    gates = scores / scores.sum(1, keepdim=True) if router.top_k > 1 else scores
    real = VALID.flatten()
    torch.testing.assert_close(first.gates_N.view(12, -1)[real], gates[real])
    assert len(recorded(net)) == 2  # afterwards it chooses by itself


def test_a_model_replays_itself_to_the_bit_with_the_same_gradients():
    net = Net(ROUTERS[0], 1)
    tape, other = recorded(net), copy.deepcopy(net)
    y = net(X)
    with core.replay(other, tape):
        again = other(X)
    assert torch.equal(y, again)
    y.sum().backward()
    again.sum().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("is_inside", [True, False])
def test_an_activation_checkpoint_repeats_the_same_passes(is_inside, passes):
    net, server = Net(ROUTERS[0], 1), Net(ROUTERS[0], 3)
    with core.record(server) as tape:
        server(X), *([server(-X)] if passes == 2 else [])
    grads = []
    for run in (net, functools.partial(checkpoint, net, use_reentrant=False)):
        x = X.clone().requires_grad_()
        with core.replay(net, tape):
            loss = run(x).square().sum() + (run(-2 * x).sum() if passes == 2 else 0)
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])
    own = [e.routing.expert_ids_N for e in recorded(net).entries]
    assert not torch.equal(own[0], tape.entries[0].routing.expert_ids_N)
    assert "_given" not in net.first.__dict__  # the first pass afterwards lets the choices go


def test_a_checkpoint_of_equal_passes_with_other_choices_is_no_guess():
    net, server = Net(ROUTERS[0], 1), Net(ROUTERS[0], 3)
    with core.record(server) as tape:
        server(X), server(-X)
    with core.replay(net, tape):
        loss = sum(checkpoint(net, X.clone().requires_grad_(), use_reentrant=False).sum() for _ in range(2))
    with pytest.raises(ValueError, match="repeats one of 2 replayed passes, and its tokens are those of 2 of them"):
        loss.backward()
    again = pytest.raises(ValueError, match="layer 'first' is inside another")
    with core.replay(net, tape), again, core.replay(net, tape):
        pass
    # Where a later layer is the one inside another block, the earlier ones are let go too.
    half = nn.ModuleDict({"second": net.second})
    of_second = core.Choices({"second": core.Choices.of(tape).experts["second"]})
    second = pytest.raises(ValueError, match="layer 'second' is inside another")
    with core.replay(half, of_second), second, core.replay(net, tape):
        pass
    for _ in range(2):
        net(X), net(X)
    assert "_given" not in net.first.__dict__


def test_several_passes_are_taken_in_their_order():
    net = Net(ROUTERS[0], 1)
    with core.record(net) as tape:
        net(X), net(-X)
    with core.replay(Net(ROUTERS[0], 2), tape):
        pass
    other = Net(ROUTERS[0], 2)
    with core.replay(other, tape), core.record(other) as again:
        other(X), other(-X)
    assert [ids(e).tolist() for e in again.entries] == [ids(e).tolist() for e in tape.entries]
    with core.replay(other, tape):
        other(X), other(X)
        with pytest.raises(ValueError, match="'first' runs more often than the 2 passes of the record"):
            other(X)


def test_what_cannot_be_replayed(tmp_path):
    net = Net(ROUTERS[0], 1)
    tape = recorded(net)
    with (
        pytest.raises(ValueError, match="layer 'first' is not in the model"),
        core.replay(nn.ModuleDict({"second": net.second}), tape),
    ):
        pass
    with core.replay(net, tape), pytest.raises(ValueError, match="got 6 tokens, and 12 were recorded"):
        net(X[:1])
    dropping = Net(core.TokenChoice(2), 1, capacity_factor=0.5)
    with pytest.raises(ValueError, match=r"layer 'first' dropped \d+ pairs: record without a capacity"):
        core.Choices.of(recorded(dropping))
    other = Net(core.ExpertChoice(), 1)
    with pytest.raises(ValueError, match="without K experts per token"):
        core.Choices.of(recorded(other))
    hashed = Net(core.Base(), 2)
    own = pytest.raises(ValueError, match="'first' does not choose by top-k of 4 experts")
    with core.replay(hashed, recorded(Net(core.TokenChoice(1), 3))), own:
        hashed(X)
    (tmp_path / "bad").write_bytes(b"12345678901234567890")
    with pytest.raises(ValueError, match="has no choices of"):
        core.Choices.load(tmp_path / "bad")
    tape = recorded(net)
    few = core.MoEConfig(3, ROUTERS[0], core.FFN(12))
    smaller = nn.ModuleDict({"first": few.build(8), "second": few.build(8)})
    with core.replay(smaller, tape), pytest.raises(ValueError, match="expert 3 of the record is not among the 3 here"):
        smaller["first"](X)
