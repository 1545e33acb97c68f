"""st-moe-pytorch's gate and layer (ST-MoE, arXiv 2202.08906) beside ours. Version seen: 0.1.8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside import check_same, load
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
    top_k: int = 2, theirs: float = AMPLE, num_experts: int = E, threshold: float | None = None, dim: int = D
) -> tuple[Any, Any]:
    """Their gate and ours with the same weights. ``theirs`` is a capacity factor of the tokens, ours of the pairs."""
    options = dict.fromkeys(("threshold_train", "threshold_eval"), threshold or ALWAYS)
    options |= dict.fromkeys(("capacity_factor_train", "capacity_factor_eval"), theirs)
    peer = gating(dim, num_experts, top_n=top_k, **options)
    config = TokenChoice(top_k=top_k) if threshold is None else Threshold(threshold)
    router = config.build(dim, num_experts, Capacity(theirs / top_k, group="sequence"))
    with torch.no_grad():
        router.gate.weight.copy_(peer.to_gates.weight.normal_(std=0.5))
    return peer, router


def theirs_BSE(output: Any) -> Tensor:
    """(B, S, E) combine weights, the places within the experts summed over."""
    return output[1].sum(-1)


def ours_BSE(routing: Routing, batch: int) -> Tensor:
    gates_TE = torch.zeros(routing.num_tokens, len(routing.chosen_per_expert_E) + 1)
    expert_ids_TK = routing.expert_ids_N.view(routing.num_tokens, -1)
    gates_TE = gates_TE.scatter_add(1, expert_ids_TK, routing.gates_N.view(expert_ids_TK.shape))
    return gates_TE[:, :-1].unflatten(0, (batch, -1))


@pytest.mark.parametrize(
    ("factor", "top_k", "training"),
    [(AMPLE, 2, False), (2.0, 3, False), (1.25, 2, True), (1.0, 3, True), (1.0, 2, False)],
)
def test_gates_choose_and_drop_the_same_pairs_with_the_same_weights(factor, top_k, training):
    # int(S factor / E) theirs, ceil(S K (factor / K) / E) ours: 16, 8, 5 and 4 places in each sequence.
    peer, router = pair_of_gates(top_k, factor)
    x = torch.randn(B, S, D, requires_grad=True)
    theirs = theirs_BSE(peer.train(training)(x))
    ours = ours_BSE(router.train(training)(x), B)
    dropped = B * S * top_k - int((theirs > 0).sum())
    if factor in (1.0, AMPLE):
        assert (dropped > 0) == (factor == 1.0)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(B, S, E)
    got = torch.autograd.grad((ours * weights).sum(), [x, router.gate.weight])
    wanted = torch.autograd.grad((theirs * weights).sum(), [x, peer.to_gates.weight])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_second_experts_stay_as_often_in_training():
    # Gates 0.85 and 0.15, threshold 0.2: 0.75 of 10000 in both; 4 sigma is 0.0173.
    peer, router = pair_of_gates(2, 2.0, 2, threshold=0.2, dim=2)
    for weight in (peer.to_gates.weight, router.gate.weight):
        weight.data.copy_(torch.eye(2))
    x = torch.tensor([0.85, 0.15]).log().expand(50, 200, 2)
    with torch.no_grad():
        theirs = (theirs_BSE(peer.train()(x))[..., 1] > 0).float().mean()
        ours = (ours_BSE(router.train()(x), 50)[..., 1] > 0).float().mean()
    assert theirs.item() == pytest.approx(0.75, abs=0.0173)
    assert ours.item() == pytest.approx(0.75, abs=0.0173)


def layout(peer: Any, read: Any) -> dict[str, Tensor]:
    fc1, fc2 = ([f[i] for f in peer.experts.experts] for i in (0, 2))
    return {
        "router.gate.weight": read(peer.gate.to_gates.weight),
        "experts.w_in": torch.stack([read(f.weight).mT for f in fc1]),
        "experts.b_in": torch.stack([read(f.bias) for f in fc1]),
        "experts.w_out": torch.stack([read(f.weight).mT for f in fc2]),
        "experts.b_out": torch.stack([read(f.bias) for f in fc2]),
    }


def test_layers_give_the_same_output_gradients_and_z_loss():
    experts = nn.ModuleList([nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)) for _ in range(E)])
    # The straight-through dispatch sends a second gradient to the gate, through the experts' input.
    options = {"threshold_train": ALWAYS, "capacity_factor_train": 1.25, "straight_through_dispatch_tensor": False}
    peer = st_moe.MoE(D, num_experts=E, experts=experts, **options).train()
    nn.init.normal_(peer.gate.to_gates.weight, std=0.5)
    expert = FFN(F, "gelu", bias=True)
    layer = MoEConfig(E, TokenChoice(top_k=2), expert, capacity_factor=0.625, group="sequence").build(D)
    load(layer, layout(peer, lambda p: p.detach()))
    x = torch.randn(B, S, D)
    check_same(layer, peer, layout, x, layer, lambda x: peer(x).outputs, rtol=1e-5, atol=1e-5)
    with record(layer) as tape:
        layer(x)
    torch.testing.assert_close(aux_losses(tape).terms["router_z_loss"], peer(x).router_z_loss)


def first_choice_loss(routing: Routing, counted_T: Tensor) -> Tensor:
    """GShard's load-balancing loss of one sequence, ``E sum_e f_e P_e``: unlike in ours, ``f`` is of first choices,
    those of the tokens of ``counted_T``, as a share of all T tokens all the same."""
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
    ours = ours_BSE(router(x), 8)
    assert torch.equal(ours_BSE(router(x), 8), ours)
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
    ours = ours_BSE(router(x), 1)
    assert (ours > 0).sum((0, 1)).max() == 1
    theirs = theirs_BSE(peer(x))
    if torch.allclose(theirs, ours):
        pytest.skip("st-moe-pytorch: the installed version has no floor of the capacity")
    assert (theirs > 0).sum((0, 1)).max() == 4
