"""Routers with a varying number of experts a token, on typed logits: the gate's weight is the identity."""

import math

import pytest
import torch
from layered import identity_gate
from routed import built, gates, ids, logits_of, terms_of

from core import FFN, Balance, MoEConfig, Routing, RoutingContext, RoutingStats, Tape, TokenChoice, aux_losses, record
from core.contract import Entry
from core.layers import set_capacity_factor
from core.routing.pairs.adaptive import DynamicThreshold, NullExperts, Threshold, TokenRounding, round_to_tiles
from core.routing.router import PairRouter

# Threshold: ST-MoE


def test_a_second_gate_below_the_threshold_is_left_out_in_evaluation_and_by_chance_in_training():
    x = logits_of((0.5, 0.3, 0.2), (0.765, 0.135, 0.1))
    routing = built(Threshold(0.2), 3)(x)
    assert ids(routing) == [[0, 1], [0, 3]]
    # 0.5 / 0.8 and 0.3 / 0.8; then 0.765 / 0.9, as it was with its second of 0.15.
    assert gates(routing) == [pytest.approx([0.625, 0.375]), pytest.approx([0.85, 0.0])]
    assert routing.chosen_per_expert_E.tolist() == [2, 1, 0]
    assert ids(built(Threshold(0.2, eval_second_expert_policy="always"), 3)(x)) == [[0, 1], [0, 1]]
    # Gate 0.15, threshold 0.2: 0.75; 4 sigma of 10000 draws is 0.0173.
    routing = built(Threshold(0.2), 2, training=True)(logits_of((0.85, 0.15)).expand(1, 10_000, 2))
    assert routing.tokens_per_expert_E[0] == 10_000
    assert routing.tokens_per_expert_E[1] / 10_000 == pytest.approx(0.75, abs=0.0173)
    assert routing.gates_N[::2].tolist() == pytest.approx([0.85] * 10_000)
    x = torch.zeros(1, 2000, 2)  # both gates are 1/2
    for training in (True, False):
        for second in ("random", "threshold"):
            routing = built(Threshold(0.5, second_expert_policy=second), 2, training)(x)
            assert routing.tokens_per_expert_E.tolist() == [2000, 2000]


def test_a_hard_threshold_is_that_of_evaluation_and_one_of_one_half_gshards_random_second():
    x = torch.randn(2, 200, 6)
    router = built(Threshold(0.3, second_expert_policy="threshold"), 6, training=True)
    hard = router(x).expert_ids_N
    assert (hard == 6).any()
    assert torch.equal(hard, router.eval()(x).expert_ids_N)
    routings = []
    for config in (Threshold(0.5), TokenChoice(2, second_expert_policy="random")):
        router = built(config, 6, training=True)
        torch.manual_seed(1)
        routings.append(router(x))
    assert (routings[0].expert_ids_N == 6).any()
    assert torch.equal(routings[0].expert_ids_N, routings[1].expert_ids_N)
    assert torch.equal(routings[0].gates_N, routings[1].gates_N)


# NullExperts: AdaMoE

# Experts 0 and 1, null experts 2 and 3: one of each, two real ones, two null ones.
NULLS = ((0.4, 0.1, 0.3, 0.2), (0.4, 0.35, 0.15, 0.1), (0.1, 0.2, 0.3, 0.4))


def with_nulls() -> PairRouter:
    return built(NullExperts(top_k=2, num_null_experts=2), 2, columns=4)


