"""Mutual information, entropies, balance within sequences and the adaptive weight: by hand, denominators included."""

import math

import pytest
import torch
from layered import identity_gate
from routed import recorded
from torch import Tensor

import core
from core import Balance, MoEConfig, RoutingContext, Tape, TokenChoice, aux_loss, aux_losses, update_expert_bias
from core.routing.balance.balance import adaptive_weight
from core.routing.balance.losses import (
    entropy,
    global_entropy_loss,
    local_entropy_loss,
    localized_loss,
    mean_over,
    mutual_information_loss,
    sequence_losses,
)
from core.routing.balance.terms import SCORE_TERMS, TERMS

OFF = {"load_balancing_loss": 0.0, "router_z_loss": 0.0}
NEW = ("mutual_information", "local_entropy", "global_entropy", "sequence_balance")
# Of two experts: H(1) = 0, H(1/2) = log 2 = 0.693147, H(3/4) = 0.75 * 0.287682 + 0.25 * 1.386294 = 0.562335.


def routing(
    scores: list[list[float]] | Tensor, *, top_k: int = 1, sequences: int = 1, valid: list[bool] | None = None
) -> core.Routing:
    """A decision with typed scores, each token at its ``top_k`` best experts."""
    scores_TE = torch.as_tensor(scores)
    T, E = scores_TE.shape
    ids_N = scores_TE.topk(top_k, dim=-1).indices.flatten()
    counts = torch.bincount(ids_N, minlength=E)
    return core.Routing(
        token_index_N=torch.arange(T * top_k) // top_k,
        expert_ids_N=ids_N,
        gates_N=torch.ones(T * top_k),
        tokens_per_expert_E=counts,
        chosen_per_expert_E=counts,
        num_tokens=T,
        top_k=top_k,
        valid_T=None if valid is None else torch.tensor(valid),
        num_sequences=sequences,
        evidence=core.Evidence(scores_TE, scores_TE.log()),
    )


def term(name: str, decided: core.Routing, context: RoutingContext | None = None, **options: object) -> Tensor:
    """One term of one pass, unweighted."""
    balance = Balance(**{**OFF, name: 1.0, **options})  # type: ignore[arg-type]
    losses = aux_losses(Tape((core.Entry("", decided, context, balance, frozenset(TERMS)),)))
    assert (losses.terms.keys(), losses.total.item()) == ({name}, losses.terms[name].item())
    return losses.total


def test_entropy_in_nats_and_its_gradient_at_zero():
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25]], dtype=torch.float64, requires_grad=True)
    assert entropy(p).tolist() == pytest.approx([0.0, 0.693147, 0.562335], abs=1e-6)
    entropy(p).sum().backward()
    assert p.grad.isfinite().all()


def test_mutual_information_by_hand():
    # Tokens (1, 0) and (1/2, 1/2): mean (3/4, 1/4). H(e | t) = (0 + 0.693147) / 2 = 0.346574 over 2 tokens;
    # H(e) = 0.562335. -I = 0.346574 - 0.562335 = -0.215762.
    loss = mutual_information_loss(torch.tensor([1.5, 0.5]), torch.tensor(0.693147), 2)
    assert loss.item() == pytest.approx(-0.215762, abs=1e-6)
    assert term("mutual_information", routing([[1.0, 0.0], [0.5, 0.5]])).item() == pytest.approx(-0.215762, abs=1e-6)
    # Each token sure of an expert of its own: -log E. All tokens alike: 0.
    assert term("mutual_information", routing(torch.eye(4))).item() == pytest.approx(-math.log(4), abs=1e-6)
    assert term("mutual_information", routing([[0.7, 0.3]] * 5)).item() == pytest.approx(0.0, abs=1e-6)
    # Task 0 has the sequences 0 and 2 of two tokens, task 1 the sequence 1. Mean scores: task 0
    # ((0.9 + 0.7 + 0.8 + 0.6) / 4, ...) = (3/4, 1/4), task 1 ((0.2 + 0.3) / 2, ...) = (1/4, 3/4).
    # H(e | task) = (4 * 0.562335 + 2 * 0.562335) / 6 = 0.562335; all: (3.5 / 6, 2.5 / 6),
    # H(e) = 0.583333 * 0.538997 + 0.416667 * 0.875469 = 0.679193. -I = -0.116858.
    decided = routing([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.3, 0.7], [0.8, 0.2], [0.6, 0.4]], sequences=3)
    context = RoutingContext(task_ids_B=torch.tensor([0, 1, 0]))
    loss = term("mutual_information", decided, context, num_tasks=2)
    assert loss.item() == pytest.approx(-0.116858, abs=1e-6)
    # A third task without tokens changes nothing.
    assert term("mutual_information", decided, context, num_tasks=3).item() == pytest.approx(-0.116858, abs=1e-6)


