"""``ProductKeys``: exact retrieval, gates of a head, batch norm, and what is refused."""

import itertools
import math

import pytest
import torch

import core
from core import PEER, ProductKeys, RoutingContext


def router(num_experts: int, dim: int = 8, **options) -> core.Router:
    torch.manual_seed(0)
    return ProductKeys(**options).build(dim, num_experts).double()


def scores_by_brute_force(r, x_TD: torch.Tensor) -> torch.Tensor:
    """Return the scores of all experts, (T, H, E), in loops over heads and keys."""
    H, n = r.config.heads, r.num_keys
    scores = torch.zeros(len(x_TD), H, n * n, dtype=x_TD.dtype)
    for h in range(H):
        q = x_TD @ r.w_query.unflatten(0, (H, -1))[h].t()
        first, second = q.chunk(2, -1)
        keys = r.keys[:, 0 if r.config.shared_keys else h]
        for i, j in itertools.product(range(n), range(n)):
            scores[:, h, i * n + j] = first @ keys[0, i] + second @ keys[1, j]
    return scores


@pytest.mark.parametrize("shared_keys", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 3), (49, 10), (64, 16), (9, 9)])
def test_retrieval_has_recall_1_against_all_experts(num_experts, top_k, shared_keys):
    r = router(num_experts, top_k=top_k, heads=3, shared_keys=shared_keys)
    x = torch.randn(40, 8, dtype=torch.float64)
    best, routing = scores_by_brute_force(r, x).topk(top_k, -1), r(x[None])
    ids, gates = (t.view(40, 3, top_k) for t in (routing.expert_ids_N, routing.gates_N))
    assert torch.equal(ids, best.indices)
    torch.testing.assert_close(gates, best.values.softmax(-1))
    assert (routing.top_k, routing.chosen_per_expert_E.sum()) == (3 * top_k, 40 * 3 * top_k)


def test_a_worked_example_and_an_expert_taken_twice():
    # n = 2 keys a half, D = Q = 2, one head, K = 2, query = x = (1, 3). The first half scores 1 * (0, 2) = (0, 2), the
    # second 3 * (1, 0) = (3, 0). Sums: expert 0 = 0 + 3, expert 1 = 0 + 0, expert 2 = 2 + 3, expert 3 = 2 + 0.
    # The best are 2 with 5 and 0 with 3: gates 1 / (1 + e^-2) = 0.8808 and 0.1192.
    r = router(4, 2, top_k=2, heads=1)
    r.w_query.data.copy_(torch.eye(2))
    r.keys.data.copy_(torch.tensor([[[[0.0], [2.0]]], [[[1.0], [0.0]]]]))
    routing = r(torch.tensor([[[1.0, 3.0]]], dtype=torch.float64))
    assert routing.expert_ids_N.tolist() == [2, 0]
    assert routing.gates_N.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])
    r = router(4, 8, top_k=4, heads=2)  # each takes all
    layer = core.MoEConfig(4, ProductKeys(4, 2), PEER()).build(8)
    routing = r(torch.randn(1, 3, 8, dtype=torch.float64))
    assert routing.chosen_per_expert_E.tolist() == [6, 6, 6, 6]
    assert layer(torch.randn(1, 3, 8)).shape == (1, 3, 8)


def test_a_router_made_without_memory_takes_the_weights_it_is_given():
    made, x = router(16, top_k=3), torch.randn(1, 6, 8)
    with torch.device("meta"):
        assigned, emptied = router(16, top_k=3), router(16, top_k=3)
    assigned.load_state_dict(made.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(made.state_dict())
    for other in (assigned, emptied):
        assert torch.equal(other(x).expert_ids_N, made(x).expert_ids_N)


def test_batch_norm_is_torch_s_over_real_tokens():
    r = router(16, 8, top_k=2, heads=2, query_norm="batch").train()
    norm = torch.nn.BatchNorm1d(16, dtype=torch.float64)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    valid = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    padded = x.masked_fill(~valid[..., None], torch.nan)
    for _ in range(2):
        routing, q = r(padded, RoutingContext(valid_BS=valid)), norm(x[valid] @ r.w_query.t())
    torch.testing.assert_close(r.running_mean, norm.running_mean)
    torch.testing.assert_close(r.running_var, norm.running_var)
    best = scores_of(r, q).topk(2, -1)
    assert torch.equal(routing.expert_ids_N.view(12, 2, 2)[valid.flatten()], best.indices)
    r.eval(), norm.eval()
    best = scores_of(r, norm(x[0] @ r.w_query.t())).topk(2, -1)
    assert torch.equal(r(x[:1]).expert_ids_N.view(6, 2, 2), best.indices)


def scores_of(r, q_TC: torch.Tensor) -> torch.Tensor:
    q = q_TC.unflatten(1, (r.config.heads, 2, -1))
    first, second = (q[:, :, half] @ r.keys[half, 0].t() for half in (0, 1))
    return (first[..., :, None] + second[..., None, :]).flatten(-2)


@pytest.mark.parametrize(
    ("num_experts", "options", "message"),
    [
        (1000, {}, r"num_experts=1000 is no square: two sets of n sub-keys make n \* n experts"),
        (9, {"top_k": 10}, "top_k=10 exceeds num_experts=9"),
        (9, {"top_k": 2, "query_dim": 7}, "query_dim=7 is odd: a query has two halves"),
    ],
)
def test_bad_values(num_experts, options, message):
    with pytest.raises(ValueError, match=message):
        core.MoEConfig(num_experts, ProductKeys(**options), PEER())


def test_other_experts_may_be_retrieved_too_without_a_capacity():
    layer = core.MoEConfig(16, ProductKeys(2, 2), core.FFN(5)).build(8)
    assert layer(torch.randn(2, 3, 8)).shape == (2, 3, 8)
    with pytest.raises(ValueError, match=r"capacity_factor=1\.0 does not apply to ProductKeys"):
        core.MoEConfig(16, ProductKeys(2, 2), PEER(), capacity_factor=1.0)
    with pytest.raises(ValueError, match="not for a causal decoder"):
        core.MoEConfig(16, ProductKeys(2, 2, query_norm="batch"), PEER()).build(8, causal=True)