def test_null_experts_are_empty_places_and_the_balance_loss_sees_their_mean_load():
    routing = with_nulls()(logits_of(*NULLS))
    assert ids(routing) == [[0, 2], [0, 1], [2, 2]]
    # 0.4 / 0.4 alone; 0.4 / 0.75 and 0.35 / 0.75; none.
    assert gates(routing) == [[1.0, 0.0], pytest.approx([0.533333, 0.466667], abs=1e-6), [0.0, 0.0]]
    assert routing.tokens_per_expert_E.tolist() == [2, 1]
    assert routing.evidence.scores_TE[0].tolist() == pytest.approx([0.8, 0.2])
    padded = torch.cat((logits_of(*NULLS), torch.full((1, 2, 4), torch.nan)), 1)
    valid = RoutingContext(valid_BS=torch.tensor([[True, True, True, False, False]]))
    # Chosen: 2 and 1 of the real ones, 1 + 2 null ones, 1.5 each; shares 2/6, 1/6, 1/4, 1/4.
    # Scores summed: 0.9, 0.65, and 0.5 + 0.25 + 0.7 = 1.45 for both null ones.
    # 4 * (2/6 * 0.9 + 1/6 * 0.65 + 1/4 * 1.45) / 3 = 4/3 * 0.7708333 = 1.0277778.
    # Importance of 0.9, 0.65, 0.725, 0.725: mean 0.75, variance (0.0225 + 0.01 + 2 * 0.000625) / 4 = 0.0084375,
    # over 0.5625: 0.015.
    for routing in (with_nulls()(logits_of(*NULLS)), with_nulls()(padded, valid)):
        assert routing.evidence.balance_chosen.tolist() == [2, 1, 1.5, 1.5]
        terms = terms_of(routing, "load_balancing_loss", "importance", "router_z_loss")
        assert terms["load_balancing_loss"] == pytest.approx(1.0277778, rel=1e-6)
        assert terms["importance"] == pytest.approx(0.015, rel=1e-5)
        # The logits are logarithms of probabilities of all four: their logsumexp is 0.
        assert terms["router_z_loss"] == pytest.approx(0.0, abs=1e-12)


def test_more_null_experts_raise_the_loss_and_which_of_them_does_not_matter():
    def loss(x: torch.Tensor) -> float:
        return terms_of(with_nulls()(x), "load_balancing_loss")["load_balancing_loss"]

    # One real and one null each: shares 1/4 everywhere, so the loss is 4 * 1/4 * 1 = 1.
    assert loss(logits_of((0.4, 0.1, 0.3, 0.2), (0.1, 0.4, 0.2, 0.3))) == pytest.approx(1.0)
    # All shares on the null ones, 1/2 each, with scores 0.7 a token: 4 * 1/2 * 0.7 = 1.4.
    assert loss(logits_of((0.1, 0.2, 0.3, 0.4), (0.2, 0.1, 0.4, 0.3))) == pytest.approx(1.4)
    # The other way round in every second token alone, so that the null experts' own loads differ.
    x = torch.randn(1, 20, 4)
    mixed = torch.where(torch.arange(20)[:, None] % 2 == 0, x, x[..., [0, 1, 3, 2]])
    names = ("load_balancing_loss", "importance")
    assert terms_of(with_nulls()(x), *names) == pytest.approx(terms_of(with_nulls()(mixed), *names))


def test_a_token_of_null_experts_alone_comes_out_zero_and_has_no_gradient_but_the_losses():
    layer = identity_gate(MoEConfig(2, NullExperts(2, 2), FFN(8)).build(4)).eval()
    x = logits_of(*NULLS).requires_grad_()
    y = layer(x)
    assert y[0, 2].abs().max() == 0
    assert y[0, :2].abs().amin(-1).min() > 0
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[0, 2].abs().max() == 0
    # 4 of 8 + 8: 4 * 8 / 16.
    assert NullExperts(4, 8).pairs_per_token(8) == 2.0
    config = MoEConfig(8, NullExperts(4, 8), FFN(16))
    # Gate 2 * 4 * 16 = 128; two experts of 2 * 2 * 4 * 16 = 256.
    assert config.flops_per_token(4) == 128 + 2 * 256


# DynamicThreshold: DynMoE


def dynamic(thresholds: tuple[float, ...], training: bool = False, **options) -> PairRouter:
    router = built(DynamicThreshold(**{"max_k": len(thresholds), **options}), len(thresholds), training)
    router.gate.threshold.data.copy_(torch.tensor(thresholds))
    return router


X = torch.tensor([[[3.0, 4.0, 0.0]]])  # cosines 0.6, 0.8 and 0