def test_local_and_global_entropy_by_hand():
    # One modality: (0 + 0.693147 + 0.562335) / 3 = 0.418494.
    scores = [[1.0, 0.0], [0.5, 0.5], [0.75, 0.25]]
    assert local_entropy_loss(torch.tensor([1.255482]), torch.tensor([3.0])).item() == pytest.approx(0.418494, abs=1e-6)
    assert term("local_entropy", routing(scores)).item() == pytest.approx(0.418494, abs=1e-6)
    # Modality 0 has the tokens 0 and 2: 0.562335 / 2 = 0.281168; modality 1 the token 1: 0.693147. Sum 0.974315.
    context = RoutingContext(modality_BS=torch.tensor([[0, 1, 0]]))
    assert term("local_entropy", routing(scores), context, num_modalities=2).item() == pytest.approx(0.974315, abs=1e-6)
    for only, value in ((0, 0.281168), (1, 0.693147)):
        loss = term("local_entropy", routing(scores), context, num_modalities=2, local_entropy_modality=only)
        assert loss.item() == pytest.approx(value, abs=1e-6)
    # Mean (3/4, 1/4): log 2 - 0.562335 = 0.130812.
    scores = [[1.0, 0.0], [0.5, 0.5]]
    loss = global_entropy_loss(torch.tensor([[1.5, 0.5]]), torch.tensor([2.0]), math.log(2))
    assert loss.item() == pytest.approx(0.130812, abs=1e-6)
    assert term("global_entropy", routing(scores)).item() == pytest.approx(0.130812, abs=1e-6)
    # A modality each: log 2 - 0 and log 2 - log 2.
    context = RoutingContext(modality_BS=torch.tensor([[0, 1]]))
    loss = term("global_entropy", routing(scores), context, num_modalities=2)
    assert loss.item() == pytest.approx(0.693147, abs=1e-6)
    # It is zero above its threshold: H = 0.562335 is above 0.5, and 0.1 below 0.662335.
    assert term("global_entropy", routing(scores), entropy_threshold=0.5).item() == 0.0
    loss = term("global_entropy", routing(scores), entropy_threshold=0.662335)
    assert loss.item() == pytest.approx(0.1, abs=1e-6)
    # Modality 2 has no token: 0 and not the threshold.
    context = RoutingContext(modality_BS=torch.tensor([[0, 0]]))
    loss = term("global_entropy", routing(scores), context, num_modalities=3)
    assert loss.item() == pytest.approx(0.130812, abs=1e-6)
    # Each may have its own: modality 0 has log 2, above 0.5; modality 1 has 0.562335, 0.1 below its threshold.
    scores, context = [[0.5, 0.5], [0.75, 0.25]], RoutingContext(modality_BS=torch.tensor([[0, 1]]))
    loss = term("global_entropy", routing(scores), context, num_modalities=2, entropy_threshold=(0.5, 0.662335))
    assert loss.item() == pytest.approx(0.1, abs=1e-6)
    config = MoEConfig(4, balance=Balance(num_modalities=2, entropy_threshold=(1.0, 0.5)))
    assert MoEConfig.from_dict(config.to_dict()) == config


