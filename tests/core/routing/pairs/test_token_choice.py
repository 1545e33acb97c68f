"""Token choice on typed logits: the gate's weight is the identity, so a token is its own logits."""

import math

import pytest
import torch
from routed import built, ids, logits_of
from torch import Tensor

from core import FFN, Choice, MoEConfig, PairRouter, RouterConfig, Routing, RoutingContext, TokenChoice, Tokens
from core.routing.gates import LinearGate, NoisyGate
from core.routing.pairs.token_choice import TokenChoiceRouter
from core.routing.selection import Capacity


def router(num_experts: int, limit: Capacity = Capacity(), training: bool = False, **options) -> TokenChoiceRouter:
    """A router of ``D = E`` whose logits are its input."""
    return built(TokenChoice(**options), num_experts, training, limit=limit)


def logit(*probabilities: float) -> Tensor:
    """(1, 1, E) logits whose sigmoid is ``probabilities``."""
    return torch.tensor(probabilities).logit()[None, None]


def gates(routing: Routing) -> list[float]:
    return routing.gates_N.tolist()


def test_normalized_gates_are_the_softmax_of_the_chosen_logits_scaled():
    routing = router(3, top_k=2)(logits_of((0.3, 0.5, 0.2)))
    assert ids(routing) == [[1, 0]]
    assert gates(routing) == pytest.approx([5 / 8, 3 / 8])  # 0.5 / 0.8 and 0.3 / 0.8
    assert routing.evidence.scores_TE[0].tolist() == pytest.approx([0.3, 0.5, 0.2])
    # Not normalized: the scores over all experts. It is off by default for one expert and on for more.
    x = logits_of((0.3, 0.5, 0.2))
    assert gates(router(3, top_k=2, normalize=False)(x)) == pytest.approx([0.5, 0.3])
    assert gates(router(3, top_k=1)(x)) == pytest.approx([0.5])
    assert sum(gates(router(3, top_k=3)(x))) == pytest.approx(1.0)
    x = logit(0.75, 0.25, 0.5)
    assert gates(router(3, score_func="sigmoid")(x)) == pytest.approx([0.6, 0.4])  # 0.75 / 1.25 and 0.5 / 1.25
    assert gates(router(3, score_func="sigmoid", normalize=False)(x)) == pytest.approx([0.75, 0.5])
    assert gates(router(3, score_func="sigmoid", scale=2.5)(x)) == pytest.approx([1.5, 1.0])
    # Probabilities 0.4 and 0.3 of the chosen: over 0.5, their Euclidean norm. Over 0.7, their sum.
    x = logits_of((0.3, 0.4, 0.2, 0.1))
    assert gates(router(4, top_k=2, norm_order=2.0)(x)) == pytest.approx([0.8, 0.6])
    assert gates(router(4, top_k=2, norm_order=2.0, scale=3.0)(x)) == pytest.approx([2.4, 1.8])
    assert gates(router(4, top_k=2, norm_order=1.0)(x)) == pytest.approx([4 / 7, 3 / 7])


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_a_router_of_one_expert_a_token_gets_a_gradient(score_func):
    built = router(3, top_k=1, score_func=score_func)
    built(logits_of((0.3, 0.5, 0.2))).gates_N.sum().backward()
    # d gate / d logit is s (1 - s) = 0.25 at s = 0.5, times the input log 0.5 of that expert.
    # Sigmoid of log 0.5 is 1/3, so s (1 - s) = 2/9.
    slope = 0.25 if score_func == "softmax" else 2 / 9
    assert built.gate.weight.grad[1, 1].item() == pytest.approx(slope * math.log(0.5))


def test_expert_bias_changes_the_choice_and_never_the_gates():
    built, x = router(3, top_k=2, expert_bias=True), logits_of((0.5, 0.3, 0.2))
    assert ids(built(x)) == [[0, 1]]
    built.expert_bias = torch.tensor([0.0, 0.0, 1.0])  # 0.5, 0.3, 1.2
    biased = built(x)
    assert ids(biased) == [[2, 0]]
    assert gates(biased) == pytest.approx([2 / 7, 5 / 7])  # 0.2 / 0.7 and 0.5 / 0.7
    assert biased.evidence.scores_TE[0].tolist() == pytest.approx([0.5, 0.3, 0.2])
    # A bias of zero is none.
    x = torch.randn(2, 10, 6)
    plain, biased = router(6)(x), router(6, expert_bias=True)(x)
    assert torch.equal(plain.expert_ids_N, biased.expert_ids_N)
    assert torch.equal(plain.gates_N, biased.gates_N)