def test_every_expert_above_its_threshold_is_taken_with_equal_gates():
    for training in (True, False):
        # 0.6 > 0.5 and 0 > -1, but 0.8 < 0.9. Distances sigmoid(0.6) - sigmoid(0.5) = 0.645656 - 0.622459 = 0.023197
        # and sigmoid(0) - sigmoid(-1) = 0.5 - 0.268941 = 0.231059: expert 2 is first.
        routing = dynamic((0.5, 0.9, -1.0), training)(X)
        assert (ids(routing), gates(routing)) == ([[2, 0, 3]], [[0.5, 0.5, 0.0]])
        assert routing.evidence.scores_TE[0].tolist() == pytest.approx([0.645656, 0.689974, 0.5], abs=1e-6)
        # Expert 0 is nearest to its threshold, 0.6 to 0.65, but where none is above its own the best score is taken.
        routing = dynamic((0.65, 2.0, 0.5), training)(X)
        assert (ids(routing), gates(routing)) == ([[1, 3, 3]], [[1.0, 0.0, 0.0]])
    # At most max_k, those furthest above.
    routing = dynamic((0.5, 0.9, -1.0), max_k=1)(X)
    assert (ids(routing), gates(routing)) == ([[2]], [[1.0]])
    # The temperature divides cosines and thresholds: sigmoid(0.6 / 0.5) = sigmoid(1.2) = 0.768525.
    routing = dynamic((0.5, 0.9, -1.0), temperature=0.5)(X)
    assert (ids(routing), routing.evidence.scores_TE[0, 0].item()) == ([[2, 0, 3]], pytest.approx(0.768525, abs=1e-6))


def test_the_gradient_goes_straight_through_the_step_to_thresholds_and_tokens():
    router, x = dynamic((0.5, 0.9, -1.0), training=True), X.clone().requires_grad_()
    routing = router(x)
    # Expert 2 is the first pair, expert 0 the second one, each with gate 1/2.
    (3 * routing.gates_N[0] + 2 * routing.gates_N[1]).backward()
    # -(weight / k) * s (1 - s) at the threshold: sigmoid'(0.5) = 0.235004, sigmoid'(-1) = 0.196612.
    expected = [-2 / 2 * 0.235004, 0.0, -3 / 2 * 0.196612]
    assert router.gate.threshold.grad.tolist() == pytest.approx(expected, abs=1e-6)
    # d cos_e / dx = (w_e - cos_e x / |x|) / |x|: (0.64, -0.48, 0) / 5 for expert 0, (0, 0, 1) / 5 for expert 2.
    # sigmoid'(0.6) = 0.228784, sigmoid'(0) = 0.25.
    first = 2 / 2 * 0.228784 * torch.tensor([0.128, -0.096, 0.0])
    second = 3 / 2 * 0.25 * torch.tensor([0.0, 0.0, 0.2])
    torch.testing.assert_close(x.grad[0, 0], first + second, rtol=0, atol=1e-6)


def test_diversity_and_simplicity_join_the_losses_with_their_weights():
    layer = MoEConfig(
        2, DynamicThreshold(2, diversity=0.1, simplicity=0.01), balance=Balance(load_balancing_loss=0)
    ).build(2)
    with torch.no_grad():
        # Parallel rows of length 3 and 4: the directions' products are all 1, less I: [[0, 1], [1, 0]].
        layer.router.gate.weight.copy_(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    with record(layer) as tape:
        layer(torch.randn(2, 5, 2), RoutingContext(valid_BS=torch.arange(10).reshape(2, 5) < 7))
    losses = aux_losses(tape)
    assert {k: v.item() for k, v in losses.terms.items()} == pytest.approx(
        {"diversity": math.sqrt(2), "simplicity": 3.5}
    )
    assert losses.total.item() == pytest.approx(0.1 * math.sqrt(2) + 0.035)
    # A loss of weight zero is left out.
    assert DynamicThreshold(diversity=0.0).extra_weights == {"simplicity": 0.01}
    assert list(dynamic((0.5, 0.9, -1.0), True, diversity=0.0)(X).evidence.extra) == ["simplicity"]


def test_experts_start_orthogonal_with_thresholds_of_zero_and_a_token_of_zeros_has_a_finite_gradient():
    gate = DynamicThreshold().build(16, 6).gate
    torch.testing.assert_close(gate.weight @ gate.weight.T, torch.eye(6), rtol=0, atol=1e-5)
    assert (gate.threshold.tolist(), gate.diversity().item()) == ([0.0] * 6, pytest.approx(0.0, abs=1e-5))
    x = torch.zeros(1, 2, 3, requires_grad=True)
    dynamic((0.5, 0.9, 1.0), training=True)(x).gates_N.sum().backward()
    assert x.grad.isfinite().all()


# TokenRounding: SonicMoE

# Scores of expert 0 of two; the other has the rest. Experts 0 and 1 are chosen three times each.
HALVES = tuple((p, 1 - p) for p in (0.9, 0.8, 0.7, 0.4, 0.3, 0.2))


def pairs(routing: Routing) -> dict[tuple[int, int], float]:
    """Gate of each computed (token, expert), each of which must be there once."""
    E = len(routing.tokens_per_expert_E)
    gates: dict[tuple[int, int], float] = {}
    for token, expert, gate in zip(
        routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), routing.gates_N.tolist(), strict=True
    ):
        if expert < E:
            assert (token, expert) not in gates
            gates[token, expert] = gate
        else:
            assert gate == 0.0
    return gates


