"""Expert choice on typed logits: the gate's weight is the identity, so a token is its own logits."""

import math

import pytest
import torch
from grids import pairwise
from routed import built, logits_of
from stepped import assert_exports
from torch import Tensor, nn

import core
from core import FFN, Balance, MoE, MoEConfig, Routing, RoutingContext, aux_loss, aux_losses, record
from core.routing.pairs.expert_choice import ExpertChoice, ExpertChoiceRouter
from core.routing.selection import Capacity

BACKENDS = ["eager", "cpu", "grouped", "triton"]


def router(num_experts: int, factor: float, group: str | int = "sequence") -> ExpertChoiceRouter:
    return built(ExpertChoice(factor), num_experts, limit=Capacity(group=group))


def chosen(routing: Routing, num_experts: int) -> list[list[int]]:
    """The computed tokens of each expert, in the order they were taken."""
    ids, tokens = routing.expert_ids_N.tolist(), routing.token_index_N.tolist()
    return [[t for t, e in zip(tokens, ids, strict=True) if e == expert] for expert in range(num_experts)]


def naive(layer: MoE, x: Tensor, groups: list[list[int]], factor: float) -> Tensor:
    """The definition over flat tokens: expert by expert, its best tokens of each group."""
    tokens = x.flatten(0, 1)
    scores = (tokens @ layer.router.gate.weight.T).softmax(-1).detach()
    E, experts, y = scores.shape[1], layer.experts, torch.zeros_like(tokens)
    for group in groups:
        room = min(math.ceil(factor * len(group) / E - 1e-9), len(group))
        for e in range(E):
            for t in sorted(group, key=lambda t, e=e: -float(scores[t, e]))[:room]:
                h = nn.functional.gelu(tokens[t] @ experts.w_in[e] + experts.b_in[e])
                y[t] = y[t] + scores[t, e] * (h @ experts.w_out[e] + experts.b_out[e])
    return y.reshape(x.shape)


TABLE = logits_of((0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.5, 0.1, 0.4))


def test_each_expert_takes_its_best_tokens_at_their_score_up_to_its_capacity():
    # Three tokens, three experts, factor 1: each takes ceil(1 * 3 / 3) = 1. Expert 0 takes token 0 (0.7), expert 1
    # token 1 (0.3), expert 2 token 2 (0.4).
    routing = router(3, 1.0)(TABLE)
    assert (chosen(routing, 3), routing.gates_N.tolist()) == ([[0], [1], [2]], pytest.approx([0.7, 0.3, 0.4]))
    assert routing.top_k is None
    assert routing.tokens_per_expert_E.tolist() == routing.chosen_per_expert_E.tolist() == [1, 1, 1]
    # ceil(1 * 3 / 2) = 2 places. Expert 0 likes tokens 0 and 1, expert 1 tokens 2 and 1: token 1 has both.
    assert chosen(router(2, 1.0)(logits_of((0.9, 0.1), (0.8, 0.2), (0.3, 0.7))), 2) == [[0, 1], [2, 1]]
    # Scores of one expert only compare tokens: all experts like token 0 best, and token 1 has none.
    routing = router(3, 0.5)(torch.tensor([[[0.0, 0.0, 0.0], [9.0, -9.0, -9.0]]]))
    # ceil(0.5 * 2 / 3) = 1: expert 0 takes token 1 (score 1), experts 1 and 2 token 0 (1/3 each).
    assert chosen(routing, 3) == [[1], [0], [0]]
    x = torch.randn(1, 10, 4)
    assert router(4, 1.1)(x).tokens_per_expert_E.tolist() == [3] * 4  # ceil(1.1 * 10 / 4) = ceil(2.75)
    assert router(4, 0.1)(x).tokens_per_expert_E.tolist() == [1] * 4  # ceil(0.25)
    assert router(4, 4.0)(x).tokens_per_expert_E.tolist() == [10] * 4
    assert router(4, 100.0)(x).tokens_per_expert_E.tolist() == [10] * 4
    assert chosen(router(2, 1.0)(torch.zeros(1, 6, 2)), 2) == [[0, 1, 2], [0, 1, 2]]
    x = torch.tensor([[[0.0, 500.0], [9.0, 9.0]]])  # expert 0 scores token 0 with exp(-500) = 0
    routing = router(2, 1.0)(x, RoutingContext(valid_BS=torch.tensor([[True, False]])))
    assert (chosen(routing, 2), routing.gates_N.tolist()) == ([[0], [0]], [0.0, 1.0])


