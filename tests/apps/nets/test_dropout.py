"""Dropout from 16-bit random numbers."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from apps.nets.dropout import Dropout, dropout, kept


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_and_what_is_left(p):
    torch.manual_seed(0)
    factors = kept(torch.empty(1000, 1001), p)
    share = (factors == 0).float().mean().item()
    # Of a million draws the share has a deviation of at most 0.0005.
    assert share == pytest.approx(p, abs=0.0025)
    assert_close(factors[factors > 0].unique(), torch.tensor([1 / (1 - p)]), rtol=1e-3, atol=0)
    assert factors.mean().item() == pytest.approx(1.0, abs=0.02)


def test_neighbours_are_drawn_apart():
    # Four elements come from one random word: dropped pairs are as frequent as p * p = 0.25 at any distance.
    torch.manual_seed(0)
    dropped = (kept(torch.empty(100_000), 0.5) == 0).float()
    for distance in (1, 2, 3, 4):
        pairs = (dropped[:-distance] * dropped[distance:]).mean().item()
        assert pairs == pytest.approx(0.25, abs=0.01)


def test_extremes():
    assert torch.equal(kept(torch.empty(9), 1e-9), torch.ones(9))
    assert kept(torch.empty(0, 3), 0.5).shape == (0, 3)
    assert kept(torch.empty(10), 0.9999999).isfinite().all()


def test_nothing_is_dropped_in_evaluation():
    x, y = torch.randn(2, 50)
    module = Dropout(0.5).eval()
    assert module(x) is x
    assert torch.equal(module.add(x, y), x + y)
    module = Dropout(0.0).train()
    assert module(x) is x
    assert torch.equal(module.add(x, y), x + y)


def test_the_same_seed_drops_the_same():
    x, y = torch.randn(2, 7, 13, dtype=torch.float64)
    module = Dropout(0.3)
    torch.manual_seed(1)
    dropped = module(y)
    assert not torch.equal(module(y), dropped)
    torch.manual_seed(1)
    assert torch.equal(dropout(y, 0.3), dropped)
    torch.manual_seed(1)
    assert_close(module.add(x, y), x + dropped)


def test_gradients_are_dropped_alike():
    x, y = torch.zeros(2, 100, dtype=torch.float64).requires_grad_()
    torch.manual_seed(1)
    factors = kept(y, 0.5)
    torch.manual_seed(1)
    grads = torch.autograd.grad(Dropout(0.5).add(x, y).sum(), (x, y))
    assert torch.equal(grads[0], torch.ones_like(x))
    assert torch.equal(grads[1], factors)


def test_half_precision_is_added_to_full():
    torch.manual_seed(1)
    sum_N = Dropout(0.5).add(torch.ones(50), torch.ones(50, dtype=torch.bfloat16))
    assert sum_N.dtype == torch.float32
    assert sum_N.unique().tolist() == [1.0, 3.0]


def test_in_a_graph_it_is_torchs_own():
    x = torch.ones(64)
    compiled, plain = torch.compile(Dropout(0.5), backend="aot_eager", fullgraph=True), nn.Dropout(0.5)
    torch.manual_seed(3)
    y = compiled(x)
    torch.manual_seed(3)
    assert torch.equal(y, plain(x))
