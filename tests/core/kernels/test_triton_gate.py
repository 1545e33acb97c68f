"""The gate and the sort of the pairs in Triton's interpreter: each against the oracle, and what is theirs alone."""

from __future__ import annotations

import pytest
import torch
from fused import Operations

from core.kernels import eager, triton_ops
from core.kernels.triton_ops import gate, launch, sort

pytest.importorskip("triton")
GATES = {
    "switch": (4, 1, {}),
    "top-3": (5, 3, {}),
    "all": (8, 8, {}),
    "v-moe": (8, 2, {"normalize": False}),
    "scaled": (6, 2, {"normalize": False, "scale": 2.5}),
    "sigmoid": (7, 3, {"score_func": "sigmoid"}),
    "sigmoid, not normalized": (12, 2, {"score_func": "sigmoid", "normalize": False}),
    "deepseek-v3": (12, 4, {"score_func": "sigmoid", "num_groups": 3, "limited_groups": 2, "scale": 2.5}),
    "deepseek-v2": (12, 2, {"num_groups": 6, "limited_groups": 2, "group_score": "max"}),
    "groups of one": (6, 3, {"num_groups": 6, "limited_groups": 3}),
    "many": (130, 8, {}),
    "dense": (20, 20, {}),
}


CASES = [(name, i % 2 == 0, 9) for i, name in enumerate(GATES)]
CASES += [("top-3", True, 0), ("sigmoid", True, 1), ("top-3", False, 70), ("deepseek-v3", True, 70)]


@pytest.mark.parametrize("name, biased, tokens", CASES)
def test_gate_equals_the_oracle_in_choice_gates_sums_and_gradients(name, biased, tokens):
    E, K, options = GATES[name]
    logits = torch.randn(tokens, E)
    bias = torch.randn(E) / 5 if biased else None
    valid = torch.rand(tokens) < 0.7
    exact, fused = logits.double().requires_grad_(), logits.clone().requires_grad_()
    a = eager.topk_gate(exact, K, bias_E=None if bias is None else bias.double(), **options)
    b = triton_ops.topk_gate(fused, K, bias_E=bias, valid_T=valid, **options)
    assert torch.equal(a.expert_ids_TK, b.expert_ids_TK)
    assert torch.equal(b.chosen_per_expert_E, eager.count_experts(a.expert_ids_TK[valid].flatten(), E))
    share = a.scores_TE / a.scores_TE.sum(-1, keepdim=True)
    expected = [a.scores_TE, a.gates_TK, share[valid].sum(0), exact.logsumexp(-1)[valid].square().sum()[None]]
    actual = [b.scores_TE, b.gates_TK, b.sums["score"], b.sums["square"]]
    grads = [torch.randn(t.shape) for t in actual]
    sum((t * g).sum() for t, g in zip(expected, grads, strict=True)).backward()
    sum((t * g).sum() for t, g in zip(actual, grads, strict=True)).backward()
    for t, u in zip((*expected, exact.grad), (*actual, fused.grad), strict=True):
        torch.testing.assert_close(u, t.float(), rtol=1e-5, atol=1e-5)


def test_scores_that_the_kernel_has_not_are_the_oracles():
    logits = torch.randn(9, 6)
    a, b = (k.topk_gate(logits, 2, score_func="sqrt_softplus", scale=1.5) for k in (eager, triton_ops))
    assert torch.equal(a.expert_ids_TK, b.expert_ids_TK)
    assert torch.equal(a.gates_TK, b.gates_TK)
    assert b.sums is None
    with pytest.raises(ValueError, match="score_func='tanh' is not one of softmax, sigmoid, sqrt_softplus"):
        triton_ops.topk_gate(logits, 2, score_func="tanh")


@pytest.mark.parametrize("experts", [3, 20])
def test_counts_and_sums_are_those_of_many_blocks_of_tokens(monkeypatch, experts):
    monkeypatch.setattr(gate, "BLOCKS_AT_A_TIME", 2)
    logits, valid = torch.randn(330, experts), torch.rand(330) < 0.7
    a, b = eager.topk_gate(logits, 2), triton_ops.topk_gate(logits, 2, valid_T=valid)
    assert torch.equal(b.chosen_per_expert_E, eager.count_experts(a.expert_ids_TK[valid].flatten(), experts))
    torch.testing.assert_close(b.sums["score"], a.scores_TE[valid].sum(0))
    torch.testing.assert_close(b.sums["square"], logits.logsumexp(-1)[valid].square().sum()[None])


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's, which interprets
def test_gate_takes_the_lower_expert_of_equal_scores_and_never_one_that_is_not_there():
    equal = triton_ops.topk_gate(torch.zeros(2, 5), 3)
    assert equal.expert_ids_TK.tolist() == [[0, 1, 2], [0, 1, 2]]
    torch.testing.assert_close(equal.gates_TK, torch.full((2, 3), 1 / 3))
    logits = torch.randn(6, 5)
    logits[1], logits[4, 2] = torch.nan, torch.nan
    for options in ({}, {"score_func": "sigmoid", "normalize": False}, {"num_groups": 5, "limited_groups": 3}):
        wrong = triton_ops.topk_gate(logits, 2, **options)
        ids = wrong.expert_ids_TK
        assert ((ids >= 0) & (ids < 5)).all(), "NaN must not become an address"
        assert (ids[:, 0] != ids[:, 1]).all()
        # Else the rows of other tokens would be taken for this one's.
        assert torch.equal(wrong.chosen_per_expert_E, eager.count_experts(ids.flatten(), 5))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_func": "sigmoid", "normalize": False},
        {"score_func": "sigmoid", "num_groups": 3, "limited_groups": 2},
    ],
    ids=str,
)
def test_a_token_of_nan_has_gates_sums_and_gradients_of_nan_and_no_other_has(options):
    logits = torch.randn(5, 6)
    logits[1], logits[3, 2] = torch.nan, torch.nan
    # Which experts the oracle gives such a token, and so whether its gates show it, is left to a sort of NaN.
    a = eager.topk_gate(logits, 2, **options)
    leaf = logits.clone().requires_grad_()
    b = triton_ops.topk_gate(leaf, 2, **options)
    torch.testing.assert_close(b.scores_TE, a.scores_TE, equal_nan=True)
    assert b.gates_TK.isnan().all(1).tolist() == [False, True, False, True, False]
    sound = torch.tensor([True, False, True, False, True])
    torch.testing.assert_close(b.gates_TK[sound], a.gates_TK[sound])
    assert b.sums["score"].isnan().all()
    assert b.sums["square"].isnan().all()
    masked = triton_ops.topk_gate(logits, 2, valid_T=sound, **options)
    assert masked.sums["score"].sum().item() == pytest.approx(3, rel=1e-5)  # one for each token
    assert masked.sums["square"].isfinite().all()
    b.gates_TK[:, 0].sum().backward()
    assert leaf.grad.isnan().all(1).tolist() == [False, True, False, True, False]
    assert leaf.grad[sound].isfinite().all()


