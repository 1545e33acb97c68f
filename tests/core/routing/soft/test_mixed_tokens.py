"""Mixture-of-Tokens by hand, against a loop over the groups, and what the sequences of a batch change in each other."""

import math

import pytest
import torch
from torch import Tensor

import core
from core import FFN, MixtureOfTokens, MoEConfig, RoutingContext, SwiGLU, TokenChoice, record

E, D = 4, 8
VALID = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 6, [True] * 6, [True] * 1 + [False] * 5])


def build(router: core.RouterConfig, expert: core.ExpertConfig = FFN(6, bias=True), **options: object) -> core.MoE:
    torch.manual_seed(0)
    layer = MoEConfig(E, router, expert, **options).build(D)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def naive(layer: core.MoE, x: Tensor, group_size: int, valid: Tensor) -> Tensor:
    """Compute the definition, group by group, position by position and expert by expert."""
    B, S, _ = x.shape
    count, y = math.ceil(B / group_size), torch.zeros_like(x)
    for first in range(count):
        for s in range(S):
            members = [b for b in range(first, B, count) if valid[b, s]]
            if not members:
                continue
            tokens = x[members, s]
            for e in range(E):
                shares = (tokens @ layer.router.gate.weight[e] / layer.router.config.tau_start).softmax(0)
                mixed = (shares[:, None] * tokens).sum(0, keepdim=True)
                weights = {name: w[None] for name, w in layer.experts.weights_of(e).items()}
                out = torch.func.functional_call(one_expert(layer), weights, (mixed, "dense"))
                y[members, s] = y[members, s] + shares[:, None] * out
    return y


def one_expert(layer: core.MoE) -> core.Experts:
    config = FFN(6, bias=True) if layer.experts.activation == "gelu" else SwiGLU(6)
    return config.build(1, D).to(next(layer.parameters()).dtype)


def test_by_hand():
    layer = MoEConfig(2, MixtureOfTokens(group_size=2), FFN(1, "relu")).build(1)
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.tensor([[math.log(2)], [0.0]]))
        layer.experts.w_in.fill_(1.0)  # expert 0 is the identity of positive numbers, expert 1 ten times it
        layer.experts.w_out.copy_(torch.tensor([[[1.0]], [[10.0]]]))
    with record(layer) as tape:
        y = layer(torch.tensor([[[1.0], [3.0]], [[2.0], [3.0]]]))
    # Position 0 has tokens 1 and 2. Expert 0's logits log 2 and 2 log 2 give shares 1/3, 2/3: it mixes 5/3. Expert 1's
    # are equal: 3/2, of which it makes 15. Token 0 gets 5/9 + 15/2, token 1 10/9 + 15/2. At position 1 both tokens are
    # 3, all shares 1/2, and both get 3/2 + 15.
    torch.testing.assert_close(y.squeeze(-1), torch.tensor([[5 / 9 + 7.5, 16.5], [10 / 9 + 7.5, 16.5]]))
    routing = tape.entries[0].routing
    torch.testing.assert_close(
        routing.combine_GSEP[:, 0, :, 0], torch.tensor([[1 / 3, 1 / 2], [2 / 3, 1 / 2]]), rtol=1e-6, atol=0
    )
    assert routing.tokens_per_expert_E.tolist() == [2, 2]  # a mixed token for each position
    assert routing.num_tokens == 4