def test_groups_are_ranked_by_their_two_best_experts_or_by_the_best_alone():
    # Group 0 holds the best expert (0.9 + 0.1 = 1.0), group 1 the best pair (0.6 + 0.55 = 1.15): DeepSeek-V2 and V3.
    x = logit(0.9, 0.1, 0.55, 0.6)
    options = {"score_func": "sigmoid", "num_groups": 2, "limited_groups": 1}
    assert ids(router(4, top_k=1, **options)(x)) == [[3]]
    best = router(4, top_k=2, group_score="max", normalize=False, **options)(x)
    assert (ids(best), gates(best)) == ([[0, 1]], pytest.approx([0.9, 0.1]))
    assert ids(router(4, top_k=2, group_score="top2", **options)(x)) == [[3, 2]]
    # A group of one is ranked by it.
    one = router(3, top_k=1, score_func="sigmoid", num_groups=3, limited_groups=1)
    assert ids(one(logit(0.2, 0.9, 0.5))) == [[1]]
    # Every token stays within its groups: 3 experts from exactly 2 groups of 2.
    built = router(8, top_k=3, score_func="sigmoid", num_groups=4, limited_groups=2)
    chosen = torch.tensor(ids(built(torch.randn(1, 200, 8)))) // 2
    assert all(len(set(row)) == 2 for row in chosen.tolist())
    # Biased scores 0.75 - 2, 0.5 - 2 in group 0 and lower ones in group 1: all negative. A mask of 0 in place of -inf
    # would choose from group 1.
    built = router(4, top_k=2, score_func="sigmoid", num_groups=2, limited_groups=1, expert_bias=True)
    built.expert_bias = torch.full((4,), -2.0)
    routing = built(logit(0.75, 0.5, 0.25, 0.1))
    assert (ids(routing), gates(routing)) == ([[0, 1]], pytest.approx([0.6, 0.4]))


@pytest.mark.parametrize("noise", [None, "learned"])
def test_gate_bias_is_added_to_the_logits_and_learned(noise):
    built = router(3, top_k=2, gate_bias=True, noise=noise)
    assert built.gate.bias.tolist() == [0.0] * 3
    built.gate.bias.data.copy_(torch.tensor([1.0, 1.0, 6.0]).log())
    routing = built(logits_of((0.3, 0.5, 0.2)))
    assert ids(routing) == [[2, 1]]  # 0.3, 0.5 and 6 * 0.2 = 1.2
    assert gates(routing) == pytest.approx([1.2 / 1.7, 0.5 / 1.7])
    assert routing.evidence.scores_TE[0].tolist() == pytest.approx(
        [0.15, 0.25, 0.6]
    )  # over 2: unlike expert_bias, it shows
    routing.gates_N[0].backward()
    slope = 1.2 / 1.7 * 0.5 / 1.7  # of a softmax of two
    assert built.gate.bias.grad.tolist() == pytest.approx([0.0, -slope, slope])


def input_gated(gates_on: str, **options):
    """A layer of two experts on typed logits; expert 0 is ``relu(x_0 - 1/2)`` and 1."""
    layer = MoEConfig(
        2, TokenChoice(top_k=1, score_func="sigmoid", gates_on=gates_on), FFN(1, "relu", bias=True), **options
    ).build(2)
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.eye(2))
        layer.experts.w_in[0] = torch.tensor([[1.0], [0.0]])
        layer.experts.b_in[0] = -0.5
        layer.experts.w_out[0] = torch.tensor([[1.0, 0.0]])
        layer.experts.b_out[0] = torch.tensor([0.0, 1.0])
    return layer


def test_gates_may_scale_the_input_of_the_experts_in_place_of_their_output():
    x = logit(0.75, 0.25)  # log 3 and -log 3
    # 0.75 * (1.098612 - 0.5) and 0.75 * 1 ...
    assert input_gated("output")(x).flatten().tolist() == pytest.approx([0.448959, 0.75])
    # ... against 0.75 * 1.098612 - 0.5 and 1.
    assert input_gated("input")(x).flatten().tolist() == pytest.approx([0.323959, 1.0])