@pytest.mark.parametrize("used", ["scores_TE", "gates_TK", "score", "square"])
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_gate_has_the_gradient_of_what_is_used_alone(score_func, used):
    logits = torch.randn(7, 6)
    exact, fused = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a = eager.topk_gate(exact, 2, score_func=score_func)
    b = triton_ops.topk_gate(fused, 2, score_func=score_func)
    share_E = (a.scores_TE / a.scores_TE.sum(-1, keepdim=True)).sum(0)
    expected = {**vars(a), "score": share_E, "square": exact.logsumexp(-1).square().sum()[None]}[used]
    actual = {**vars(b), **b.sums}[used]
    grad = torch.randn(actual.shape)
    expected.backward(grad)
    actual.backward(grad)
    torch.testing.assert_close(fused.grad, exact.grad)


def test_gate_and_sort_are_as_many_launches_as_the_docs_say():
    logits, ids, served = torch.randn(40, 6), torch.randint(0, 4, (300,)), torch.randperm(100)
    with launch.written_down() as starts, Operations() as seen:
        gate.choose(logits, None, None, 2, True, True, 1, 1, True, 1.0)
    assert [start.kernel for start in starts] == ["gate.choose", "gate.totals"]
    assert seen.names == []
    with launch.written_down() as starts, Operations() as seen:
        sort.find_places(ids, 4)
    assert [start.kernel for start in starts] == ["sort.count", "sort.place"]
    assert seen.names == ["cumsum", "clone"]  # the second of as many numbers as there are experts
    counts = eager.count_experts(ids, 3)
    with Operations() as seen:
        triton_ops.sort_pairs(ids, counts)
    assert seen.names == ["triton_places"], "and nothing around it"
    with launch.written_down() as starts, Operations() as seen:
        sort.find_ranks(ids.view(100, 3), served, 4)
    assert [start.kernel for start in starts] == ["sort.count", "sort.place"]
    assert seen.names == ["cumsum"]


def test_gate_gives_an_expert_out_of_reach_no_score_and_no_gradient():
    logits = torch.tensor([[1.0, -torch.inf, 2.0]], requires_grad=True)
    best = triton_ops.topk_gate(logits, 2)
    (best.scores_TE[0, 0] + best.gates_TK[0, 0] + best.sums["square"].sum()).backward()
    assert best.expert_ids_TK.tolist() == [[2, 0]]
    assert best.scores_TE[0, 1] == 0
    assert logits.grad[0, 1] == 0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("pairs", [0, 1, 127, 128, 300])
@pytest.mark.parametrize("experts", [1, 3, 65])
def test_sort_equals_the_oracle(pairs, experts):
    ids = torch.randint(0, experts + 1, (pairs,))  # E: not computed
    counts = eager.count_experts(ids, experts)
    for name, expected in vars(eager.sort_pairs(ids, counts)).items():
        assert torch.equal(getattr(triton_ops.sort_pairs(ids, counts), name), expected), name


@pytest.mark.parametrize("tokens", [0, 1, 150])
@pytest.mark.parametrize("ordered", [False, True])
def test_places_in_the_queues_equal_the_oracle_by_position_and_by_score(tokens, ordered):
    queue = torch.randint(0, 6, (tokens, 3))
    served = torch.randperm(tokens) if ordered else None
    assert torch.equal(triton_ops.queue_ranks(queue, served, 6), eager.queue_ranks(queue, served, 6))


def test_places_in_the_queues_are_those_of_gshard():
    # First choices of all tokens before second ones; token 1 is served before token 0.
    queue = torch.tensor([[0, 1], [0, 0], [1, 0]])
    ranks = triton_ops.queue_ranks(queue, torch.tensor([1, 0, 2]), 2)
    assert ranks.tolist() == [[1, 1], [0, 2], [0, 3]]