GROUPS = {
    "sequence": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]],
    "batch": [list(range(15))],
    4: [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14]],
}


@pytest.mark.parametrize("group, factor, backend", pairwise(GROUPS, [0.5, 2.0, 3.0], BACKENDS))
def test_layer_equals_the_loop_over_experts_and_groups(group, factor, backend):
    config = MoEConfig(3, ExpertChoice(factor), FFN(12, bias=True), group=group, backend=backend)
    layer, x = config.build(8), torch.randn(3, 5, 8)
    torch.testing.assert_close(layer(x), naive(layer, x, GROUPS[group], factor), rtol=1e-5, atol=1e-6)


def test_the_default_group_is_the_sequence_so_batch_mates_change_nothing():
    x, layer = torch.randn(4, 6, 8), MoEConfig(3, ExpertChoice(1.0), FFN(12)).build(8)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    mixed = MoEConfig(3, ExpertChoice(1.0), FFN(12), group="batch").build(8)
    mixed.load_state_dict(layer.state_dict())
    assert (mixed(x)[:1] - mixed(x[:1])).abs().max() > 1e-3  # with "batch" they do
    assert layer.router.capacity.group == ExpertChoice().build(8, 3).capacity.group == "sequence"


@pytest.mark.parametrize("group", ["sequence", "batch", 4])
def test_padding_is_never_chosen_and_changes_nothing_even_if_it_holds_nan(group):
    x = torch.randn(2, 6, 8)
    valid = torch.tensor([[True] * 6, [True, False, True, False, False, False]])
    layer = MoEConfig(3, ExpertChoice(1.0), FFN(12, bias=True), group=group).build(8)
    dirty = x.masked_fill(~valid[..., None], torch.nan).requires_grad_()
    with record(layer) as tape:
        y = layer(dirty, RoutingContext(valid_BS=valid))
    routing = tape.entries[0].routing
    taken = routing.expert_ids_N < 3
    assert valid.flatten()[routing.token_index_N[taken]].all()
    assert routing.gates_N[~taken].abs().sum() == 0
    # Capacities of the real tokens: 6 -> 2 and 2 -> 1; 8 -> 3; groups of 4, 3 and 1 real -> 2, 1 and 1.
    assert routing.tokens_per_expert_E.tolist() == [{"sequence": 3, "batch": 3, 4: 4}[group]] * 3
    assert y[~valid].abs().max() == 0
    (y.square().sum() + aux_loss(tape)).backward()
    assert dirty.grad[~valid].abs().max() == 0
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    if group == "sequence":
        alone = layer(x[1, valid[1]])
        torch.testing.assert_close(y[1, valid[1]], alone)