@pytest.mark.parametrize("backend", ["eager", "cpu", "grouped"])
def test_gates_on_the_input_are_those_of_the_formula_in_every_gradient(backend):
    router_ = TokenChoice(top_k=2, gates_on="input")
    layer = MoEConfig(4, router_, FFN(8, "silu"), backend=backend, capacity_factor=0.75).build(8)
    x, valid = torch.randn(2, 6, 8), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    ours = x.masked_fill(~valid[..., None], torch.nan).requires_grad_()
    context = RoutingContext(valid_BS=valid)
    y = layer(ours, context)
    y.square().sum().backward()
    grads = [ours.grad, *(p.grad.clone() for p in layer.parameters())]

    layer.zero_grad()
    theirs = x.clone().requires_grad_()
    routing = layer.router(theirs, context)
    assert int((routing.expert_ids_N == 4).sum()) > 4  # two tokens of padding, and some that found their expert full
    expected = torch.zeros(12, 8)
    for n, (t, e) in enumerate(zip(routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), strict=True)):
        if e < 4:
            x_D = routing.gates_N[n] * theirs.flatten(0, 1)[t]
            y_D = torch.nn.functional.silu(x_D @ layer.experts.w_in[e]) @ layer.experts.w_out[e]
            expected = expected.index_add(0, torch.tensor([t]), y_D[None])
    torch.testing.assert_close(y.flatten(0, 1), expected)
    expected.square().sum().backward()
    for ours_, theirs_ in zip(grads, [theirs.grad, *(p.grad for p in layer.parameters())], strict=True):
        torch.testing.assert_close(ours_, theirs_)


def test_jitter_scales_the_input_within_its_bounds_in_training_alone():
    x = torch.eye(4).repeat(64, 1)[None]  # one-hot tokens: each logit sees the jitter of one entry
    built = router(4, top_k=1, jitter_eps=0.1, training=True)
    drawn = [built(x).evidence.logits_TE for _ in range(4)]
    on = torch.cat([drawn[t][t, t % 4][None] for t in range(3)] + [drawn[3].max(-1).values])
    assert 0.9 <= on.min() < 0.95
    assert 1.05 < on.max() <= 1.1
    built.eval()
    assert torch.equal(built(x).evidence.logits_TE, x[0])


def test_fixed_noise_has_standard_deviation_noise_std_over_e():
    # Two experts 0.5 apart, noise of 1 / 2 each: the worse one wins with probability
    # Phi(-0.5 / (0.5 * sqrt(2))) = Phi(-0.70711) = 0.239750; 4 sigma of 20000 draws is 0.0121.
    x = torch.tensor([0.5, 0.0]).expand(1, 20_000, 2)
    routing = router(2, top_k=1, noise="fixed", noise_std=1.0, training=True)(x)
    assert (routing.expert_ids_N == 1).double().mean().item() == pytest.approx(0.239750, abs=0.0121)
    assert routing.evidence.noise_std == 0.5
    # The losses see the logits without noise.
    assert torch.equal(routing.evidence.logits_TE, x[0])
    assert torch.equal(routing.evidence.scores_TE, x[0].softmax(-1))


def test_learned_noise_has_standard_deviation_softplus():
    built = router(2, top_k=1, noise="learned", training=True)
    x = torch.tensor([0.5, 0.0]).expand(1, 20_000, 2)
    # At the start softplus(0) = 0.693147 for each: Phi(-0.5 / (0.693147 * sqrt(2))) = Phi(-0.510074) = 0.305000.
    routing = built(x)
    assert routing.evidence.noise_std[0].tolist() == pytest.approx([math.log(2)] * 2)
    assert (routing.expert_ids_N == 1).double().mean().item() == pytest.approx(0.3050, abs=0.0131)
    # Typed weights: softplus(0.5 * 2) = log(1 + e) = 1.313262 for expert 0, softplus(0.5 * -4) = 0.126928 for 1.
    built.gate.noise_weight.data.copy_(torch.tensor([[2.0, 0.0], [-4.0, 0.0]]))
    assert built(x).evidence.noise_std[0].tolist() == pytest.approx([1.313262, 0.126928], abs=1e-6)
    built(torch.randn(1, 20, 2)).gates_N.square().sum().backward()
    assert built.gate.noise_weight.grad.abs().max() > 0
    # A new gate has the same noise on every expert.
    assert NoisyGate(4, 3).noise_std(torch.randn(5, 4)).tolist() == [[pytest.approx(math.log(2))] * 3] * 5


