"""HSTU's attention, one position at a time, and its biases: by distance, and by the time between two positions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import core
from apps.nets.attention import Mask, hidden_score, self_mask
from apps.nets.config import TransformerConfig
from apps.nets.packing import Packing
from apps.nets.pair_bias import PairBias, time_buckets
from apps.nets.pointwise import PointwiseAttention

LENGTHS = (5, 3, 1)


def build(dim=6, heads=2, max_length=8):
    torch.manual_seed(0)
    config = TransformerConfig(dim=dim, num_heads=heads, positions="none")
    return PointwiseAttention(config, max_length).double()


def packed():
    valid_BL = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return Packing.of(valid_BL)[0]


def slow(layer, x_SD, bias_HSS):
    """Equations 1 to 3 of arXiv 2402.17152, a head, a query and a key at a time."""
    S, D = x_SD.shape
    d = D // layer.num_heads
    u, v, q, k = F.silu(x_SD @ layer.uvqk.weight.t() + layer.uvqk.bias).split(D, dim=1)
    rows = []
    for t in range(S):
        heads = []
        for h in range(layer.num_heads):
            own, y_d = slice(h * d, h * d + d), torch.zeros(d, dtype=x_SD.dtype)
            for s in range(t + 1):
                score = (q[t, own] @ k[s, own]) / math.sqrt(d) + bias_HSS[h, t, s]
                y_d = y_d + score * torch.sigmoid(score) / layer.max_length * v[s, own]
            heads.append(y_d)
        y_D = torch.cat(heads)
        y_D = (y_D - y_D.mean()) / torch.sqrt(y_D.var(unbiased=False) + layer.norm.eps)
        rows.append((y_D * layer.norm.weight + layer.norm.bias) * u[t])
    return torch.stack(rows) @ layer.out.weight.t() + layer.out.bias


def test_it_is_the_slow_loop_in_output_and_gradients():
    layer, bias, packing = build(), PairBias(2, 8, 16).double(), packed()
    with torch.no_grad():
        for parameter in (bias.distance_bias, bias.time_bias, layer.norm.weight):
            parameter.normal_()
    seconds = torch.tensor([[0, 0, 9, 70, 900], [3, 4, 5, 0, 0], [8, 0, 0, 0, 0]])
    x_TD = torch.randn(sum(LENGTHS), 6, dtype=torch.float64, requires_grad=True)
    wanted = (x_TD, *layer.parameters(), *bias.parameters())
    mask = bias.mask(x_TD.new_empty(3, 5, 0), seconds)
    y_TD = layer(x_TD, mask, packing=packing)
    bias_BHLL = mask.bias.unflatten(0, (3, 2))
    parts = zip(x_TD.split(LENGTHS), bias_BHLL, strict=True)
    expected = torch.cat([slow(layer, x_SD, bias_HLL[:, : len(x_SD), : len(x_SD)]) for x_SD, bias_HLL in parts])
    assert_close(y_TD, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(y_TD)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True) for y in (y_TD, expected))
    for name, one, other in zip(range(len(wanted)), ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_rows_without_padding_are_those_of_the_packing_and_cost_what_a_hand_counts():
    layer, packing = build(), packed()
    x_TD = torch.randn(sum(LENGTHS), 6, dtype=torch.float64)
    mask = self_mask(x_TD.new_empty(3, 5, 0), 2, valid_BL=None, causal=True, relative_HLL=None)
    with torch.no_grad():
        assert_close(packing.pack(layer(packing.pad(x_TD), mask)), layer(x_TD, mask, packing=packing))
        # What a GPU takes: a mask that says "causal" and holds no bias.
        assert_close(layer(x_TD, Mask(causal=True), packing=packing), layer(x_TD, mask, packing=packing))
    # 9 tokens: u, v, q, k 2 * 6 * 24 = 288 each and the output 2 * 6 * 6 = 72; scores and sums of 3 padded rows of 5:
    # 2 * 2 * 3 * 5 * 5 * 6 = 1,800.
    layer, x_TD = build().float(), torch.randn(9, 6)
    mask = self_mask(x_TD.new_empty(3, 5, 0), 2, valid_BL=None, causal=True, relative_HLL=None)
    with torch.no_grad():
        assert core.count_flops(layer, x_TD, mask, None, packed()) == 9 * (288 + 72) + 1800
        layer.dropout, x_BLD = 0.5, torch.randn(1, 6, 6)
        assert not torch.equal(layer(x_BLD, Mask(causal=True)), layer(x_BLD, Mask(causal=True)))
        layer.eval()
        assert torch.equal(layer(x_BLD, Mask(causal=True)), layer(x_BLD, Mask(causal=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_keys_weigh_nothing(dtype):
    layer, x_BLD = build().to(dtype), torch.randn(1, 4, 6, dtype=dtype, requires_grad=True)
    layer(x_BLD, self_mask(x_BLD, 2, valid_BL=None, causal=True, relative_HLL=None))[0, 1].sum().backward()
    assert x_BLD.grad.isfinite().all()
    assert not x_BLD.grad[0, 2:].any()
    assert x_BLD.grad[0, :2].abs().amax(-1).min() > 0


def test_buckets_by_hand_of_the_time_between():
    # floor(2 log2(1 + s)): 0 -> 0; 1 -> 2; 2 -> 2 log2 3 = 3.17; 3 -> 4; 7 -> 6; 100 -> 13.3; 10^9 -> 59.8, and at most
    # the last of the 40 buckets. Queries are rows; a key after its query has 0.
    at = [5, 5, 6, 7, 8, 12, 105, 10**9 + 5]
    buckets = time_buckets(torch.tensor([at]), 40)[0]
    assert buckets[:, 0].tolist() == [0, 0, 2, 3, 4, 6, 13, 39]
    assert buckets[5].tolist() == [6, 6, 5, 5, 4, 0, 0, 0]  # 7, 7, 6, 5, 4 seconds: 2 log2 8, 8, 7, 6, 5
    assert int(time_buckets(torch.tensor([at]), 64)[0, -1, 0]) == 59
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