def test_loads_are_rounded_up_with_the_best_scored_others_or_down_by_leaving_out_the_lowest():
    # 3 is nearer to 4 than to 0 (or as near, with a half up). Expert 0 gets token 3 (0.4), expert 1 token 2 (0.3).
    routing = built(TokenRounding(top_k=1, tile=4), 2, training=True)(logits_of(*HALVES))
    expected = {(0, 0): 0.9, (1, 0): 0.8, (2, 0): 0.7, (3, 0): 0.4, (3, 1): 0.6, (4, 1): 0.7, (5, 1): 0.8, (2, 1): 0.3}
    assert (pairs(routing), routing.tokens_per_expert_E.tolist()) == (pytest.approx(expected), [4, 4])
    assert routing.expert_ids_N.shape == (6 * 1 + 2 * 2,)
    assert routing.top_k is None
    # The losses see the choice; the drop rate counts the added ones as chosen.
    assert (routing.evidence.balance_chosen.tolist(), routing.chosen_per_expert_E.tolist()) == ([3, 3], [4, 4])
    # Five tokens choose expert 0 and one expert 1: 4 and 0.
    rows = ((0.9, 0.1), (0.6, 0.4), (0.7, 0.3), (0.2, 0.8), (0.8, 0.2), (0.55, 0.45))
    routing = built(TokenRounding(top_k=1, tile=4), 2, training=True)(logits_of(*rows))
    assert pairs(routing) == pytest.approx({(0, 0): 0.9, (1, 0): 0.6, (2, 0): 0.7, (4, 0): 0.8})
    assert routing.tokens_per_expert_E.tolist() == [4, 0]
    stats = RoutingStats.from_tape(Tape((Entry("", routing, None, Balance()),))).layers[""]
    assert stats.drop_rate == pytest.approx(2 / 6)
    # All six choose expert 0: 8 is as near as 4, but six tokens fill only one tile.
    router = built(TokenRounding(top_k=1, tile=4), 2, training=True)
    assert router(logits_of(*((0.9, 0.1),) * 6)).tokens_per_expert_E.tolist() == [4, 0]
    assert router(logits_of(*((0.9, 0.1),) * 3)).tokens_per_expert_E.tolist() == [0, 0]
    # Top-2 of three, tile 2: experts 0, 1, 2 are chosen by 3, 2 and 1 tokens. 3 tokens cannot become 4, so expert 0
    # has 2 and loses token 2, its lowest; expert 2 gets token 0, its best of the others.
    routing = built(TokenRounding(top_k=2, tile=2), 3, training=True)(
        logits_of((0.5, 0.4, 0.1), (0.6, 0.35, 0.05), (0.4, 0.25, 0.35))
    )
    # Token 0 has all three, token 1 its 0.6 / 0.95 and 0.35 / 0.95, token 2 expert 2 alone.
    expected = {(0, 0): 0.5, (0, 1): 0.4, (0, 2): 0.1, (1, 0): 0.631579, (1, 1): 0.368421, (2, 2): 1.0}
    assert pairs(routing) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_tile_of_one_and_evaluation_are_plain_top_k(training):
    x, tile = torch.randn(2, 9, 5), 1 if training else 4
    plain, rounded = built(TokenChoice(2), 5)(x), built(TokenRounding(2, tile), 5, training)(x)
    assert torch.equal(rounded.expert_ids_N, plain.expert_ids_N)
    assert torch.equal(rounded.token_index_N, plain.token_index_N)
    torch.testing.assert_close(rounded.gates_N, plain.gates_N)


