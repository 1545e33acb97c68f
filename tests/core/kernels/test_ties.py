"""Every backend and gate chooses the same experts where scores are equal, or equal in float32 alone."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

import core
from core.kernels import BACKENDS, eager
from core.kernels.eager import top_k_ids
from core.routing.balance.balance import Balance
from core.routing.balance.terms import balance_sums
from core.routing.pairs.expert_choice import choose_tokens

SIGMOID = {"score_func": "sigmoid", "normalize": False}


@pytest.fixture(params=BACKENDS)
def choose(request):
    """The ids that a backend gives one token of these logits."""
    if request.param == "triton":
        pytest.importorskip("triton")
    kernels = BACKENDS[request.param]

    def ids(logits: list[float], top_k: int, **options: object) -> list[int]:
        (chosen,) = kernels.topk_gate(torch.tensor([logits]), top_k, **options).expert_ids_TK.tolist()
        return chosen

    return ids


def test_scores_that_float32_cannot_tell_apart_are_chosen_by_their_logits(choose):
    # All four sigmoids are 1: float32 has no number between 1 - 6e-8 and 1, and 1 - sigmoid(18) is 1.5e-8.
    assert choose([20.0, 30.0, 18.0, 25.0], 1, **SIGMOID) == [1]
    assert choose([20.0, 30.0, 18.0, 25.0], 3, **SIGMOID) == [1, 3, 0]
    # All but the first of these softmax scores are 0: exp(-198) is below the least number, 1e-45.
    assert choose([200.0, 0.0, 2.0, 1.0], 3, normalize=False) == [0, 2, 3]
    # By the best of each group, groups {0, 1} and {2, 3}: 30 against 25.
    assert choose([20.0, 30.0, 18.0, 25.0], 2, **SIGMOID, num_groups=2, limited_groups=1, group_score="max") == [1, 0]


def test_a_bias_steers_by_the_scores(choose):
    # Scores 1 and 1; the bias decides, and 30 > 20 does not.
    assert choose([20.0, 30.0], 1, **SIGMOID, bias_E=torch.tensor([0.1, 0.0])) == [0]


@pytest.mark.parametrize("options", [{}, {"normalize": False}, SIGMOID], ids=str)
def test_of_equal_experts_the_lowest_is_taken(choose, options):
    assert choose([0.0] * 8, 2, **options) == [0, 1]
    assert choose([0.0] * 8, 1, **options) == [0]
    assert choose([0.0] * 8, 8, **options) == list(range(8))
    # 3 three times: those of 1, 3 and 4; with K = 2 the border runs through them.
    assert choose([1.0, 3.0, 2.0, 3.0, 3.0], 2, **options) == [1, 3]
    assert choose([1.0, 3.0, 2.0, 3.0, 3.0], 4, **options) == [1, 3, 4, 2]
    assert choose([-0.0, 0.0, 0.0], 1, **options) == [0]


@pytest.mark.parametrize("group_score", ["top2", "max"])
def test_of_equal_groups_and_biased_experts_the_lowest_are_taken(choose, group_score):
    # Groups {0, 1}, {2, 3}, {4, 5}, {6, 7}.
    limits = {"num_groups": 4, "limited_groups": 2, "group_score": group_score}
    assert choose([0.0] * 8, 3, **limits) == [0, 1, 2]
    # Groups 1 and 3 are as good: [0.5, 1] and [1, 0.5]; their best experts are 3 and 6.
    assert choose([0, 0, 0.5, 1, 0, 0, 1, 0.5], 3, **limits) == [3, 6, 2]
    bias = torch.tensor([0.0, 0, 0, 1, 0, 1, 0, 1])
    assert choose([0.0] * 8, 2, bias_E=bias) == [3, 5]
    # Groups 1, 2 and 3 have a biased expert each, and the two lowest of them are taken.
    assert choose([0.0] * 8, 3, bias_E=bias, **limits) == [3, 5, 2]


def lowest_first(values: Tensor, k: int) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:k] for row in values.tolist()]


@pytest.mark.parametrize("E, k", [(1, 1), (8, 8), (33, 5), pytest.param(130, 8, marks=pytest.mark.slow)])
def test_every_backend_takes_the_same_experts_of_logits_with_many_ties(E, k):
    # bfloat16 has 8 bits: of numbers between 1 and 2 there are 128.
    logits = (1 + torch.rand(20, E)).bfloat16()
    expected = lowest_first(logits.float(), k)
    for name, kernels in BACKENDS.items():
        if name == "triton" and importlib.util.find_spec("triton") is None:
            continue
        for score_func in ("softmax", "sigmoid"):
            actual = kernels.topk_gate(logits.float(), k, score_func=score_func, normalize=k > 1)
            assert actual.expert_ids_TK.tolist() == expected, name
    assert eager.topk_gate(logits, k, normalize=k > 1).expert_ids_TK.tolist() == expected


@pytest.mark.parametrize("shape, k", [((0, 5), 1), ((7, 5), 0), ((2, 3, 5), 3), ((7, 5), 5)])
def test_places_of_the_largest_pass_transforms_compilers_and_the_meta_device(shape, k):
    values = torch.randint(0, 3, shape).double()
    torch.compiler.reset()  # it compiles a function for so many shapes alone
    assert torch.equal(torch.func.vmap(lambda row: top_k_ids(row, k))(values), top_k_ids(values, k))
    assert torch.equal(torch.compile(top_k_ids, backend="eager", fullgraph=True)(values, k), top_k_ids(values, k))
    assert top_k_ids(values.to("meta"), k).shape == (*shape[:-1], k)


GATES = {
    "top-k": (core.TokenChoice(3), [0, 1, 2]),
    "second": (core.Threshold(eval_second_expert_policy="always"), [0, 1]),
    # Groups {0 .. 3} and {4 .. 7}: the lowest of each.
    "prototypes": (core.Prototypes(2), [0, 4]),
    "hierarchical": (core.Hierarchical(num_groups=4, top_groups=2, top_k=1), [0, 2]),
    # Experts come before null experts.
    "null experts": (core.NullExperts(4, num_null_experts=8), [0, 1, 2, 3]),
    "sinkhorn": (core.Sinkhorn(top_k=3), [0, 1, 2]),
    "dense": (core.Dense(eval_top_k=3), [0, 1, 2]),
    "dense to sparse": (core.DenseToSparse(threshold=0.01, max_k=3), [0, 1, 2]),
    "dynamic threshold": (core.DynamicThreshold(max_k=3), [0, 8, 8]),
    "domain": (core.Domain(8, top_k=3), [0, 1, 2]),
}


@pytest.mark.parametrize("name", GATES)
def test_every_gate_takes_the_lowest_experts_for_a_zero_token(name):
    config, expected = GATES[name]
    router = config.build(4, 8).eval()
    context = core.RoutingContext(domain_weights_BE=torch.full((1, 8), 0.125))
    assert router(torch.zeros(1, 1, 4), context).expert_ids_N.tolist() == expected


def test_an_expert_takes_the_earliest_of_equal_tokens():
    # 4 tokens, 2 experts, factor 1: two places each; all scores are 1/2.
    chosen = choose_tokens(torch.zeros(4, 2), (1, 1), group="batch", num_sequences=1, length=4, valid_T=None)
    assert chosen.token_index_N.tolist() == [0, 1, 0, 1]


def test_rounding_adds_the_earliest_of_equal_tokens():
    # Tokens 0 to 11 are equal and choose expert 0, tokens 12 to 15 choose expert 1: 12 and 4 pairs, rounded to a
    # tile of 8 they are 16 and 8. Expert 1 adds four of tokens 0 to 11, and expert 0 all of the others.
    router = core.TokenRounding(top_k=1, tile=8).build(2, 2).train()
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.0]] * 12 + [[0.0, 1.0]] * 4)[None]
    routing = router(x)
    added = routing.token_index_N[16:].tolist()
    assert routing.tokens_per_expert_E.tolist() == [16, 8]
    assert added == [12, 13, 14, 15, 0, 1, 2, 3]


def test_the_losses_of_a_sequence_count_the_same_choice():
    # Sigmoids of 1, 1, 1, 1, of which the second is chosen: shares f = [0, 1, 0, 0], P = 1/4 each, 4 * 1/4 = 1 is the
    # same whoever is chosen; so a fifth token-free expert of score 0 tells: P = [1, 1, 1, 1, 0] / 4.
    router = core.TokenChoice(1, score_func="sigmoid").build(5, 5, core.Capacity())
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(5))
    routing = router(torch.tensor([[[20.0, 30.0, 18.0, 25.0, -40.0]]]))
    sums = balance_sums(routing, frozenset({"sequence_balance"}), Balance())
    assert sums["sequence_loss"].item() == pytest.approx(5 / 4)
    assert routing.expert_ids_N.tolist() == [1]
