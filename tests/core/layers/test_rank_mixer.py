"""RankMixer: its equations token by token, its sparse experts, its costs, and what is rejected."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import core
from core.layers.rank_mixer import mix_tokens

D, P, H, E = 7, 2, 4, 3


def built(seed: int = 0, **options):
    config = core.RankMixer(num_tokens=P, token_dim=H, expert=core.FFN(5, bias=True), depth=2, **options)
    torch.manual_seed(seed)
    layer = config.build(D, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return config, layer.eval()


def ffn(experts, e, x):
    return F.gelu(x @ experts.w_in[e] + experts.b_in[e]) @ experts.w_out[e] + experts.b_out[e]


def by_loops(layer, x_D):
    """Compute one example as the equations have it, token by token and head by head."""
    parts = F.pad(x_D, (0, 1)).split(4)  # 7 numbers and a zero: two parts of 4
    x = [part @ layer.tokens.weight[i] + layer.tokens.bias[i] for i, part in enumerate(parts)]
    for level, experts in enumerate(layer.experts):
        heads = [token.split(H // P) for token in x]
        mixed = [torch.cat([heads[t][h] for t in range(P)]) for h in range(P)]
        s = [layer.mixing_norms[level](mixed[i] + x[i]) for i in range(P)]
        y = []
        for i in range(P):
            if not len(layer.router):
                y.append(ffn(experts, i, s[i]))
                continue
            gates = F.relu(layer.router[level * P + i].gate(s[i][None]))[0]
            y.append(sum(gates[e] * ffn(experts, i * E + e, s[i]) for e in range(E)))
        x = [layer.ffn_norms[level](y[i] + s[i]) for i in range(P)]
    return sum(x) / P


def test_mixing_joins_the_same_head_of_every_token():
    # Tokens [1 2 3 4] and [5 6 7 8] have the heads [1 2], [3 4] and [5 6], [7 8].
    mixed = mix_tokens(torch.tensor([[[1, 2, 3, 4], [5, 6, 7, 8]]]))
    assert mixed.tolist() == [[[1, 2, 5, 6], [3, 4, 7, 8]]]


@pytest.mark.parametrize("options", [{}, {"num_experts": E, "router": core.ReLURouting(1)}], ids=["dense", "sparse"])
def test_a_layer_equals_its_equations_in_loops(options):
    _, layer = built(**options)
    x = torch.randn(6, D, requires_grad=True)
    y = layer(x)
    expected = torch.stack([by_loops(layer, own) for own in x])
    assert_close(y, expected.expand(2, -1, -1))  # all tasks have one output
    weight = torch.randn_like(expected)
    names, tensors = zip(*layer.named_parameters(), strict=True)
    own = torch.autograd.grad((y[0] * weight).sum(), [x, *tensors], allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), [x, *tensors], allow_unused=True)
    for name, a, b in zip(("x", *names), own, theirs, strict=True):
        assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_tokens_choose_among_their_own_experts():
    config, layer = built(num_experts=E, router=core.ReLURouting(1))
    x = torch.randn(50, D)
    with core.record(layer) as tape:
        layer(x)
    assert [e.name for e in tape.entries] == [f"level{level}.token{i}.tasks" for level in range(2) for i in range(P)]
    rows = sum(int(e.routing.tokens_per_expert_E.sum()) for e in tape.entries)
    assert 0 < rows < 50 * 2 * P * E
    tokens, gates = 50 * P * 2 * 4 * H, 50 * 2 * P * 2 * H * E
    assert core.count_flops(layer, x) == tokens + gates + rows * config.expert.flops_per_row(H)


def test_two_routers_train_and_one_is_evaluated():
    _, layer = built(num_experts=E, router=core.ReLURouting(1, dense_training=True))
    x = torch.randn(40, D)
    with core.record(layer.train()) as tape:
        y = layer(x)
    (y.square().sum() + core.aux_loss(tape)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    before = layer.eval()(x)
    with torch.no_grad():
        for router in layer.router.routers:
            router.dense_gate.weight.zero_()
    assert_close(layer(x), before)


def test_costs_by_hand():
    # Tokens: 2 parts of 4 numbers to 4: 2 * (16 + 4) = 40. A block: two networks of 4 * 5 + 5 + 5 * 4 + 4 = 49 and two
    # norms of 8. FLOPs: tokens 2 * 2 * 16 = 64, a network 2 * 40 = 80, four of them.
    config, _ = built()
    assert config.num_params(D, 2) == config.active_params(D, 2) == 40 + 2 * (2 * 49 + 16)
    assert config.flops_per_token(D, 2) == 64 + 4 * 80
    # 3 experts of which a token takes 1 on average, and a gate of 4 * 3 + 3.
    sparse, _ = built(num_experts=E, router=core.ReLURouting(1))
    assert sparse.num_params(D, 2) == 40 + 2 * (6 * 49 + 2 * 15 + 16)
    assert sparse.active_params(D, 2) == 40 + 2 * (2 * 49 + 2 * 15 + 16)
    assert sparse.flops_per_token(D, 2) == 64 + 4 * (80 + 2 * 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 3, "token_dim": 8}, "token_dim=8 is not divisible by num_tokens=3"),
        ({"num_experts": 2}, "num_experts=2 needs a router"),
        ({"expert": core.MLP((16,))}, r"makes 16 of token_dim=64"),
        ({"num_experts": 2, "router": core.ReLURouting(3)}, "top_k=3 exceeds num_experts=2"),
        ({"num_experts": 2, "router": core.Merge()}, "does not weight the outputs of chosen experts"),
        ({"self_gate": 1}, "self_gate=1 has no meaning for RankMixer"),
    ],
)
def test_what_is_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        core.RankMixer(**options)