@pytest.mark.parametrize("noise", ["fixed", "learned"])
def test_noise_is_off_in_evaluation(noise):
    x, noisy, plain = torch.zeros(1, 50, 4), router(4, noise=noise), router(4)
    assert torch.equal(noisy(x).gates_N, plain(x).gates_N)
    assert noisy(x).evidence.noise_std is None
    assert noisy(x).evidence.threshold_TE is None
    assert torch.equal(noisy(x).expert_ids_N, noisy(x).expert_ids_N)
    noisy.train()
    assert not torch.equal(noisy(x).expert_ids_N, noisy(x).expert_ids_N)


def test_random_second_stays_with_twice_the_probability_of_its_gate():
    built = router(2, second_expert_policy="random", training=True)
    routing = built(torch.zeros(1, 2000, 2))  # at a gate of one half always
    assert (gates(routing), routing.tokens_per_expert_E.tolist()) == ([0.5] * 4000, [2000, 2000])
    x = logits_of((0.85, 0.15)).expand(1, 10_000, 2)
    assert built.eval()(x).tokens_per_expert_E.tolist() == [10_000, 10_000]
    # Gates 0.85 and 0.15 before the scale: kept with probability 0.3; 4 sigma of 10000 draws is 0.0183.
    for scale in (1.0, 0.5, 2.5):
        routing = router(2, second_expert_policy="random", scale=scale, training=True)(x)
        assert routing.tokens_per_expert_E[0] == 10_000
        assert routing.tokens_per_expert_E[1] / 10_000 == pytest.approx(0.3, abs=0.0183)
        left_out = routing.expert_ids_N[1::2] == 2
        first, second = routing.gates_N[::2], routing.gates_N[1::2]
        assert first.tolist() == pytest.approx([0.85 * scale] * 10_000)  # not renormalized without the second
        assert second[left_out].abs().max() == 0
        assert second[~left_out].tolist() == pytest.approx([0.15 * scale] * int((~left_out).sum()))


def test_choices_of_a_token_are_distinct_and_best_first_and_a_gate_starts_truncated():
    routing = router(6, top_k=3)(torch.randn(1, 50, 6))
    expected = routing.evidence.logits_TE.argsort(-1, descending=True)[:, :3]
    assert ids(routing) == expected.tolist()
    gate = LinearGate(64, 500, init_scale=0.16)  # std 0.4 / 8 = 0.05
    assert gate.weight.abs().max() <= 0.1
    # A normal cut at two sigma keeps 0.8796 of its standard deviation: 0.04398; 32000 draws are within 1 %.
    assert gate.weight.std().item() == pytest.approx(0.04398, rel=0.01)


def test_a_gate_that_chooses_an_expert_that_is_not_there_is_told():
    class Lost(PairRouter):
        def choose(self, tokens: Tokens) -> Choice:
            ids_T1 = torch.full((tokens.x_TD.shape[0], 1), self.chosen)
            return Choice(ids_T1, torch.ones(ids_T1.shape))

    lost = Lost(6, 4, RouterConfig(), Capacity())
    for lost.chosen in (-1, 5):
        message = rf"a gate chose expert {lost.chosen}, which is not in range\(4\) or 4 for an empty"
        with pytest.raises(ValueError, match=message):
            lost(torch.randn(1, 3, 6))


# Settings of published models.


def test_the_score_of_deepseek_v4_is_the_root_of_a_softplus():
    # log(1 + e^l) of l = log(e^4 - 1), log(e - 1) and log(e^0.25 - 1): 4, 1, 1/4; their roots 2, 1, 1/2.
    x = torch.tensor([[[math.log(math.exp(p) - 1) for p in (4.0, 1.0, 0.25)]]])
    routing = router(3, top_k=2, score_func="sqrt_softplus", scale=1.5)(x)
    assert routing.evidence.scores_TE[0].tolist() == pytest.approx([2, 1, 0.5])
    assert gates(routing) == pytest.approx([1.0, 0.5])  # 1.5 * 2/3 and 1.5 * 1/3
    assert gates(router(3, top_k=2, score_func="sqrt_softplus", normalize=False)(x)) == pytest.approx([2, 1])
    # Its gradient is finite where it is nothing.
    x = torch.tensor([[[-200.0, -1e4, 90.0]]], requires_grad=True)
    router(3, top_k=3, score_func="sqrt_softplus", normalize=False)(x).gates_N.sum().backward()
    assert x.grad.isfinite().all()
    # d sqrt(l) / dl = 1 / (2 sqrt(90)) where the softplus is the identity.
    assert x.grad[0, 0, 2].item() == pytest.approx(0.5 / math.sqrt(90))


