"""Balance losses to six digits by hand, and what may and may not enter them."""

import math
from dataclasses import replace

import pytest
import torch
from routed import built, logits_of, terms_of
from torch import Tensor

import core
from core import Balance, Capacity, Entry, Evidence, MoEConfig, Routing, Tape, TokenChoice, aux_loss, aux_losses
from core.routing.balance.balance import expert_bias_step
from core.routing.balance.losses import load_balancing_loss, mean_over, smooth_load, squared_cv
from core.routing.balance.terms import TERMS, balance_sums, balance_terms

ALL = frozenset(TERMS) - {"localized"}  # which needs the types of experts and sequences
SCORES = [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1]]  # summed over tokens: 1.3, 1.1, 0.6


def routing(
    scores: list[list[float]] | Tensor,
    chosen: list[int],
    *,
    valid: list[bool] | None = None,
    threshold: Tensor | None = None,
    noise_std: float | Tensor | None = None,
) -> Routing:
    """A decision with typed softmax scores; its logits are their logarithms."""
    scores_TE, none = torch.as_tensor(scores), torch.zeros(0, dtype=torch.int64)
    return Routing(
        token_index_N=none,
        expert_ids_N=none,
        gates_N=torch.zeros(0),
        tokens_per_expert_E=torch.tensor(chosen),
        chosen_per_expert_E=torch.tensor(chosen),
        num_tokens=len(scores_TE),
        valid_T=None if valid is None else torch.tensor(valid),
        evidence=Evidence(scores_TE, scores_TE.log(), noise_std, threshold),
    )


def tape_of(*routings: Routing, balance: Balance, terms: frozenset[str] = ALL) -> Tape:
    return Tape(tuple(Entry(f"layer{i}", r, None, balance, terms) for i, r in enumerate(routings)))


def test_every_term_has_its_weight_and_an_expert_below_the_mean_load_rises():
    assert Balance().weights().keys() == TERMS.keys()
    # Loads 4, 2, 0 around the mean 2.
    assert expert_bias_step(torch.tensor([4, 2, 0]), 0.1).tolist() == pytest.approx([-0.1, 0.0, 0.1])


def test_load_balancing_and_importance_loss_by_hand():
    # Shares of the pairs 2/3, 1/3, 0; mean scores 1.3/3, 1.1/3, 0.6/3.
    # 3 * (2/3 * 1.3/3 + 1/3 * 1.1/3) = 2/3 * 1.3 + 1/3 * 1.1 = 1.233333, as with twice the pairs in the same shares.
    for chosen in ([2, 1, 0], [4, 2, 0]):
        loss = load_balancing_loss(torch.tensor([1.3, 1.1, 0.6]), torch.tensor(chosen), 3)
        assert loss.item() == pytest.approx(1.233333, abs=1e-6)
    # At balance it is 1, and E where one expert takes all.
    assert load_balancing_loss(torch.full((4,), 2.5), torch.tensor([5] * 4), 10).item() == pytest.approx(1, abs=1e-6)
    one = load_balancing_loss(torch.tensor([10.0, 0, 0, 0]), torch.tensor([10, 0, 0, 0]), 10)
    assert one.item() == pytest.approx(4.0, abs=1e-6)
    # Mean 1.0; variance (0.3^2 + 0.1^2 + 0.4^2) / 3 = 0.26 / 3. Mean 2.5; variance (7.5^2 + 3 * 2.5^2) / 4 = 18.75.
    for importance, expected in (([1.3, 1.1, 0.6], 0.086667), ([2.5] * 4, 0.0), ([10.0, 0.0, 0.0, 0.0], 3.0)):
        assert squared_cv(torch.tensor(importance)).item() == pytest.approx(expected, abs=1e-6)


