"""Balanced assignment against scipy's exact solver, and the routers that use it, on typed logits."""

import math

import numpy as np
import pytest
import torch
from routed import built, ids
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from core import RoutingContext
from core.kernels import assign
from core.kernels.assign import balanced_assignment
from core.routing.pairs.assignment import Base, Sinkhorn, sinkhorn


def best_sum(scores_TE: Tensor) -> float:
    """Return the optimum: experts have floor(T / E) places to fill, and T mod E of them one more."""
    scores = scores_TE.double().numpy()
    (T, E), least = scores.shape, len(scores_TE) // scores_TE.shape[1]
    must = np.repeat(np.arange(E), least)
    columns = np.concatenate([must, np.arange(E)])
    # E - T mod E rows of no token take the places that stay empty, and must not take the others.
    empty = np.where(np.arange(len(columns)) < len(must), -1e9, 0.0)
    rows = np.concatenate([scores[:, columns], np.tile(empty, (E - T % E, 1))])
    row, column = linear_sum_assignment(rows, maximize=True)
    return float(rows[row, column][row < T].sum())


def sum_of(scores_TE: Tensor, expert_T: Tensor) -> float:
    return scores_TE.double().gather(1, expert_T[:, None]).sum().item()


def assert_balanced(expert_T: Tensor, num_experts: int) -> None:
    counts = torch.bincount(expert_T, minlength=num_experts)
    assert len(counts) == num_experts
    assert counts.max() - counts.min() <= 1, counts.tolist()


