"""st-moe-pytorch's gate and layer (ST-MoE, arXiv 2202.08906) beside ours. Version seen: 0.1.8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import FFN, Balance, MoEConfig, Routing, TokenChoice, aux_losses, record
from core.routing.balance.losses import load_balancing_loss
from core.routing.pairs.adaptive import Threshold
from core.routing.selection import Capacity

st_moe = pytest.importorskip("st_moe_pytorch")
gating = pytest.importorskip("st_moe_pytorch.st_moe_pytorch").TopNGating

D, F, E = 16, 24, 4
B, S = 3, 16
# A second expert stays with probability min(1, gate / threshold): so small a threshold keeps every one.
ALWAYS = 1e-9
# More room than tokens.
AMPLE = float(E)


def pair_of_gates(
    top_k: int = 2,
    theirs: float = AMPLE,
    num_experts: int = E,
    threshold: float | None = None,
    dim: int = D,
) -> tuple[Any, Any]:
    """Their gate and ours with the same weights. ``theirs`` is a capacity factor of the tokens, ours of the pairs."""
    peer = gating(
        dim,
        num_experts,
        top_n=top_k,
        threshold_train=threshold or ALWAYS,
        threshold_eval=threshold or ALWAYS,
        capacity_factor_train=theirs,
        capacity_factor_eval=theirs,
    )
    config = TokenChoice(top_k=top_k) if threshold is None else Threshold(threshold)
    router = config.build(dim, num_experts, Capacity(theirs / top_k, group="sequence"))
    with torch.no_grad():
        router.gate.weight.copy_(peer.to_gates.weight.normal_(std=0.5))
    return peer, router


def theirs_BSE(output: Any) -> Tensor:
    """(B, S, E) combine weights, the places within the experts summed over."""
    return output[1].sum(-1)


def ours_BSE(routing: Routing, shape: tuple[int, ...], num_experts: int = E) -> Tensor:
    expert_ids_TK = routing.expert_ids_N.view(routing.num_tokens, -1)
    zeros = routing.gates_N.new_zeros(routing.num_tokens, num_experts + 1)
    gates_TE = zeros.scatter_add(1, expert_ids_TK, routing.gates_N.view(expert_ids_TK.shape))[:, :num_experts]
    return gates_TE.view(*shape, num_experts)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("factor", [AMPLE, 2.0, 1.25, 1.0])
def test_gates_choose_and_drop_the_same_pairs_with_the_same_weights(factor, top_k, training):
    # int(S factor / E) theirs, ceil(S K (factor / K) / E) ours: 16, 8, 5 and 4 places in each sequence.
    peer, router = pair_of_gates(top_k, factor)
    x = torch.randn(B, S, D, requires_grad=True)
    theirs = theirs_BSE(peer.train(training)(x))
    ours = ours_BSE(router.train(training)(x), (B, S))
    dropped = B * S * top_k - int((theirs > 0).sum())
    if factor in (1.0, AMPLE):
        assert (dropped > 0) == (factor == 1.0)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(B, S, E)
    got = torch.autograd.grad((ours * weights).sum(), [x, router.gate.weight])
    wanted = torch.autograd.grad((theirs * weights).sum(), [x, peer.to_gates.weight])
    for ours_grad, their_grad in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours_grad, their_grad, rtol=1e-5, atol=1e-5)


def test_second_experts_stay_as_often_in_training():
    # Gates 0.85 and 0.15, threshold 0.2: 0.75 of 10000 in both; 4 sigma is 0.0173.
    peer, router = pair_of_gates(2, 2.0, 2, threshold=0.2, dim=2)
    for weight in (peer.to_gates.weight, router.gate.weight):
        weight.data.copy_(torch.eye(2))
    x = torch.tensor([0.85, 0.15]).log().expand(50, 200, 2)
    with torch.no_grad():
        theirs = (theirs_BSE(peer.train()(x))[..., 1] > 0).float().mean()
        ours = (ours_BSE(router.train()(x), (50, 200), 2)[..., 1] > 0).float().mean()
    assert theirs.item() == pytest.approx(0.75, abs=0.0173)
    assert ours.item() == pytest.approx(0.75, abs=0.0173)


def test_layers_give_the_same_output_gradients_and_z_loss():
    experts = nn.ModuleList([nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)) for _ in range(E)])
    # The straight-through dispatch sends a second gradient to the gate, through the experts' input.
    peer = st_moe.MoE(
        D,
        num_experts=E,
        experts=experts,
        threshold_train=ALWAYS,
        capacity_factor_train=1.25,
        straight_through_dispatch_tensor=False,
    ).train()
    layer = MoEConfig(
        E, TokenChoice(top_k=2), FFN(F, "gelu", bias=True), capacity_factor=0.625, group="sequence"
    ).build(D)
    ours = layer.experts
    with torch.no_grad():
        layer.router.gate.weight.copy_(peer.gate.to_gates.weight.normal_(std=0.5))
        for i, (fc1, _, fc2) in enumerate(experts):
            ours.w_in[i], ours.b_in[i] = fc1.weight.mT, fc1.bias
            ours.w_out[i], ours.b_out[i] = fc2.weight.mT, fc2.bias
    x = torch.randn(B, S, D)
    ours_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    with record(layer) as tape:
        y = layer(ours_x)
    out = peer(their_x)
    torch.testing.assert_close(y, out.outputs, rtol=1e-5, atol=1e-5)
    weights = torch.randn(B, S, D)
    (y * weights).sum().backward()
    (out.outputs * weights).sum().backward(retain_graph=True)
    pairs = [
        (ours_x.grad, their_x.grad),
        (layer.router.gate.weight.grad, peer.gate.to_gates.weight.grad),
        (ours.w_in.grad, torch.stack([f[0].weight.grad.mT for f in experts])),
        (ours.b_in.grad, torch.stack([f[0].bias.grad for f in experts])),
        (ours.w_out.grad, torch.stack([f[2].weight.grad.mT for f in experts])),
        (ours.b_out.grad, torch.stack([f[2].bias.grad for f in experts])),
    ]
    for ours_grad, their_grad in pairs:
        torch.testing.assert_close(ours_grad, their_grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aux_losses(tape).terms["router_z_loss"], out.router_z_loss)


def first_choice_loss(routing: Routing, counted_T: Tensor) -> Tensor:
    """GShard's load-balancing loss of one sequence, ``E sum_e f_e P_e``: unlike in ours, ``f`` is of first choices.

    Args:
        routing: of the sequence.
        counted_T: bool (T,), the tokens whose first choice counts; ``f`` is a share of all T tokens all the same.
    """
    first_E = torch.bincount(routing.evidence.logits_TE.argmax(-1)[counted_T], minlength=E)
    return E * (first_E / routing.num_tokens * routing.evidence.scores_TE.mean(0)).sum()


def test_balance_loss_is_of_first_choices_and_of_all_choices_in_ours():
    peer, router = pair_of_gates()
    x = torch.randn(1, S, D)
    theirs, routing = peer.train()(x)[2], router.train()(x)
    torch.testing.assert_close(theirs, first_choice_loss(routing, torch.ones(S, dtype=torch.bool)))
    # The same function as ours, on other counts.
    first_E = torch.bincount(routing.expert_ids_N[::2], minlength=E)
    torch.testing.assert_close(theirs, load_balancing_loss(routing.evidence.scores_TE.sum(0), first_E, S))
    layer = MoEConfig(E, TokenChoice(top_k=2), FFN(1), balance=Balance(load_balancing_loss=1.0)).build(D)
    layer.router.gate.weight.data.copy_(peer.to_gates.weight)
    with record(layer) as tape:
        layer(x)
    all_E = torch.bincount(routing.expert_ids_N, minlength=E)
    wanted = E * (all_E / (2 * S) * routing.evidence.scores_TE.mean(0)).sum()
    torch.testing.assert_close(aux_losses(tape).terms["load_balancing_loss"], wanted)


def test_their_balance_loss_counts_after_capacity():
    # mask_1 is a view of the mask that capacity then zeroes in place: a first choice that found its expert full counts
    # for no expert, so the loss shrinks as the overload grows. Ours counts before capacity.
    peer, router = pair_of_gates(theirs=1.0)
    x = torch.randn(1, S, D) + 0.5
    theirs, routing = peer.train()(x)[2], router.train()(x)
    kept = routing.expert_ids_N[::2] < E
    assert not kept.all()
    right = first_choice_loss(routing, torch.ones_like(kept))
    assert int(routing.chosen_per_expert_E.sum()) == 2 * S  # what our loss counts: dropped pairs as well
    if torch.allclose(theirs, right):
        pytest.skip("st-moe-pytorch balance loss: the installed version counts before capacity")
    torch.testing.assert_close(theirs, first_choice_loss(routing, kept))
    assert theirs < right


def test_their_second_expert_is_random_in_evaluation():
    # Ours keeps what theirs keeps for certain: a second gate of the threshold or more.
    peer, router = pair_of_gates(threshold=0.3)
    x = torch.randn(8, S, D)
    peer.eval(), router.eval()
    ours = ours_BSE(router(x), (8, S))
    assert torch.equal(ours_BSE(router(x), (8, S)), ours)
    once, again = theirs_BSE(peer(x)), theirs_BSE(peer(x))
    kept = ours > 0
    torch.testing.assert_close(once[kept], ours[kept])
    assert 8 * S < int(kept.sum()) < 2 * 8 * S
    if torch.equal(once, again):
        pytest.skip("st-moe-pytorch: the installed version is deterministic in evaluation")
    assert (once > 0).sum() < 8 * S * 2


def test_their_capacity_is_never_below_four():
    # Eight tokens, eight experts, factor 1: one place each. All tokens choose the same two experts.
    peer, router = pair_of_gates(2, 1.0, 8)
    x = torch.randn(1, 1, D).expand(1, 8, D)
    ours = ours_BSE(router(x), (1, 8), 8)
    assert (ours > 0).sum((0, 1)).max() == 1
    theirs = theirs_BSE(peer(x))
    if torch.allclose(theirs, ours):
        pytest.skip("st-moe-pytorch: the installed version has no floor of the capacity")
    assert (theirs > 0).sum((0, 1)).max() == 4