def test_sequence_balance_by_hand():
    # Sequence 0: tokens (0.9, 0.1), (0.6, 0.4), both choose expert 0: f = (1, 0), P = (0.75, 0.25); 2 * 0.75 = 1.5.
    # Sequence 1: (0.8, 0.2), (0.3, 0.7): f = (1/2, 1/2), P = (0.55, 0.45): 2 * (0.275 + 0.225) = 1. Mean 1.25.
    scores = [[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7]]
    losses = sequence_losses(
        torch.tensor([[1.5, 0.5], [1.1, 0.9]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([2.0, 2.0])
    )
    assert losses.tolist() == pytest.approx([1.5, 1.0], abs=1e-6)
    assert mean_over(losses.sum(), 2).item() == pytest.approx(1.25, abs=1e-6)
    assert term("sequence_balance", routing(scores, sequences=2)).item() == pytest.approx(1.25, abs=1e-6)
    # As one sequence: f = (3/4, 1/4), P = (0.65, 0.35): 2 * (0.4875 + 0.0875) = 1.15.
    assert term("sequence_balance", routing(scores)).item() == pytest.approx(1.15, abs=1e-6)
    # DeepSeek-V3, eq. 18: f_i = E / (K T) * count. K = 2 of 3 experts, T = 2; sigmoid scores by their share:
    # (0.8, 0.6, 0.2) / 1.6 = (0.5, 0.375, 0.125) and (0.1, 0.3, 0.4) / 0.8 = (0.125, 0.375, 0.5).
    # Counts 1, 2, 1: f = 3/4 * (1, 2, 1); P = (0.3125, 0.375, 0.3125): 0.75 * 1.375 = 1.03125.
    decided = routing([[0.8, 0.6, 0.2], [0.1, 0.3, 0.4]], top_k=2)
    assert term("sequence_balance", decided).item() == pytest.approx(1.031250, abs=1e-6)
    # It judges the scores and not the bias.
    router = TokenChoice(1, score_func="sigmoid", expert_bias=True).build(2, 2)
    x = torch.randn(2, 5, 2)
    before = term("sequence_balance", router(x))
    router.expert_bias = torch.tensor([0.0, 9.0])  # every token goes to expert 1
    assert router(x).chosen_per_expert_E.tolist() == [0, 10]
    assert term("sequence_balance", router(x)).item() == before.item()


def test_localized_balance_by_hand():
    # Sequences 0 and 1 of two tokens: importances (1.4, 0.6) and (0.8, 1.2). Expert 0 is of type 0, expert 1 of type 1,
    # and so are the sequences. With delta 0.5: Z = (1.5 * 1.4, 0.5 * 0.6, 0.5 * 0.8, 1.5 * 1.2) = (2.1, 0.3, 0.4, 1.8).
    # Mean 4.6 / 4 = 1.15, mean of squares (4.41 + 0.09 + 0.16 + 3.24) / 4 = 1.975; (1.975 - 1.3225) / 1.15 = 0.567391.
    decided = routing([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.6, 0.4]], sequences=2)
    options = {"expert_types": (0, 1), "localized_delta": 0.5}
    context = RoutingContext(task_ids_B=torch.tensor([0, 1]))
    assert localized_loss(torch.tensor(4.6), torch.tensor(7.9), 4).item() == pytest.approx(0.567391, abs=1e-6)
    assert term("localized", decided, context, **options).item() == pytest.approx(0.567391, abs=1e-6)
    # Of the other types it is Z = (0.7, 0.9, 1.2, 0.6): mean 0.85, squares 3.1 / 4; (0.775 - 0.7225) / 0.85.
    other = RoutingContext(task_ids_B=torch.tensor([1, 0]))
    assert term("localized", decided, other, **options).item() == pytest.approx(0.061765, abs=1e-6)
    # It is zero where shares are as the delta asks, (1 + delta) own = (1 - delta) (1 - own): 1.5 * 0.25 = 0.5 * 0.75.
    for delta, own in ((0.5, 0.25), (0.0, 0.5), (-0.5, 0.75)):
        decided = routing([[own, 1 - own], [1 - own, own]], sequences=2)
        loss = term("localized", decided, context, expert_types=(0, 1), localized_delta=delta)
        assert loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", [*NEW, "localized"])
def test_padding_is_in_no_term_whatever_its_ids(name):
    scores = torch.rand(6, 3).softmax(-1)
    options = {"num_tasks": 2, "num_modalities": 2, "expert_types": (0, 1, 1)}
    tasks, modality = torch.tensor([0, 1]), torch.tensor([[0, 1, 1], [1, 0, 0]])
    expected = term(
        name, routing(scores, sequences=2), RoutingContext(task_ids_B=tasks, modality_BS=modality), **options
    )
    # Two tokens of padding on each sequence, and a third sequence of padding alone.
    padded = torch.rand(3, 5, 3).softmax(-1)
    padded[:2, :3] = scores.unflatten(0, (2, 3))
    valid = torch.zeros(3, 5, dtype=torch.bool)
    valid[:2, :3] = True
    ids = torch.full((3, 5), -12345)
    ids[:2, :3] = modality
    loss = term(
        name,
        routing(padded.flatten(0, 1), sequences=3, valid=valid.flatten().tolist()),
        RoutingContext(task_ids_B=torch.tensor([0, 1, 99]), modality_BS=ids),
        **options,
    )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("name", NEW)
def test_the_gradient_of_a_term_is_right_and_finite_where_scores_are_zero(name):
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: term(name, routing(z.softmax(-1), sequences=2)), (logits,))
    layer = MoEConfig(4, TokenChoice(2), core.FFN(8), balance=Balance(**OFF, **{name: 1.0})).build(6)
    for scale in (1.0, 1e4):  # logits thousands apart: scores of exactly 0 and 1
        layer.zero_grad()
        tape = recorded(layer, scale * torch.randn(3, 5, 6))
        aux_loss(tape).backward()
        assert layer.router.gate.weight.grad.isfinite().all()
        assert scale > 1 or layer.router.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "options, missing",
    [
        ({"mutual_information": 1.0, "num_tasks": 2}, "task_ids_B"),
        ({"local_entropy": 1.0, "num_modalities": 2}, "modality_BS"),
        ({"global_entropy": 1.0, "num_modalities": 2}, "modality_BS"),
        ({"localized": 1.0, "expert_types": (0, 0, 1, 1)}, "task_ids_B"),
    ],
)
def test_a_term_without_its_context_is_refused_naming_the_field(options, missing):
    balance = Balance(**options)
    assert balance.needs == (missing,)
    layer = MoEConfig(4, balance=balance).build(6)
    tape = recorded(layer, torch.randn(2, 3, 6))
    with pytest.raises(ValueError, match=rf"need context.{missing}, which is None"):
        aux_loss(tape)
    # What is switched off needs none.
    assert Balance(num_tasks=3, num_modalities=2).needs == ()
    assert Balance(mutual_information=1.0, local_entropy=1.0).needs == ()


