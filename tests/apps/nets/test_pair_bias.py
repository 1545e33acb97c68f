"""Biases of attention scores: by distance, and by the time between two positions."""

import math

import pytest
import torch
from torch.testing import assert_close

from apps.nets.attention import hidden_score
from apps.nets.pair_bias import PairBias, time_buckets


def test_buckets_by_hand():
    # floor(2 log2(1 + s)): 0 -> 0; 1 -> 2; 2 -> 2 log2 3 = 3.17; 3 -> 4; 7 -> 6; 100 -> 13.3; 10^9 -> 59.8, and at most
    # the last of the 40 buckets. Queries are rows; a key after its query has 0.
    at = [5, 5, 6, 7, 8, 12, 105, 10**9 + 5]
    buckets = time_buckets(torch.tensor([at]), 40)[0]
    assert buckets[:, 0].tolist() == [0, 0, 2, 3, 4, 6, 13, 39]
    assert buckets[5].tolist() == [6, 6, 5, 5, 4, 0, 0, 0]  # 7, 7, 6, 5, 4 seconds: 2 log2 8, 8, 7, 6, 5
    assert int(time_buckets(torch.tensor([at]), 64)[0, -1, 0]) == 59


def test_a_power_of_two_begins_a_bucket_and_only_the_time_between_counts():
    for power in range(0, 40, 3):  # log2 in float32 must not fall below a whole number
        assert int(time_buckets(torch.tensor([[0, 2**power - 1]]), 100)[0, 1, 0]) == 2 * power
    # Today's seconds since 1970 do not fit in float32, their differences do.
    at = torch.tensor([[0, 1, 60, 61, 4000]])
    assert torch.equal(time_buckets(at, 64), time_buckets(at + 1_764_000_001, 64))


def test_the_mask_by_hand():
    bias = PairBias(num_heads=2, max_length=4, num_time_buckets=8).double()
    with torch.no_grad():
        bias.distance_bias.copy_(torch.tensor([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5], [3.0, 3.5]]))
        bias.time_bias.copy_(torch.arange(8.0)[:, None] * torch.tensor([10.0, -10.0]))
    hidden = hidden_score(torch.float64)
    # Times 0, 1, 4: between them 1 (bucket 2), 3 (bucket 4) and 4 seconds (2 log2 5 = 4.6: bucket 4).
    mask = bias.mask(torch.empty(2, 3, 0, dtype=torch.float64), torch.tensor([[0, 1, 4], [7, 7, 7]]))
    first = [[0.0, hidden, hidden], [1 + 20.0, 0.0, hidden], [2 + 40.0, 1 + 40.0, 0.0]]
    assert_close(mask.bias[0], torch.tensor(first, dtype=torch.float64))
    second = [[0.5, hidden, hidden], [1.5 - 20, 0.5, hidden], [2.5 - 40, 1.5 - 40, 0.5]]
    assert_close(mask.bias[1], torch.tensor(second, dtype=torch.float64))
    assert mask.bias[2].tolist() == [[0.0, hidden, hidden], [1.0, 0.0, hidden], [2.0, 1.0, 0.0]]
    # Without times all are of one.
    assert torch.equal(bias.mask(torch.empty(2, 3, 0, dtype=torch.float64), None).bias[:2], mask.bias[2:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_those_of_indexing(dtype):
    torch.manual_seed(0)
    bias = PairBias(num_heads=2, max_length=6, num_time_buckets=12).double()
    like, seconds = torch.empty(3, 5, 0, dtype=dtype), torch.randint(0, 30, (3, 5)).cumsum(1)
    weight = torch.randn(6, 5, 5, dtype=dtype).tril()
    (bias.mask(like, seconds).bias * weight).tril().sum().backward()
    time, distance = (torch.zeros(n, 2, dtype=torch.float64, requires_grad=True) for n in (12, 6))
    total = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        for query in range(5):
            for key in range(query + 1):
                between = int(seconds[b, query] - seconds[b, key])
                row = time[min(math.floor(2 * math.log2(1 + between)), 11)] + distance[query - key]
                total = total + (row * weight[2 * b : 2 * b + 2, query, key].double()).sum()
    total.backward()
    tolerance = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    assert_close(bias.time_bias.grad, time.grad, **tolerance)
    assert_close(bias.distance_bias.grad, distance.grad, **tolerance)
