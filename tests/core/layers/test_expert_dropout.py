"""Expert dropout: what a token may choose from, with which gates, and what the losses see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import core
from core import FFN, MoEConfig, TokenChoice
from core.routing.pairs.top_k import without_some

LOGITS = torch.tensor([3.0, 2.0, 1.0, 0.0])


def by_hand(router: core.RouterConfig = TokenChoice(2), rate: float = 0.5, **options: object) -> core.MoE:
    """Return a layer whose gate gives a token (1, 0) the logits 3, 2, 1, 0."""
    layer = MoEConfig(4, router, FFN(6), expert_dropout=rate, **options).build(2)
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.stack((LOGITS, torch.zeros(4)), 1))
    return layer


def tokens(count: int = 1) -> Tensor:
    return torch.tensor([1.0, 0.0]).expand(1, count, 2)


def test_the_gates_are_those_of_a_choice_among_the_rest(monkeypatch):
    # Draws below 0.5 leave experts 0 and 2 out. Of the logits 2 and 0 the token takes experts 1 and 3, with the gates
    # e^2 / (e^2 + 1) = 0.8808 and 0.1192; among all four it would take experts 0 and 1.
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.tensor([[0.1, 0.9, 0.3, 0.7]]))
    routing = by_hand().train().router(tokens())
    assert routing.expert_ids_N.tolist() == [1, 3]
    torch.testing.assert_close(routing.gates_N, torch.tensor([0.8808, 0.1192]), atol=1e-4, rtol=0)
    # A softmax before the choice is one over the rest as well, for one expert: e^2 / (e^2 + 1).
    routing = by_hand(TokenChoice(1)).train().router(tokens())
    torch.testing.assert_close(routing.gates_N, torch.tensor([0.8808]), atol=1e-4, rtol=0)
    assert routing.chosen_per_expert_E.tolist() == [0, 1, 0, 0]
    # The losses see the logits before the dropout.
    torch.testing.assert_close(routing.evidence.scores_TE, LOGITS.softmax(-1)[None])
    torch.testing.assert_close(routing.evidence.logits_TE, LOGITS[None])


def test_at_least_k_stay(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.tensor([[0.1, 0.2, 0.4, 0.3]]))
    kept = without_some(LOGITS[None], 0.5, 2).isfinite()
    assert kept.tolist() == [[False, False, True, True]]  # all would go, and the two of the largest draws stay
    assert by_hand().train().router(tokens()).expert_ids_N.tolist() == [2, 3]


def test_an_expert_is_left_out_as_often_as_it_should_be():
    torch.manual_seed(0)
    routing = by_hand(TokenChoice(1), 0.25).train().router(tokens(20_000))
    # Expert 0 is chosen where it stays: 3/4; expert 1 where it stays and 0 does not: 3/16; and so on. That none of
    # four stays, 1/256, is spread over them by the draws.
    share = routing.chosen_per_expert_E / 20_000
    torch.testing.assert_close(share, torch.tensor([0.75, 0.1875, 0.0469, 0.0117]), atol=0.01, rtol=0)


@pytest.mark.parametrize("router", [TokenChoice(2), TokenChoice(2, score_func="sigmoid"), core.Cosine(2)])
def test_training_has_gradients_and_evaluation_draws_nothing(router):
    x = torch.randn(2, 20, 8)
    options = {"capacity_factor": 1.0, "priority": "score"}  # a capacity serves by the scores of the choice
    plain, dropped = (MoEConfig(8, router, FFN(6), expert_dropout=p, **options).build(8) for p in (0.0, 0.9))
    dropped.load_state_dict(plain.state_dict())
    assert torch.equal(plain.eval()(x), dropped.eval()(x))
    assert not torch.allclose(plain.train()(x), dropped.train()(x))
    with core.record(dropped) as tape:
        y = dropped(x)
    (y.square().sum() + core.aux_loss(tape)).backward()
    assert all(p.grad.isfinite().all() for p in dropped.parameters())


@pytest.mark.usefixtures("fresh_compiler")
def test_a_layer_compiles():
    layer = by_hand().train()
    y = torch.compile(layer, fullgraph=True, backend="eager")(tokens(6))
    y.sum().backward()
    assert layer.router.gate.weight.grad.isfinite().all()


OTHERS = [core.Hash(20), core.SoftSlots(), core.ExpertChoice(), core.TokenRounding(2)]
BY_MORE = [{"noise": "fixed"}, {"expert_bias": True}, {"num_groups": 2, "limited_groups": 1}]


@pytest.mark.parametrize("router", [*OTHERS, *(TokenChoice(2, **options) for options in BY_MORE)], ids=str)
def test_a_router_that_does_not_choose_by_its_logits_alone_refuses_it(router):
    with pytest.raises(ValueError, match=r"expert_dropout=0.1 does not apply to .*: it is for routers that choose by"):
        MoEConfig(4, router, expert_dropout=0.1)