def test_importance_is_of_the_scores_of_all_experts_as_in_v_moe_and_gate_importance_of_the_gates_computed():
    # Scores (0.5, 0.3, 0.2) and (0.2, 0.3, 0.5) sum to 0.7, 0.6, 0.7: mean 2/3, variance (2 / 900 + 4 / 900) / 3 =
    # 0.002222, over 4/9: 0.005. Shazeer's gates of the chosen, 0.5, 0, 0.5, have 0.5.
    routing = built(TokenChoice(1), 3)(logits_of((0.5, 0.3, 0.2), (0.2, 0.3, 0.5)))
    # Mean 1/3, variance (2 / 36 + 1 / 9) / 3 = 1/18, over 1/9.
    terms = terms_of(routing, "importance", "gate_importance")
    assert terms == pytest.approx({"importance": 0.005, "gate_importance": 0.5})
    # Gates 5/8 and 3/8 of experts 0 and 1; 5/8 and 3/8 of 2 and 1: sums 5/8, 6/8, 5/8. Mean 2/3, variance
    # (2 * (1/24)^2 + (1/12)^2) / 3 = (2 + 4) / 576 / 3 = 1/288, over 4/9: 1/128.
    x = logits_of((0.5, 0.3, 0.2), (0.2, 0.3, 0.5))
    assert terms_of(built(TokenChoice(2), 3)(x), "gate_importance")["gate_importance"] == pytest.approx(1 / 128)
    # ceil(0.5 * 2 * 2 / 3) = 1: the second token loses expert 1. 5/8, 3/8, 5/8: mean 13/24, variance 1/72.
    full = built(TokenChoice(2), 3, limit=Capacity(factor=0.5))(x)
    assert terms_of(full, "gate_importance")["gate_importance"] == pytest.approx((1 / 72) / (13 / 24) ** 2)


def test_first_choice_counts_the_best_expert_of_each_token_alone():
    # Scores sum to 0.95, 0.7, 0.35. All pairs, K = 2: shares 2/4, 2/4, 0: 3 * (0.95 + 0.7) / 2 / 2 = 1.2375. First
    # choices: 1/2, 1/2, 0, the same. With the second token the other way round: 2/2 of expert 0 alone.
    one = built(TokenChoice(2), 3)(logits_of((0.6, 0.25, 0.15), (0.35, 0.45, 0.2)))
    other = built(TokenChoice(2), 3)(logits_of((0.6, 0.25, 0.15), (0.45, 0.35, 0.2)))
    names = ("load_balancing_loss", "first_choice")
    assert terms_of(one, *names) == pytest.approx({"load_balancing_loss": 3 * 1.65 / 4, "first_choice": 3 * 1.65 / 4})
    # 3 * 1.05 / 2 of the sums 1.05, 0.6, 0.35.
    assert terms_of(other, *names) == pytest.approx({"load_balancing_loss": 3 * 1.65 / 4, "first_choice": 3 * 1.05 / 2})
    # For K = 1 they are one.
    single = terms_of(built(TokenChoice(1), 3)(logits_of((0.6, 0.25, 0.15), (0.35, 0.45, 0.2))), *names)
    assert single["first_choice"] == pytest.approx(single["load_balancing_loss"])


def test_router_z_loss_and_load_loss_by_hand():
    # Logits (0, 0) and (log 3, 0): logsumexp log 2 and log 4; (0.480453 + 1.921812) / 2.
    squares = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]).logsumexp(-1).square().sum()
    assert mean_over(squares, 2).item() == pytest.approx(1.201133, abs=1e-6)
    # Logits 1 and 0 had to reach 0.8 under noise of 0.5: Phi(0.4) = 0.655422 and Phi(-1.6) = 0.054799.
    # Mean 0.3551105, both 0.3003112 away: (0.3003112 / 0.3551105)^2 = 0.715181.
    load = smooth_load(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8]]), 0.5)
    assert load[0].tolist() == pytest.approx([0.655422, 0.054799], abs=1e-6)
    assert squared_cv(load.sum(0)).item() == pytest.approx(0.715181, abs=1e-6)


def test_terms_of_a_routing_by_hand_have_no_padding():
    padded = routing([*SCORES, [0.98, 0.01, 0.01]], [2, 1, 0], valid=[True, True, True, False])
    for decided in (routing(SCORES, [2, 1, 0]), padded):
        terms = balance_terms(balance_sums(decided, ALL), ALL)
        assert terms["load_balancing_loss"].item() == pytest.approx(1.233333, abs=1e-6)
        assert terms["importance"].item() == pytest.approx(0.086667, abs=1e-6)
        assert terms["router_z_loss"].item() == pytest.approx(0.0, abs=1e-6)  # logsumexp(log p) = log 1
        assert "load" not in terms  # no noise
    x = logits_of((0.5, 0.3, 0.2), (0.2, 0.3, 0.5))
    router, names = built(TokenChoice(2), 3), ("first_choice", "gate_importance")
    valid = core.RoutingContext(valid_BS=torch.tensor([[True, True, False, False]]))
    padded = router(torch.cat((x, torch.full((1, 2, 3), torch.nan)), 1), valid)
    assert terms_of(padded, *names) == pytest.approx(terms_of(router(x), *names))