KINDS = {
    "normal": lambda T, E: torch.randn(T, E),
    "skewed": lambda T, E: torch.randn(T, E) + torch.linspace(0, 10, E),
    "one expert is best for all": lambda T, E: 0.01 * torch.randn(T, E) + 100 * torch.eye(E)[0],
    "clusters": lambda T, E: 5 * torch.randn(5, E)[torch.randint(5, (T,))] + 0.01 * torch.randn(T, E),
    "duplicates": lambda T, E: 5 * torch.randn(5, E)[torch.randint(5, (T,))],
    "ties": lambda T, E: torch.randint(0, 3, (T, E)).float(),
    "one direction": lambda T, E: torch.randn(T, 1) * torch.randn(1, E),
    "heavy tails": lambda T, E: torch.randn(T, E) ** 5,
    "outlier": lambda T, E: torch.randn(T, E).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(1e4)),
    "large": lambda T, E: 1e4 * torch.randn(T, E),
}
SIZES = [(1, 4), (3, 8), (7, 4), (16, 16), (100, 16), (257, 8), (600, 5)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_assignment_is_balanced_and_optimal(kind, monkeypatch):
    for T, E in SIZES:
        scores = KINDS[kind](T, E)
        assigned = balanced_assignment(scores)
        assert_balanced(assigned, E)
        # Each token may lose a millionth of the scores' spread, and half an ulp of their size.
        assert best_sum(scores) - sum_of(scores, assigned) <= 2e-6 * T * scores.abs().mean().item() + 1e-9
    # Balance holds where the repair is cut short, too.
    monkeypatch.setattr(assign, "TEMPERATURES", ())
    monkeypatch.setattr(assign, "max_paths", lambda E: 1)
    for T, E in SIZES:
        assert_balanced(balanced_assignment(KINDS[kind](T, E)), E)


def test_large_assignments_come_within_a_thousandth_of_the_optimum_cut_short_or_not(monkeypatch):
    scores = torch.randn(1003, 24) @ torch.randn(24, 32)
    assigned = balanced_assignment(scores)
    assert_balanced(assigned, 32)
    assert sum_of(scores, assigned) >= 0.999 * best_sum(scores)
    monkeypatch.setattr(assign, "max_paths", lambda E: 0)
    for kind in ("normal", "skewed", "one direction"):
        scores = KINDS[kind](600, 8)
        assigned = balanced_assignment(scores)
        assert_balanced(assigned, 8)
        assert sum_of(scores, assigned) >= 0.999 * best_sum(scores)


def test_what_is_equal_is_shared_out_and_half_precision_will_do():
    for value in (0.0, 0.7, -1e4, math.nan):
        for T, E in ((64, 8), (67, 8), (5, 8)):
            assert_balanced(balanced_assignment(torch.full((T, E), value)), E)
    scores = torch.randn(40, 4)
    scores[::3, 0], scores[1::3, 1] = torch.inf, -torch.inf
    assert_balanced(balanced_assignment(scores), 4)
    assert balanced_assignment(torch.zeros(0, 4)).tolist() == []
    assert balanced_assignment(torch.randn(3, 1)).tolist() == [0, 0, 0]
    scores = torch.randn(100, 8).bfloat16()
    assert torch.equal(balanced_assignment(scores), balanced_assignment(scores.double()))
    # 10 tokens, 4 experts: two of them get 3, and it pays most at experts 1 and 3.
    scores = torch.tensor([0.0, 5.0, 1.0, 2.0]).expand(10, 4)
    assert torch.bincount(balanced_assignment(scores)).tolist() == [2, 3, 2, 3]


@pytest.mark.parametrize("kind", ["normal", "skewed", "clusters"])
def test_the_repair_is_exact_from_any_prices(kind, monkeypatch):
    monkeypatch.setattr(assign, "TEMPERATURES", ())  # no price but the experts' means
    monkeypatch.setattr(assign, "max_paths", lambda E: 10_000)
    scores = KINDS[kind](150, 6)
    assigned = balanced_assignment(scores)
    assert_balanced(assigned, 6)
    assert sum_of(scores, assigned) == pytest.approx(best_sum(scores), rel=1e-6)


def test_neither_a_number_added_to_all_scores_of_a_token_nor_the_order_of_tokens_matters():
    # Whole numbers up to 8 and scores on a grid of 2^-12: the sums are exact.
    scores, order = (torch.randn(90, 7) * 4096).round() / 4096, torch.randperm(90)
    assigned = balanced_assignment(scores)
    assert torch.equal(balanced_assignment(scores + torch.randint(-8, 9, (90, 1))), assigned)
    assert torch.equal(balanced_assignment(scores[order]), assigned[order])


def test_padding_has_the_id_e_and_no_place_and_the_operator_keeps_the_rules_of_custom_ops():
    scores, real = torch.randn(50, 4), torch.rand(50) < 0.6
    assigned = balanced_assignment(scores.masked_fill(~real[:, None], torch.nan), real)
    assert torch.equal(assigned[real], balanced_assignment(scores[real]))
    assert assigned[~real].unique().tolist() == [4]
    assert balanced_assignment(scores, torch.zeros(50, dtype=torch.bool)).unique().tolist() == [4]
    for real in (None, torch.rand(12) < 0.5):
        torch.library.opcheck(balanced_assignment, (torch.randn(12, 4), real))


# BASE


def test_base_gives_each_expert_the_tokens_that_gain_most_and_each_token_its_best_expert_in_evaluation():
    # By how much expert 0 is better: 3, 1, 5, 0.5. Two tokens each: 0 and 2 get it, for 4 + 2 + 5 + 1.5 = 12.5.
    x = torch.tensor([[4.0, 1.0], [3.0, 2.0], [5.0, 0.0], [2.0, 1.5]])[None]
    router = built(Base(), 2, training=True)
    routing = router(x)
    assert ids(routing) == [[0], [1], [0], [1]]
    chosen = torch.tensor([4.0, 2.0, 5.0, 1.5])
    assert routing.gates_N.tolist() == pytest.approx(chosen.sigmoid().tolist())  # sigmoid(2) = 0.880797
    assert routing.gates_N[1].item() == pytest.approx(0.880797)
    assert torch.equal(routing.evidence.logits_TE, x[0])
    assert routing.tokens_per_expert_E.tolist() == [2, 2]
    routing = router.eval()(x)
    assert (ids(routing), routing.gates_N.tolist()) == ([[0]] * 4, pytest.approx(x[0, :, 0].sigmoid().tolist()))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        # Three tokens: the expert that gains most by it gets two, 4 + 2 + 5 and not 4 + 2 + 0 or 1 + 3 + 0.
        ([[4.0, 1.0], [3.0, 2.0], [5.0, 0.0]], [0, 1, 0]),
        # Both want expert 0; 2.5 + 3 is more than 3 + 1.
        ([[3.0, 2.5, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]], [1, 0]),
        # Greedy takes the 10 (token 0, expert 0) and leaves 0 for token 1: 10. The best is 9 + 8 = 17.
        ([[10.0, 9.0], [8.0, 0.0]], [1, 0]),
    ],
    ids=["a remainder", "fewer tokens than experts", "not greedy"],
)
def test_base_takes_the_best_sum(x, expected):
    router = built(Base(), len(x[0]), training=True)
    assert router(torch.tensor([x])).expert_ids_N.tolist() == expected