@pytest.mark.parametrize("group", ["sequence", "batch", 4])
def test_no_token_and_one_token(group):
    layer = MoEConfig(3, ExpertChoice(2.0), FFN(12, bias=True), group=group).build(8)
    for shape in ((2, 0, 8), (0, 5, 8), (1, 1, 8), (1, 8)):
        x = torch.randn(shape, requires_grad=True)
        with record(layer) as tape:
            y = layer(x)
        assert y.shape == shape
        (y.sum() + aux_loss(tape)).backward()
        # One token: ceil(2 / 3) = 1, every expert takes it.
        assert tape.entries[0].routing.tokens_per_expert_E.tolist() == [min(x.numel() // 8, 1)] * 3


def test_balance_keeps_the_z_loss_alone():
    layer = MoEConfig(4, ExpertChoice(), balance=Balance(router_z_loss=0.1)).build(8)
    x = torch.randn(2, 6, 8)
    with record(layer) as tape:
        layer(x)
    losses, logits = aux_losses(tape), x.flatten(0, 1) @ layer.router.gate.weight.T
    assert list(losses.terms) == ["router_z_loss"]
    torch.testing.assert_close(losses.total, 0.1 * logits.logsumexp(-1).square().mean())
    losses.total.backward()
    assert layer.router.gate.weight.grad.abs().max() > 0


def test_statistics_of_a_tape_are_even_and_no_capacity_factor_is_set():
    layer, x = MoEConfig(4, ExpertChoice(1.0), FFN(12)).build(8).eval(), torch.randn(2, 8, 8)
    with record(layer) as tape:
        y = layer(x)
    core.update_expert_bias(layer, tape)
    stats = core.RoutingStats.from_tape(tape.detach()).layers[""]
    assert stats.tokens_per_expert.tolist() == [4] * 4  # two sequences, ceil(8 / 4) each
    figures = stats.figures()
    assert (figures["load_imbalance"], figures["drop_rate"], figures["dead_experts"]) == (1.0, 0.0, 0.0)
    assert 0 < figures["entropy"] < 1
    with core.set_capacity_factor(layer, 0.25, "score"):
        assert torch.equal(layer(x), y)


def test_costs_by_hand():
    config = MoEConfig(4, ExpertChoice(1.5), FFN(12), num_shared_experts=1)
    layer = config.build(8)
    # Gate 32, 1.5 of four experts and the shared one, 192 parameters each.
    assert config.active_params(8) == core.active_params(layer) == 32 + round(2.5 * 192)
    # Ten tokens: ceil(15 / 4) = 4 places, 16 rows, 1.6 a token: 64 + (1.6 + 1) * 384 = 1062.4.
    assert config.flops_per_token(8, tokens_per_sequence=10) == 1062
    assert core.count_flops(layer, torch.randn(3, 10, 8)) == 3 * 10624
    # Where the length is not known, without the rounding: 64 + 2.5 * 384.
    assert config.flops_per_token(8) == 1024
    # More than all tokens cannot be taken.
    assert MoEConfig(4, ExpertChoice(9.0), FFN(12)).flops_per_token(8) == 64 + 4 * 384
    # A predictor has W1 (3, 8) and W2 (4, 3): 36 parameters, two FLOPs each.
    plain, own = (MoEConfig(4, ExpertChoice(1.0, predictor_dim=dim), FFN(8)) for dim in (None, 3))
    assert own.num_params(8) - plain.num_params(8) == 36
    assert own.flops_per_token(8, tokens_per_sequence=4) - plain.flops_per_token(8, tokens_per_sequence=4) == 72


@pytest.mark.parametrize("group", ["batch", 5])
def test_exports_with_other_numbers_of_tokens(group):
    # Where an expert would take a single token torch.export sees another program: from 8 tokens on it does not.
    layer = MoEConfig(4, ExpertChoice(1.5), FFN(12), group=group).build(8).eval()
    assert_exports(layer, 8, length=12, least=8)


def test_a_causal_decoder_refuses_it_because_a_later_token_changes_an_earlier_one():
    message = r"router ExpertChoice \(arXiv 2202\.09368\) lets later tokens change earlier ones"
    with pytest.raises(ValueError, match=message):
        MoEConfig(2, ExpertChoice(1.0), FFN(12)).build(8, causal=True)
    x, chooser = logits_of((0.6, 0.4), (0.2, 0.8)), router(2, 1.0)
    later = torch.cat((x[:, :1], logits_of((0.9, 0.1))), 1)
    assert chosen(chooser(x), 2) == [[0], [1]]
    assert chosen(chooser(later), 2) == [[1], [0]]  # token 0 goes to the other expert


def test_one_expert_of_all_tokens_is_the_expert_itself_and_trains_no_router():
    layer, x = MoEConfig(1, ExpertChoice(1.0)).build(8), torch.randn(2, 5, 8)
    y = layer(x)
    torch.testing.assert_close(y, layer.experts(x, "dense"))
    y.square().sum().backward()
    assert layer.router.gate.weight.grad.eq(0).all()
    assert layer.experts.w_in.grad.ne(0).any()


# ---- a capacity predictor (DiffMoE)


def foreseeing(factor: float = 1.0) -> ExpertChoiceRouter:
    """Return a router of 2 experts whose predictor's logits are 4 silu(x) of the token."""
    made = built(ExpertChoice(factor, predictor_dim=2), 2, limit=Capacity(group="batch"))
    made.predictor.hidden.weight.data.copy_(torch.eye(2))
    made.predictor.output.weight.data.copy_(4 * torch.eye(2))
    return made


def test_a_predictor_learns_what_the_experts_took():
    made = foreseeing().train()
    # One sequence of 4 tokens, capacity ceil(1 * 4 / 2) = 2: expert 0 takes tokens 0 and 1, expert 1 takes 2 and 3.
    x = torch.tensor([[[3.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 3.0]]])
    routing = made(x)
    assert chosen(routing, 2) == [[0, 1], [3, 2]]
    silu2, silu3 = (v / (1 + math.exp(-v)) for v in (2.0, 3.0))
    # Each token: the right expert costs log(1 + exp(-4 silu)), and the other one, at logit 0, log 2.
    for token, silu in ((0, silu3), (1, silu2)):
        expected = (math.log1p(math.exp(-4 * silu)) + math.log(2)) / 2
        assert float(routing.evidence.extra["capacity_predictor"][token]) == pytest.approx(expected, rel=1e-4)
    # The second token of an expert decides its threshold.
    last = 1 / (1 + math.exp(-4 * silu2))
    assert routing.evidence.counts.tolist() == pytest.approx([last, last, 1.0])
    made.after_counts(2 * routing.evidence.counts)  # of two passes
    assert made.threshold.tolist() == pytest.approx([0.95 * 0.5 + 0.05 * last] * 2)
    made.after_counts(torch.zeros(3))
    assert made.threshold.tolist() == pytest.approx([0.95 * 0.5 + 0.05 * last] * 2)


def test_in_evaluation_thresholds_decide_and_no_token_another():
    made = foreseeing().eval()
    made.threshold.copy_(torch.tensor([0.9, 0.4]))
    # Predicted: sigmoid(4 silu(3)) = 1.0, sigmoid(0) = 0.5. Expert 0 takes from 0.9, expert 1 from 0.4 on.
    x = torch.tensor([[[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]])
    assert (chosen(made(x), 2), chosen(made(x[:, 1:2]), 2)) == ([[0], [0, 1, 2]], [[], [0]])
    routing = made(x, RoutingContext(valid_BS=torch.tensor([[True, False, True]])))
    assert (chosen(routing, 2), routing.tokens_per_expert_E.tolist()) == ([[0], [0, 2]], [1, 2])


def test_the_predictor_changes_no_token_is_kept_in_float32_and_padding_moves_no_threshold():
    made, x = foreseeing().train(), torch.randn(2, 4, 2, requires_grad=True)
    made(x).evidence.extra["capacity_predictor"].sum().backward()
    assert x.grad is None or not x.grad.any()
    assert made.gate.weight.grad is None
    assert made.predictor.hidden.weight.grad.abs().max() > 0
    assert made.to(torch.bfloat16).threshold.dtype == torch.float32
    valid = RoutingContext(valid_BS=torch.zeros(1, 4, dtype=torch.bool))
    assert foreseeing().train()(torch.ones(1, 4, 2), valid).evidence.counts.tolist() == [0.0, 0.0, 0.0]