def test_sigmoid_scores_count_by_their_share():
    # (0.8, 0.4) and (0.1, 0.3) count as (2/3, 1/3) and (1/4, 3/4): sums 11/12 and 13/12.
    # importance: mean 1, both 1/12 away: 1/144. Lowering every score changes nothing.
    for factor in (1.0, 0.01):
        scores = factor * torch.tensor([[0.8, 0.4], [0.1, 0.3]])
        terms = balance_terms(balance_sums(routing(scores, [1, 1]), ALL), ALL)
        assert terms["importance"].item() == pytest.approx(1 / 144, abs=1e-6)
        assert terms["load_balancing_loss"].item() == pytest.approx(1.0, abs=1e-6)


def kth_of_the_others(noisy: Tensor, k: int) -> Tensor:
    """Shazeer's kth_excluding, by brute force."""
    T, E = noisy.shape
    rows = [
        [noisy[t, [j for j in range(E) if j != e]].sort(descending=True).values[k - 1] for e in range(E)]
        for t in range(T)
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("noise", ["fixed", "learned"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_smooth_load_is_the_probability_of_a_choice_under_fresh_noise(noise, top_k):
    T, E = 3, 4
    router = TokenChoice(top_k=top_k, normalize=False, noise=noise, noise_std=2.0).build(5, E).train()
    torch.nn.init.normal_(router.gate.weight)
    if noise == "learned":
        torch.nn.init.normal_(router.gate.noise_weight)
    x = torch.randn(1, T, 5)
    torch.manual_seed(11)
    decided = router(x)
    torch.manual_seed(11)
    std = decided.evidence.noise_std if noise == "learned" else torch.full((T, E), 0.5)  # 2.0 / 4
    noisy = (decided.evidence.logits_TE + torch.randn(T, E) * std).detach()
    if noise == "fixed":  # V-MoE: what the chosen had to reach, the k-th largest of all
        threshold = noisy.topk(top_k, dim=-1).values[:, -1:].expand(T, E)
    else:  # Shazeer: the k-th largest of the others
        threshold = kth_of_the_others(noisy, top_k)
    # Monte Carlo: 100000 draws of fresh noise; 5 sigma is 5 * 0.5 / sqrt(1e5) = 0.0079.
    fresh = decided.evidence.logits_TE + torch.randn(100_000, T, E) * std
    sampled = (fresh > threshold).double().mean(0)
    load = smooth_load(decided.evidence.logits_TE, decided.evidence.threshold_TE, decided.evidence.noise_std)
    assert (load - sampled).abs().max() < 0.0079
    assert sampled.std() > 0.1


def test_a_load_loss_trains_the_noise_and_is_finite_for_a_choice_of_all_and_for_almost_no_noise():
    router = TokenChoice(top_k=2, noise="learned").build(3, 2).train()
    decided = router(torch.randn(1, 5, 3))
    losses = aux_losses(tape_of(decided, balance=Balance(load_balancing_loss=0, router_z_loss=0, load=1.0)))
    assert losses.total.item() == 0.0  # both experts are always chosen: loads 5 and 5
    losses.total.backward()
    for parameter in router.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    balance = Balance(load_balancing_loss=0, router_z_loss=0, load=1.0)
    router = TokenChoice(top_k=1, noise="learned").build(3, 4).train()
    aux_loss(tape_of(router(torch.randn(1, 50, 3)), balance=balance)).backward()
    assert router.gate.noise_weight.grad.abs().max() > 0
    assert router.gate.weight.grad.abs().max() > 0
    torch.nn.init.constant_(router.gate.noise_weight, -100.0)  # softplus(-300) is 0 in float32
    loss = aux_loss(tape_of(router(torch.ones(1, 5, 3)), balance=balance))
    assert loss.item() == pytest.approx(3.0)  # as without noise: one of four experts takes all
    loss.backward()
    assert all(p.grad.isfinite().all() for p in router.parameters())


def test_aux_loss_is_the_weighted_sum_and_terms_are_unweighted_means_over_passes_of_each_layers_own_balance():
    even, skewed = [[0.25, 0.25, 0.25, 0.25]] * 4, [[0.7, 0.1, 0.1, 0.1]] * 4
    # load balancing: 1 and 4 * 0.7 = 2.8; importance: 0 and, of sums 2.8, 0.4, 0.4, 0.4 with mean 1,
    # (1.8^2 + 3 * 0.6^2) / 4 = 1.08.
    balance = Balance(load_balancing_loss=0.1, router_z_loss=0, importance=0.01)
    losses = aux_losses(tape_of(routing(even, [1, 1, 1, 1]), routing(skewed, [4, 0, 0, 0]), balance=balance))
    assert losses.total.item() == pytest.approx(0.1 * 3.8 + 0.01 * 1.08, abs=1e-6)
    assert {k: v.item() for k, v in losses.terms.items()} == pytest.approx(
        {"load_balancing_loss": 1.9, "importance": 0.54}, abs=1e-6
    )
    skewed = routing([[0.7, 0.3]] * 2, [2, 0])  # load balancing 2 * 0.7 = 1.4
    entries = [
        Entry(name, skewed, None, Balance(load_balancing_loss=weight, router_z_loss=0), ALL)
        for name, weight in (("a", 0.5), ("b", 0.0), ("c", 2.0))
    ]
    losses = aux_losses(Tape(tuple(entries)))
    assert losses.total.item() == pytest.approx(2.5 * 1.4, abs=1e-6)
    assert losses.terms["load_balancing_loss"].item() == pytest.approx(1.4, abs=1e-6)  # of the two that want it


@pytest.mark.parametrize("weights", [{"load_balancing_loss": 0.1}, {"importance": 0.1}])
def test_a_term_of_weight_zero_cannot_bring_nan_in(weights):
    logits = torch.tensor([[0.2, -0.4], [0.1, 0.3]], requires_grad=True)
    decided = routing(SCORES, [1, 1])
    # logsumexp of a row with inf is inf, and its square's gradient NaN: router_z_loss must not be in the graph.
    decided = replace(decided, evidence=Evidence(logits.softmax(-1), logits * torch.tensor([torch.inf, 1.0])))
    balance = Balance(**{"load_balancing_loss": 0.0, "router_z_loss": 0.0, **weights})
    losses = aux_losses(tape_of(decided, balance=balance))
    losses.total.backward()
    assert losses.terms.keys() == weights.keys()
    assert losses.total.isfinite()
    assert logits.grad.isfinite().all()
    # The same tape with the term on is not finite: the case is a real one.
    assert not aux_losses(tape_of(decided, balance=Balance(router_z_loss=0.1))).total.isfinite()


def test_nothing_to_balance_is_a_loss_of_zero():
    assert aux_loss(Tape()).item() == 0.0
    # With every weight at 0, and with a load alone in evaluation, where there is no noise.
    for weights in ({}, {"load": 0.1}):
        balance = Balance(load_balancing_loss=0, router_z_loss=0, **weights)
        losses = aux_losses(tape_of(routing(SCORES, [2, 1, 0]), balance=balance))
        assert (losses.total.item(), losses.terms) == (0.0, {})
    # A term that does not apply is skipped.
    losses = aux_losses(tape_of(routing(SCORES, [2, 1, 0]), balance=Balance(), terms=frozenset({"router_z_loss"})))
    assert losses.terms.keys() == {"router_z_loss"}


def test_a_term_set_by_hand_that_does_not_apply_is_refused_and_a_default_is_not():
    # A bias or a group limit chooses by more than the logits, so their threshold says nothing of the load.
    noise = r"balance.load=0.1 does not apply to TokenChoice without noise on its logits.*group limits"
    for options in ({}, {"noise": "fixed", "expert_bias": True}, {"noise": "fixed", "num_groups": 2}):
        with pytest.raises(ValueError, match=noise):
            MoEConfig(4, TokenChoice(1, **options), balance=Balance(load=0.1))
    Balance(load=0.1).check(TokenChoice(noise="fixed").terms, "TokenChoice")
    with pytest.raises(ValueError, match=r"balance.load_balancing_loss=0.5 does not apply to Hash"):
        Balance(load_balancing_loss=0.5).check(frozenset(), "Hash")
    Balance().check(frozenset(), "Hash")
    Balance(load_balancing_loss=0.0).check(frozenset(), "Hash")