@pytest.mark.parametrize(
    ("group_size", "expert"), [(1, SwiGLU(6)), (2, FFN(6, bias=True)), (3, SwiGLU(6)), (32, FFN(6, bias=True))], ids=str
)
def test_output_and_gradients_equal_the_loop_over_groups(group_size, expert):
    # Five sequences in groups of at most 2, 3 and 32: sizes 2 + 2 + 1, 3 + 2, 5, with padding in them.
    layer = build(MixtureOfTokens(group_size, tau_start=0.7, tau_end=0.7), expert).double()
    x, results = torch.randn(5, 6, D, dtype=torch.float64), []
    for run in (lambda x: layer(x, RoutingContext(valid_BS=VALID)), lambda x: naive(layer, x, group_size, VALID)):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = run(given)
        y.sin().sum().backward()
        results.append([y, given.grad, *(p.grad.clone() for p in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_a_position_sees_no_other_and_sequences_of_a_group_see_each_other():
    layer, x = build(MixtureOfTokens(group_size=2)).eval(), torch.randn(4, 6, D)
    moved = x.clone()
    moved[2, 3] += 1.0
    changed = (layer(x) - layer(moved)).abs().amax(-1) > 1e-5
    # Sequences 0 and 2 are a group, 1 and 3 the other.
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[[0, 2], 3] = True
    assert torch.equal(changed, expected)
    router = layer.router.config
    assert router.is_causal
    assert not router.decodes_stepwise
    layer = build(MixtureOfTokens(group_size=3))
    shares = layer.router(torch.randn(5, 6, D), RoutingContext(valid_BS=VALID)).dispatch_GSEP.squeeze(-1)
    assert not shares[~VALID].any()
    for members in ([0, 2, 4], [1, 3]):
        real_S = VALID[members].any(0)
        torch.testing.assert_close(shares[members].sum(0)[real_S], torch.ones(int(real_S.sum()), E))


def test_a_token_alone_takes_every_expert_with_share_one_and_weights_are_those_of_a_token_choice_layer():
    layer, every = build(MixtureOfTokens(group_size=32)).eval(), build(core.Dense()).eval()
    with torch.no_grad():
        every.router.gate.weight.zero_()  # a mean of all experts
    every.experts.load_state_dict(layer.experts.state_dict())
    x = torch.randn(1, 6, D)
    torch.testing.assert_close(layer(x), E * every(x))
    mixed, sparse = build(MixtureOfTokens()), build(TokenChoice(1, normalize=False))
    with torch.no_grad():
        mixed.router.gate.weight.neg_()
    sparse.load_state_dict(mixed.state_dict())
    x = torch.randn(1, 6, D)
    expected = (x.flatten(0, 1) @ mixed.router.gate.weight.T).argmax(-1)
    assert torch.equal(sparse.router(x).expert_ids_N, expected)


def test_the_temperature_falls_to_one_token_a_group():
    # At 2, then 2 (1e-6 / 2)^(1/2), then 1e-6: the last makes each expert take the token it likes best.
    layer = build(MixtureOfTokens(group_size=4, tau_start=2.0, tau_end=1e-6, anneal_steps=2))
    x, temperatures = torch.randn(4, 6, D), []
    for _ in range(4):
        temperatures.append(float(layer.router.temperature))
        with record(layer) as tape:
            layer(x)
        core.update_expert_bias(layer, tape)
    assert temperatures == pytest.approx([2.0, (2 * 1e-6) ** 0.5, 1e-6, 1e-6])
    shares = tape.entries[0].routing.dispatch_GSEP.squeeze(-1)
    best = (x @ layer.router.gate.weight.T).argmax(0)
    torch.testing.assert_close(shares, torch.nn.functional.one_hot(best, 4).permute(2, 0, 1).float())
    layer.router.reset_parameters()
    assert float(layer.router.temperature) == 2.0


def test_costs_are_those_of_full_groups():
    moe = MoEConfig(E, MixtureOfTokens(group_size=2), FFN(6))
    # A gate of 2 * 8 * 4, sums of 2 * 4 * 8 into mixed tokens and back, and 4 / 2 experts of 2 * 2 * 8 * 6.
    assert moe.flops_per_token(D) == 64 + 2 * 64 + 2 * 192
    assert core.count_flops(moe.build(D), torch.randn(4, 3, D)) == 12 * moe.flops_per_token(D)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureOfTokens(tau_start=0.5), r"^tau_end=1.0 is above tau_start=0.5: the temperature has to fall"),
        (lambda: MoEConfig(E, MixtureOfTokens(), group="sequence"), r"^group='sequence' is another group than that of"),
        (lambda: MoEConfig(E, MixtureOfTokens(), group=4), r"^group=4 .*: set its group_size"),
        (lambda: MoEConfig(E, MixtureOfTokens(), capacity_factor=1.0), r"^capacity_factor=1.0 does not apply to"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