def rounded_by_loops(scores: list[list[float]], chosen: list[list[int]], real: list[bool], tile: int) -> set:
    """(token, expert) pairs, expert by expert."""
    kept = set()
    for e in range(len(scores[0])):
        takers = [t for t, row in enumerate(chosen) if real[t] and e in row]
        others = [t for t in range(len(scores)) if real[t] and t not in takers]
        goal = int(len(takers) / tile + 0.5) * tile
        while goal > sum(real):
            goal -= tile
        by_score = sorted(takers, key=lambda t: -scores[t][e]) + sorted(others, key=lambda t: -scores[t][e])
        kept |= {(t, e) for t in by_score[:goal]}
    return kept


@pytest.mark.parametrize("tile", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("T", [1, 5, 40])
def test_rounding_equals_the_loops(tile, T):
    scores, real = torch.randn(T, 4).softmax(-1), torch.rand(T) < 0.8
    chosen = scores.topk(2).indices.masked_fill(~real[:, None], 4)
    rounded = round_to_tiles(scores, chosen, real, tile)
    live = rounded.expert_ids_N < 4
    live_pairs = list(zip(rounded.token_index_N[live].tolist(), rounded.expert_ids_N[live].tolist(), strict=True))
    assert len(live_pairs) == len(set(live_pairs)) == int(rounded.tokens_per_expert_E.sum())
    assert set(live_pairs) == rounded_by_loops(scores.tolist(), chosen.tolist(), real.tolist(), tile)
    assert (rounded.tokens_per_expert_E % tile == 0).all()


def test_batch_mates_change_a_token_in_training_alone_and_a_capacity_may_be_tried_in_evaluation():
    layer, x = identity_gate(MoEConfig(2, TokenRounding(1, 4), FFN(8)).build(2)), logits_of(*HALVES)
    more = torch.cat((x, logits_of(*((0.95, 0.05),) * 2)), 1)
    # With two more tokens of its own expert 0 has 5 of 8, so 4: it keeps its own best four and leaves token 3 out.
    assert not torch.allclose(layer(x)[0, 3], layer(more)[0, 3])
    layer.eval()
    torch.testing.assert_close(layer(x), layer(more)[:, :6])
    layer = MoEConfig(4, TokenRounding(2, 4)).build(8).eval()
    with set_capacity_factor(layer, 0.5):  # ceil(0.5 * 2 * 32 / 4) = 8
        assert layer.router(torch.randn(1, 32, 8)).tokens_per_expert_E.max() <= 8


# TokenChoice(logit_norm=...): Skywork-MoE


def test_normalized_logits_have_mean_zero_and_the_given_deviation():
    # Logits 1, 2, 3: mean 2, deviation sqrt(2/3) = 0.816497; times 2: -2.449490, 0, 2.449490.
    # exp: 0.086338, 1, 11.582435; sum 12.668773; the largest is 0.914251 of it.
    routing = built(TokenChoice(1, logit_norm=2.0), 3)(torch.tensor([[[1.0, 2.0, 3.0]]]))
    assert routing.evidence.logits_TE[0].tolist() == pytest.approx([-2.449490, 0.0, 2.449490], abs=1e-5)
    assert (gates(routing), ids(routing)) == ([pytest.approx([0.914251], abs=1e-5)], [[2]])
    # They forget scale and shift, and sharpen with the factor.
    x, router = torch.randn(1, 20, 5), built(TokenChoice(2, logit_norm=1.0), 5)
    torch.testing.assert_close(router(x).gates_N, router(30 * x + 7).gates_N, rtol=1e-4, atol=1e-5)
    sharper = built(TokenChoice(2, logit_norm=3.0), 5)(x)
    assert (sharper.gates_N[::2] >= router(x).gates_N[::2]).all()
    x = torch.ones(1, 2, 4, requires_grad=True)
    routing = built(TokenChoice(1, logit_norm=1.0), 4, training=True)(x)
    assert routing.evidence.scores_TE.tolist() == [[0.25] * 4] * 2
    routing.gates_N.sum().backward()
    assert x.grad.isfinite().all()