def test_the_gate_of_gemma_4_reads_a_normalized_token_and_scales_each_experts_gate():
    config = TokenChoice(2, input_norm=True, expert_scale=True)
    built = config.build(4, 4)
    with torch.no_grad():
        built.gate.weight.copy_(torch.eye(4))
        built.gate.input_scale.copy_(torch.tensor([2.0, 1.0, 1.0, 1.0]))
        built.expert_scale.copy_(torch.tensor([0.5, 1.0, 3.0, 1.0]))
    # rms of (2, 0, 2, 2 sqrt 2) = sqrt(16 / 4) = 2: (1, 0, 1, sqrt 2), times s / sqrt(4): (1, 0, 1/2, 0.7071).
    routing = built(torch.tensor([[[2.0, 0.0, 2.0, 2 * math.sqrt(2)]]]))
    assert routing.evidence.logits_TE[0].tolist() == pytest.approx([1, 0, 0.5, 0.70711], abs=1e-5)
    assert ids(routing) == [[0, 3]]
    # Softmax of 1 and 0.70711: 0.57272 and 0.42728; times 1/2 and 1.
    assert gates(routing) == pytest.approx([0.28636, 0.42728], abs=1e-4)
    assert config.num_params(4, 4) == 16 + 4 + 4
    longer = built(torch.tensor([[[20.0, 0.0, 20.0, 20 * math.sqrt(2)]]]))
    assert gates(longer) == pytest.approx(gates(routing), abs=1e-5)
    # A new one has logits as large as those of a linear gate.
    x = torch.randn(1, 500, 256)
    plain, normed = (TokenChoice(2, input_norm=norm).build(256, 16)(x).evidence.logits_TE for norm in (False, True))
    assert normed.std().item() == pytest.approx(plain.std().item(), rel=0.1)


def test_kept_gates_sum_to_one_over_the_experts_that_capacity_left():
    x = logits_of((0.6, 0.3, 0.1), (0.5, 0.2, 0.3))
    routing = router(3, Capacity(factor=0.75), top_k=2, normalize="kept")(x)
    # ceil(0.75 * 2 * 2 / 3) = 1. Token 1 lost expert 0 and keeps expert 2: 0.3 / 0.3. Token 0: 0.6 / 0.9, 0.3 / 0.9.
    assert (ids(routing), gates(routing)) == ([[0, 1], [3, 2]], pytest.approx([2 / 3, 1 / 3, 0, 1]))
    before = router(3, Capacity(factor=0.75), top_k=2)(x)
    assert gates(before) == pytest.approx([2 / 3, 1 / 3, 0, 3 / 8])  # 0.3 / 0.8
    # Without a capacity the two are equal, and ``scale`` comes last.
    assert gates(router(3, top_k=2, normalize="kept", scale=0.8)(x)) == pytest.approx([8 / 15, 4 / 15, 0.5, 0.3])
    x = logits_of((0.6, 0.4), (0.6, 0.4)).requires_grad_()
    routing = router(2, Capacity(factor=0.5), top_k=2, normalize="kept")(x)
    assert (ids(routing), gates(routing)) == ([[0, 1], [2, 2]], pytest.approx([0.6, 0.4, 0, 0]))
    routing.gates_N.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[0, 1].abs().max() == 0


def test_unit_gates_are_one_and_have_the_gradient_of_the_score():
    x, built = logits_of((0.3, 0.5, 0.2)), router(3, top_k=1, normalize="unit")
    routing = built(x)
    assert (ids(routing), gates(routing)) == ([[1]], [1.0])
    routing.gates_N.sum().backward()
    # As for Switch: d gate / d logit is s (1 - s) = 0.25 at s = 0.5, times the input log 0.5 of that expert.
    assert built.gate.weight.grad[1, 1].item() == pytest.approx(0.25 * math.log(0.5))
    assert gates(router(3, top_k=2, normalize="unit", scale=0.5)(x)) == [0.5, 0.5]