@pytest.mark.parametrize("name", sorted({*SCORE_TERMS, "sequence_balance"} - {"load_balancing_loss", "importance"}))
def test_a_term_of_the_scores_is_refused_where_the_router_has_none(name):
    assert name in TokenChoice().terms
    with pytest.raises(ValueError, match=rf"balance.{name}=0.5 does not apply to Hash"):
        Balance(**{name: 0.5}, expert_types=(0, 1)).check(frozenset(), "Hash", 2)


TYPES = Balance(localized=1.0, expert_types=(0, 1, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Balance(local_entropy_modality=2, num_modalities=2), "local_entropy_modality=2 is not below num_mod"),
        (lambda: Balance(entropy_threshold=(1.0,), num_modalities=2), r"\(1.0,\) has 1 numbers for num_modalities=2"),
        (lambda: Balance(localized=1.0), "balance.localized=1.0 needs expert_types, the type of each expert"),
        (lambda: MoEConfig(4, balance=TYPES), "balance.expert_types has 3 types for num_experts=4"),
        (lambda: core.MMoE(3, balance=TYPES), "balance.localized=1.0 does not apply to MMoE"),
        (lambda: Balance(adaptive=True, load_balancing_loss=0.0), "True moves load_balancing_loss, which is 0"),
        (lambda: Balance(adaptive=True).check(frozenset(), "Hash"),
         "balance.adaptive=True moves load_balancing_loss, which does not apply to Hash"),
        (lambda: MoEConfig(4, balance=Balance(adaptive=True)),
         "balance.adaptive=True follows the drop rate, which is 0 without a capacity"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_the_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_expert_types_are_one_for_each_expert_of_one_gate():
    assert MoEConfig.from_dict(MoEConfig(3, balance=TYPES).to_dict()).balance == TYPES
    # Finer experts are more of them.
    balance = Balance(localized=1.0, expert_types=(0, 0, 1, 1))
    assert MoEConfig(2, TokenChoice(1), core.FFN(8), granularity=2, balance=balance).split(4).num_experts == 4


def test_the_adaptive_weight_by_hand_is_saved_and_stays_float32():
    balance = Balance(adaptive=True)
    # 0.99 * 0.004 + 0.01 * min(0.2 * 0.03, 0.01) = 0.00396 + 0.00006 = 0.00402.
    assert adaptive_weight(torch.tensor(0.004), torch.tensor(0.03), balance).item() == pytest.approx(0.00402, abs=1e-8)
    # At a drop rate of 0.5 the largest weight holds: 0.00396 + 0.0001 = 0.00406.
    assert adaptive_weight(torch.tensor(0.004), torch.tensor(0.5), balance).item() == pytest.approx(0.00406, abs=1e-8)
    layer, other = adaptive_layer(), adaptive_layer()
    layer.load_balancing_weight.fill_(0.00123)
    with torch.device("meta"):
        made = adaptive_layer()
    for loaded in (other, made.to_empty(device="cpu")):
        loaded.load_state_dict(layer.state_dict())
        assert loaded.bfloat16().load_balancing_weight.dtype == torch.float32
        assert loaded.load_balancing_weight.item() == layer.load_balancing_weight.item()
    assert "load_balancing_weight" not in MoEConfig(2).build(2).state_dict()


def adaptive_layer(**options: float) -> torch.nn.Module:
    """Two experts, logits are the input; each takes half the tokens."""
    balance = Balance(load_balancing_loss=0.008, router_z_loss=0, adaptive=True, **options)  # type: ignore[arg-type]
    return identity_gate(MoEConfig(2, TokenChoice(1), core.FFN(4), capacity_factor=1.0, balance=balance).build(2))


def test_a_step_moves_the_adaptive_weight_by_the_drop_rate_of_the_tape():
    layer = adaptive_layer(adaptive_momentum=0.5, adaptive_max=0.1)
    x = torch.eye(2)[[0, 0, 0, 1]]  # capacity 2: one pair of four is dropped
    tape = recorded(layer, x)
    before = aux_losses(tape)
    update_expert_bias(layer, tape)
    # 0.5 * 0.008 + 0.5 * 0.2 * 0.25 = 0.029.
    assert layer.load_balancing_weight.item() == pytest.approx(0.029, abs=1e-8)
    tape = recorded(layer, x)
    after = aux_losses(tape)
    assert before.total.item() == pytest.approx(0.008 * before.terms["load_balancing_loss"].item(), rel=1e-6)
    assert after.total.item() == pytest.approx(0.029 * after.terms["load_balancing_loss"].item(), rel=1e-6)
    assert after.terms == before.terms  # the log shows the term unweighted
    # Nothing on the tape, or evaluation: it stays.
    update_expert_bias(layer, Tape())
    layer.eval()
    update_expert_bias(layer, tape)
    assert layer.load_balancing_weight.item() == pytest.approx(0.029, abs=1e-8)


def test_a_weight_moved_between_loss_and_backward_keeps_the_gradient_of_the_loss():
    layer = adaptive_layer(adaptive_momentum=0.0)
    x, grads = torch.tensor([[1.0, 0.5], [0.3, 0.2], [0.1, 0.9], [0.4, 0.1]]), []
    for move in (False, True):
        layer.zero_grad()
        tape = recorded(layer, x)
        loss = aux_loss(tape)
        if move:
            update_expert_bias(layer, tape)
        loss.backward()
        grads.append(layer.router.gate.weight.grad.clone())
    assert layer.load_balancing_weight.item() != pytest.approx(0.008)
    assert torch.equal(grads[0], grads[1])
