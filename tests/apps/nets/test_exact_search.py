"""The exact search, against numbers that one can check by hand."""

from __future__ import annotations

import pytest
import torch

from apps.nets.exact_search import exact_search, products

VECTORS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])


def test_the_best_come_first():
    # Products of (1, 0): 1, 0, 0.6; of (0, 2): 0, 2, 1.6.
    best = exact_search(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), VECTORS, 2)
    assert best.place_BK.tolist() == [[0, 2], [1, 2]]
    assert best.score_BK.flatten().tolist() == pytest.approx([1.0, 0.6, 2.0, 1.6])


def test_all_of_them_where_there_are_fewer_and_none_without_queries():
    query = torch.tensor([[3.0, 1.0]])  # products 3, 1, 2.6
    assert exact_search(query, VECTORS, 10).place_BK.tolist() == [[0, 2, 1]]
    assert [x.shape for x in exact_search(torch.ones(0, 2), VECTORS, 2)] == [(0, 2), (0, 2)]


@pytest.mark.parametrize("most, sizes", [(1, [1] * 5), (6, [2, 2, 1]), (100, [5])])
def test_products_come_some_queries_at_a_time(most, sizes):
    query = torch.arange(10.0).reshape(5, 2)
    chunks = list(products(query, VECTORS, most))
    assert [len(score) for score, _ in chunks] == sizes
    torch.testing.assert_close(torch.cat([score for score, _ in chunks]), query @ VECTORS.t())
    assert torch.equal(torch.cat([query[rows] for _, rows in chunks]), query)


def test_products_are_of_full_precision_inside_autocast():
    query, vectors = torch.full((1, 1), 1 + 2.0**-12), torch.ones(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert exact_search(query, vectors, 1).score_BK.item() == 1 + 2.0**-12  # bfloat16 would say 1