def test_batch_mates_change_the_expert_of_a_token_in_training_alone_and_padding_none():
    x, mate = torch.tensor([[4.0, 1.0], [3.0, 2.0]])[None], torch.tensor([[0.0, 9.0]])[None]
    router = built(Base(), 2, training=True)
    assert ids(router(x)) == [[0], [1]]
    assert ids(router(torch.cat((x, mate), 1)))[:2] == [[0], [0]]  # the mate takes expert 1's place
    router.eval()
    assert ids(router(x)) == ids(router(torch.cat((x, mate), 1)))[:2] == [[0], [0]]
    x, valid = torch.randn(2, 6, 4), torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    router = built(Base(), 4, training=True)
    routing = router(x.masked_fill(~valid[..., None], torch.nan), RoutingContext(valid_BS=valid))
    assert routing.tokens_per_expert_E.tolist() == [2, 2, 2, 2]
    assert routing.expert_ids_N[~valid.flatten()].tolist() == [4] * 4
    assert torch.equal(routing.expert_ids_N[valid.flatten()], router(x[valid][None]).expert_ids_N)


# Sinkhorn


def test_sinkhorn_of_two_by_two_and_its_score_functions():
    # exp(2) * exp(0) / (exp(0) * exp(1)) = e stays under scalings; with rows and columns of sum 1 it is
    # (a / (1 - a))^2, so a = sigmoid(1 / 2) = 0.622459.
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    plan = sinkhorn(logits, None, 50).exp()
    assert plan.flatten().tolist() == pytest.approx([0.622459, 0.377541, 0.377541, 0.622459], abs=1e-6)
    routing = built(Sinkhorn(iterations=50), 2, training=True)(logits[None])
    assert ids(routing) == [[0], [1]]
    assert routing.gates_N.tolist() == pytest.approx([0.880797, 0.5])  # sigmoid(2), sigmoid(0): of the raw logits
    assert ids(built(Sinkhorn(), 2)(logits[None])) == [[0], [0]]
    # Half the temperature is twice the logits.
    logits = torch.randn(30, 4)
    torch.testing.assert_close(sinkhorn(logits, None, 5, 0.5), sinkhorn(2 * logits, None, 5))
    x = torch.tensor([0.3, 0.5, 0.2]).log()[None, None]
    gates = {k: built(Sinkhorn(top_k=k), 3)(x).gates_N.tolist() for k in (1, 2)}
    assert gates[1] == pytest.approx([1 / 3])  # 0.5 / 1.5
    assert gates[2] == pytest.approx([0.5, 0.3])
    assert built(Sinkhorn(score_func="softmax"), 3)(x).gates_N.tolist() == pytest.approx([0.5])


def test_rows_sum_to_one_and_columns_to_equal_shares_of_the_real_tokens():
    logits, real = torch.randn(60, 5) + torch.linspace(0, 8, 5), torch.rand(60) < 0.7
    plan = sinkhorn(logits.masked_fill(~real[:, None], 0.0), real, 100).exp()
    torch.testing.assert_close(plan.sum(1), torch.ones(60))
    torch.testing.assert_close(plan[real].sum(0), torch.full((5,), int(real.sum()) / 5), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(plan[real], sinkhorn(logits[real], None, 100).exp())
    for size in (1.0, 100.0, 1e4, 1e30):
        for real in (None, torch.rand(50) < 0.5, torch.zeros(50, dtype=torch.bool)):
            assert not sinkhorn(size * torch.randn(50, 6), real, 16).isnan().any()
    assert sinkhorn(torch.zeros(0, 6), None, 3).shape == (0, 6)


@pytest.mark.parametrize(("top_k", "size"), [(1, 1.0), (2, 1.0), (1, 1e3)])
def test_skewed_tokens_are_spread_over_the_experts(top_k, size):
    # The expert liked best by all, by 10 standard deviations, gets nearly all tokens by top-1.
    x = size * (torch.randn(1, 2048, 8) + torch.linspace(0, 10, 8))
    router = built(Sinkhorn(top_k=top_k), 8, training=True)
    load = router(x).tokens_per_expert_E.double()
    assert load.max() / load.mean() < 1.15
    router.eval()
    load = router(x).tokens_per_expert_E.double()
    assert load.max() / load.mean() > 3.5  # of at most 8 / top_k
